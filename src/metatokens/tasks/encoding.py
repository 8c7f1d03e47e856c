"""Instances to rows of tokens with meta-tokens and targets, and rows to padded batches.

The loss convention is that of pre-training (`metatokens.data.injection.InjectedBatch`): targets are shifted, so the
target of a position is what its output must predict, and a meta-token is never one.

Shapes: B batch, T positions of a row, meta-tokens included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metatokens.config.schema import UniformInjection
from metatokens.data.injection import IGNORE_INDEX, BoolArray, IntArray, inject_into_prompt
from metatokens.data.keyed_random import KeyedRandom, Purpose, hash_key
from metatokens.tasks.base import META
from metatokens.tasks.coupling import couple_tokens
from metatokens.tasks.registry import chance_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from metatokens.config.schema import LossPolicy
    from metatokens.config.tasks import PeriodicPlaces, Task, UniformPlaces
    from metatokens.tasks.base import Instance, PieceEncoder


class EncodedInstance(NamedTuple):
    """An instance as tokens."""

    input_ids: IntArray
    """(T,), text and meta-tokens; the last answer ends it."""
    targets: IntArray
    """(T,), what the output at each position must predict (already shifted); -100 where there is no loss term."""
    answer_spans: tuple[tuple[int, int], ...]
    """(start, stop) of each answer in `input_ids`; no meta-token is inside."""
    prompt_length: int
    """Text tokens before the last answer."""
    choices: tuple[tuple[int, ...], ...]
    """The tokens of each choice; empty if the task has no choices."""
    chance: float
    """The accuracy of guessing one of its answers."""
    groups: IntArray | None = None
    """(T,), which tokens share a position, see `metatokens.tasks.coupling`; None if positions count the tokens."""

    @property
    def num_positions(self) -> int:
        """Positions that a model needs for it."""
        return len(self.input_ids) if self.groups is None else int(self.groups.max()) + 1


class RecallBatch(NamedTuple):
    """Encoded instances, padded on the right.

    It needs no attention mask: causality hides the padding.
    """

    input_ids: IntArray
    """(B, T)."""
    targets: IntArray
    """(B, T), what the output at each position must predict; -100 where there is no loss term."""
    num_text: int
    """Text tokens, padding left out."""
    num_meta: int
    """Meta-tokens."""
    position_ids: IntArray | None = None
    """(B, T), where tokens stand; None if positions count them."""

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Loss terms of the batch."""
        return int(np.count_nonzero(self.targets != IGNORE_INDEX))

    def to_model_inputs(self, rows: slice = slice(None), device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Return the model's keyword arguments for some rows: input_ids, shift_labels, and positions that do not count.

        The mask that comes with such positions says that a row is one document, however often they start anew.
        """
        import torch

        arrays = {"input_ids": self.input_ids[rows], "shift_labels": self.targets[rows]}
        if self.position_ids is not None:
            arrays["position_ids"] = self.position_ids[rows]
            arrays["attention_mask"] = np.ones_like(arrays["input_ids"])
        return {name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in arrays.items()}


def encode_instance(
    instance: Instance,
    task: Task,
    *,
    encoder: PieceEncoder,
    meta_token_id: int,
    loss_policy: LossPolicy = "skip",
) -> EncodedInstance:
    """Return the tokens of an instance with its meta-tokens, and the targets of the loss.

    With the text a b, the answer c d, and meta-tokens _ before b and before c:

        input_ids                a  _  b  _  c  d
        targets, answer, skip    .  .  .  c  d  .
        targets, full, skip      .  b  .  c  d  .
        targets, full, retarget  b  .  c  .  d  .

    The first text token is never a target, and nothing follows the last one.

    Args:
        instance: Of this task.
        task: Gives `meta_places` and `loss`.
        encoder: Gives the ids.
        meta_token_id: The id to put at meta-tokens.
        loss_policy: skip: a token is predicted from the position right before it, which may be a meta-token;
            retarget: from the last text token before it.

    Raises:
        UsageError: An answer has other tokens after its prompt than alone.
    """
    text_ids, is_target, spans, meta_places = _lay_out(instance, encoder)
    prompt_length = spans[-1][0]
    if task.meta_places.kind in ("uniform", "periodic"):
        meta_places = _place_anywhere(task.meta_places, text_ids, spans, instance.key)
    elif task.meta_places.kind == "none":
        meta_places = []
    if task.loss == "full":
        is_target = np.ones(len(text_ids), dtype=np.bool_)
        is_target[0] = False
    # positions of the text tokens, once a meta-token stands before text token p for each p in meta_places
    text_positions = np.arange(len(text_ids)) + np.searchsorted(meta_places, np.arange(len(text_ids)), side="right")
    input_ids = np.full(len(text_ids) + len(meta_places), meta_token_id, dtype=np.int64)
    input_ids[text_positions] = text_ids
    targets = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int64)
    predicted = np.flatnonzero(is_target)
    sources = text_positions[predicted] - 1 if loss_policy == "skip" else text_positions[predicted - 1]
    targets[sources] = text_ids[predicted]
    return EncodedInstance(
        input_ids,
        targets,
        tuple((int(text_positions[start]), int(text_positions[start]) + stop - start) for start, stop in spans),
        prompt_length,
        tuple(encoder.ids(choice) for choice in instance.choices),
        chance_of(instance, task),
        _couple(couple_tokens(instance, task, encoder), text_positions, len(input_ids)),
    )


def _couple(groups: IntArray | None, text_positions: IntArray, length: int) -> IntArray | None:
    """Return the group of each of T tokens: a meta-token's is that of the text token before it."""
    if groups is None:
        return None
    before = np.searchsorted(text_positions, np.arange(length), side="right") - 1
    return np.where(before >= 0, groups[before], 0)


def pad(
    encoded: Sequence[EncodedInstance], *, meta_token_id: int, pad_token_id: int, starts: Sequence[int] | None = None
) -> RecallBatch:
    """Put encoded instances into one batch, padded on the right to the longest.

    Args:
        encoded: The instances.
        meta_token_id: For the number of meta-tokens.
        pad_token_id: The id of padding.
        starts: What is added to the groups of each row, where positions are coupled; 0 by default.

    Raises:
        ValueError: No row, or padding that would count as a meta-token.
    """
    if not encoded:
        raise ValueError("a batch needs at least one instance")
    if pad_token_id == meta_token_id:
        raise ValueError(f"pad_token_id must differ from meta_token_id {meta_token_id}")
    lengths = np.array([len(row.input_ids) for row in encoded])
    is_token = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(is_token.shape, pad_token_id, dtype=np.int64)
    input_ids[is_token] = np.concatenate([row.input_ids for row in encoded])
    targets = np.full(is_token.shape, IGNORE_INDEX, dtype=np.int64)
    targets[is_token] = np.concatenate([row.targets for row in encoded])
    num_meta = int(np.count_nonzero(input_ids == meta_token_id))
    position_ids = None
    if encoded[0].groups is not None:
        position_ids = np.zeros(is_token.shape, dtype=np.int64)
        placed = [
            np.where(row.groups, row.groups + start, 0)
            for row, start in zip(encoded, starts or [0] * len(encoded), strict=True)
            if row.groups is not None
        ]
        position_ids[is_token] = np.concatenate(placed)
    return RecallBatch(input_ids, targets, int(lengths.sum()) - num_meta, num_meta, position_ids)


def _lay_out(instance: Instance, encoder: PieceEncoder) -> tuple[IntArray, BoolArray, list[tuple[int, int]], list[int]]:
    """Return the text's ids, which of them are answers, the answers' spans, and the token after each META."""
    ids: list[int] = []
    offsets: list[int] = []
    meta_places: list[int] = []
    for piece in instance.pieces:
        offsets.append(len(ids))
        if piece == META:
            meta_places.append(len(ids))
        ids += encoder.ids(piece)
    offsets.append(len(ids))
    is_answer = np.zeros(len(ids), dtype=np.bool_)
    spans = []
    for start, stop in instance.answer_pieces:
        before = next(piece for piece in reversed(instance.pieces[:start]) if piece != META)
        encoder.check_answer(before, "".join(instance.pieces[start:stop]))
        spans.append((offsets[start], offsets[stop]))
        is_answer[offsets[start] : offsets[stop]] = True
    return np.array(ids, dtype=np.int64), is_answer, spans, meta_places


def _place_anywhere(
    places: UniformPlaces | PeriodicPlaces, text_ids: IntArray, spans: Sequence[tuple[int, int]], key: int
) -> list[int]:
    """Return the text token before which each meta-token stands, ascending; never inside or right after an answer.

    The positions are drawn over the text without its answers, so neither their number nor their places depend on
    what the answers are. A meta-token between a question and the text after its answer stands before the answer.
    """
    is_prompt = np.ones(len(text_ids), dtype=np.bool_)
    for start, stop in spans:
        is_prompt[start:stop] = False
    prompt = np.flatnonzero(is_prompt)
    if places.kind == "periodic":
        every = places.every
        if not isinstance(every, int):
            every = KeyedRandom(int(hash_key(key, Purpose.META_PERIOD)[0])).between(*every)
        return [int(token) + 1 for token in prompt[every - 1 :: every] if token + 1 < len(text_ids)]
    # the row holds the numbers of its tokens, so -1 is free to stand for a meta-token
    row = inject_into_prompt(prompt.tolist(), UniformInjection(ratio=places.meta_ratio), meta_token_id=-1, seed=key)
    meta_places, place = [], 0
    for token in row:
        if token < 0:
            meta_places.append(place)
        else:
            place = token + 1
    return meta_places
