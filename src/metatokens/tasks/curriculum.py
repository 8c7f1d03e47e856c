"""Training batches of a recall task under a curriculum.

The curriculum is data, and `locate` finds the stage of a step without state. Within a stage, batches come in groups of
`bucket_batches`: the instances of a group are ordered by length and cut into batches, which come in random order. So
the rows of a batch are about equally long and padding is rare. A batch is a pure function of the step: instances are
(seed, index), a keyed permutation orders them in each epoch, and every rank makes the whole group and takes its own
rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metatokens.data.injection import IntArray
from metatokens.data.keyed_random import KeyedRandom, Purpose, hash_key
from metatokens.data.loader import Batches, permute
from metatokens.tasks.encoding import RecallBatch, encode_instance, pad
from metatokens.tasks.registry import make_instance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metatokens.config.finetuning import FinetuneConfig, Stage
    from metatokens.config.schema import LossPolicy
    from metatokens.tasks.base import PieceEncoder
    from metatokens.tasks.encoding import EncodedInstance

_GROUPS_KEPT = 2  # the group of this step, and that of the steps that are prefetched
_STAGE_STRIDE = 2**40  # between the indices of two stages: more instances than any stage has


class PlacedStep(NamedTuple):
    """Where a step lies in the curriculum."""

    stage: int
    """Index of the stage."""
    step: int
    """Number of steps of the stage before this one."""


def locate(curriculum: Sequence[Stage], step: int) -> PlacedStep:
    """Return the stage of optimizer step `step`, counted from 0, and the step's number in it.

    Raises:
        ValueError: The step lies beyond the last stage.
    """
    rest = step
    for index, stage in enumerate(curriculum):
        if rest < stage.steps:
            return PlacedStep(index, rest)
        rest -= stage.steps
    raise ValueError(f"step {step} lies beyond the {step - rest} steps of the curriculum")


class RecallBatches(Batches):
    """The training batches of a fine-tuning run.

    Args:
        config: Task, curriculum, batch size and seed.
        encoder: The tokenizer of the model.
        meta_token_id: The id of the meta-token.
        pad_token_id: The id of padding.
        loss_policy: Which position predicts which token; see `encode_instance`.
        num_positions: Of the model, for a task with coupled positions.
        rank: This process.
        world_size: W, the number of processes; divides the batch.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        encoder: PieceEncoder,
        *,
        meta_token_id: int,
        pad_token_id: int,
        loss_policy: LossPolicy = "skip",
        num_positions: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._num_positions = num_positions
        self._config, self._encoder, self._loss_policy = config, encoder, loss_policy
        self._meta_token_id, self._pad_token_id = meta_token_id, pad_token_id
        self._rank, self._world_size = rank, world_size
        self._group = lru_cache(maxsize=_GROUPS_KEPT)(self._make_group)

    def batch_at(self, step: int) -> RecallBatch:
        """Return this rank's rows of the global batch of optimizer step `step`."""
        stage, step_in_stage = locate(self._config.curriculum, step)
        group, place = divmod(step_in_stage, self._config.bucket_batches)
        # every W-th row: neighbours are about equally long, so the ranks' work is about equal
        own = self._group(stage, group)[place][self._rank :: self._world_size]
        starts = [self._start(step, index, row) for index, row in own]
        rows = [row for _, row in own]
        return pad(rows, meta_token_id=self._meta_token_id, pad_token_id=self._pad_token_id, starts=starts)

    def _start(self, step: int, index: int, row: EncodedInstance) -> int:
        """Return where the coupled positions of a row start, such that its last one is within the model's."""
        if row.groups is None or self._num_positions is None:
            return 0
        key = hash_key(self._config.seed, step, index, Purpose.COUPLING)
        return KeyedRandom(int(key[0])).below(self._num_positions - row.num_positions + 1)

    def sample_ids(self, step: int) -> list[int]:
        """Return the indices of the instances of the global batch of optimizer step `step`."""
        stage, step_in_stage = locate(self._config.curriculum, step)
        group, place = divmod(step_in_stage, self._config.bucket_batches)
        return [index for index, _ in self._group(stage, group)[place]]

    def _make_group(self, stage_index: int, group: int) -> list[list[tuple[int, EncodedInstance]]]:
        """Return the batches of a group, in the order in which they come, each instance with its index."""
        config = self._config
        stage = config.curriculum[stage_index]
        batch_size, first_batch = config.training.batch_blocks, group * config.bucket_batches
        num_batches = min(config.bucket_batches, stage.steps - first_batch)
        places = np.arange(first_batch * batch_size, (first_batch + num_batches) * batch_size)
        indices: list[int] = self._instances(stage_index, places).tolist()
        encoded = [(index, self._encode(stage, index)) for index in indices]
        encoded.sort(key=lambda row: len(row[1].input_ids))
        order = permute(
            np.arange(num_batches), num_batches, hash_key(config.seed, stage_index, group, Purpose.BATCH_ORDER)
        )
        return [encoded[i * batch_size : (i + 1) * batch_size] for i in order.tolist()]

    def _encode(self, stage: Stage, index: int) -> EncodedInstance:
        task = self._config.task
        instance = make_instance(
            task, stage.difficulty, encoder=self._encoder, seed=self._config.seed, split="train", index=index
        )
        return encode_instance(
            instance,
            task,
            encoder=self._encoder,
            meta_token_id=self._meta_token_id,
            loss_policy=self._loss_policy,
        )

    def _instances(self, stage_index: int, places: IntArray) -> IntArray:
        """Return the index of the instance at each place of a stage's stream; stages share no instance."""
        config, offset = self._config, stage_index * _STAGE_STRIDE
        if config.train_instances is None:
            return offset + places
        share = config.curriculum[stage_index].steps / config.total_steps
        num_instances = max(1, round(config.train_instances * share))
        epochs, positions = np.divmod(places, num_instances)
        keys = hash_key(config.seed, epochs, stage_index, Purpose.INSTANCE_ORDER)
        return offset + permute(positions, num_instances, keys)
