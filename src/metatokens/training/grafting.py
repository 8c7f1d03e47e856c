"""Training of a graft: verified tokens of plain text through the training loop, for the new parts of a frozen decoder.

The model puts its anchors into the text by itself, so batches are those of pre-training without meta-tokens, each with
the positions at which it is compared with its own predictions under full attention.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer

from metatokens.config.grafting import GraftRunConfig, NeedlesConfig
from metatokens.config.schema import NoInjection, UniformInjection
from metatokens.data.injection import InjectedBatch, IntArray, sample_meta_positions
from metatokens.data.loader import Batches, BatchLoader, TokenBlocks
from metatokens.data.shards import Split, TokenDataset
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.graft import graft
from metatokens.graft.costs import step_flops, step_memory
from metatokens.graft.saving import describe_base
from metatokens.graft.student import Student
from metatokens.training.distributed import Processes
from metatokens.training.loading import ModelFolder
from metatokens.training.model_card import Training
from metatokens.training.needles import Needles
from metatokens.training.pretraining import plan_on_tokens, sum_over_validation, train_on_tokens
from metatokens.training.result import TrainingResult
from metatokens.training.setup import TrainingSetup
from metatokens.training.starting import check_tokenizer


def train_graft(
    config: GraftRunConfig,
    out: str | Path,
    *,
    show_progress: bool = True,
    label: str = "",
    stop_after: float | None = None,
    resume: str | Path | None = None,
    allow_change: Sequence[str] = (),
) -> TrainingResult:
    """Graft `config.base` and train what is new into the run folder `out`; continue from its last checkpoint, if any.

    Under torchrun every process calls this. For the arguments see `metatokens.training.pretraining.pretrain`, for
    signals and errors `metatokens.training.loop.train`.
    """
    return train_on_tokens(
        config,
        out,
        _make_job,
        show_progress=show_progress,
        label=label,
        stop_after=stop_after,
        resume=resume,
        allow_change=allow_change,
    )


def plan(
    config: GraftRunConfig, out: str | Path, *, resume: str | Path | None = None, allow_change: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the plan of a run, for `--dry-run`; the weights of the base are not opened.

    Raises:
        UsageError, DataError, CheckpointError, ResourceError: the errors that the run would raise before its first
            step, but for those of the weights.
    """
    make_job = partial(_make_job, without_weights=True)
    job, rows = plan_on_tokens(config, out, make_job, resume=resume, allow_change=allow_change)
    trained, memory = job.model.num_parameters(), step_memory(job.model.wrapped, config)
    return {
        "parameters_of_the_base": sum(p.numel() for p in job.model.parameters()) - trained,
        "trained_parameters": trained,
        "anchors_per_step": config.training.batch_blocks * config.anchors_per_block,
        **rows,
        "estimated_gpu_bytes": sum(memory.values()),
        **{f"estimated_gpu_bytes_of_{name}": size for name, size in memory.items()},
    }


def _make_job(
    config: GraftRunConfig, dataset: TokenDataset, processes: Processes, *, without_weights: bool = False
) -> TrainingSetup:
    if config.base is None:
        raise UsageError("base", expected="a decoder to graft", found="none", remedy="name its folder or its hub id")
    folder = ModelFolder(Path(config.base))
    check_tokenizer(folder, dataset.manifest.tokenizer_sha256, dataset.path)
    dtype = getattr(torch, config.base_dtype)
    model = folder.build_plain_on_meta_device(dtype) if without_weights else folder.open_plain(dtype)
    _check_positions(model, config)
    # a folder is named so that the adapter finds it from anywhere
    name = str(folder.name.absolute()) if folder.name.exists() else str(folder.name)
    base = {} if without_weights else describe_base(model, name)
    student = Student(graft(model.train(), config.graft.build()), config.objectives, base)
    batches = _batches(
        config,
        dataset,
        "train",
        batch_blocks=config.training.batch_blocks,
        needles=config.needles,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    flops = step_flops(model, config)
    return TrainingSetup(
        model=student,
        tokenizer=AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False),
        content_id=f"{dataset.content_id}+{folder.sha256}",
        made=Training("graft", data=dataset.manifest.source, base_model=config.base),
        batches=batches,
        count_flops=lambda batch: batch.num_rows * flops,
        evaluate=None
        if config.evaluation.interval_steps is None
        else _evaluation_of(config, dataset, processes, student),
        evaluation_steps=config.evaluation.interval_steps,
    )


def _check_positions(model: Any, config: GraftRunConfig) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.data.block_size > limit:
        raise UsageError(
            f"data.block_size {config.data.block_size}",
            expected=f"at most the {limit} positions of {config.base}",
            found=str(config.data.block_size),
            remedy="lower data.block_size, which anchors do not lengthen",
        )


class GraftBatch(NamedTuple):
    """Blocks of text, and the positions that are compared in each."""

    text: InjectedBatch
    sampled: IntArray
    """(B, P) int64, rising."""
    num_meta: int
    """Anchors that the model adds."""
    answers: IntArray | None = None
    """(B, T), the targets that answer a question, -100 elsewhere; None without needles."""

    @property
    def input_ids(self) -> IntArray:
        """(B, T)."""
        return self.text.input_ids

    @property
    def num_rows(self) -> int:
        """B."""
        return self.text.num_rows

    @property
    def num_targets(self) -> int:
        """Positions of text, each of which has a target."""
        return self.text.num_targets

    @property
    def num_text(self) -> int:
        """Text tokens."""
        return self.text.num_text

    def to_model_inputs(self, rows: slice = slice(None), device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """Return the keyword arguments of a `Student` for some rows."""
        arrays = (
            {"sampled": self.sampled} if self.answers is None else {"sampled": self.sampled, "answers": self.answers}
        )
        own = {name: torch.from_numpy(array[rows]).to(device, non_blocking=True) for name, array in arrays.items()}
        return {**self.text.to_model_inputs(rows, device), **own}


class GraftBatches(Batches):
    """The batches of a loader of plain text, each with drawn positions and with needles, if any: by step alone."""

    def __init__(self, loader: BatchLoader, config: GraftRunConfig, needles: Needles | None) -> None:
        """Take the loader."""
        self.loader, self._config, self._needles = loader, config, needles

    @property
    def blocks(self) -> TokenBlocks:
        """The text."""
        return self.loader.blocks

    def batch_at(self, step: int) -> GraftBatch:
        """Return this rank's rows of global batch `step`."""
        return self.make_batch(*self.loader.samples_at(step))

    def make_batch(self, sample_ids: IntArray, epochs: IntArray | int) -> GraftBatch:
        """Return the given blocks (B,) with the positions that they have in the given epochs."""
        size, config = self._config.data.block_size, self._config
        # a subset of P positions, as meta-tokens are drawn in pre-training; this text has none
        sampled = sample_meta_positions(
            UniformInjection(ratio=config.sampled_positions / size),
            sample_ids=sample_ids,
            block_size=size,
            seed=config.seed,
            epoch=epochs,
        )
        text, answers = self.loader.make_batch(sample_ids, epochs), None
        if self._needles is not None:
            blocks = np.concatenate([text.input_ids, text.targets[:, -1:]], axis=1)
            blocks, answers = self._needles.hide(blocks, sample_ids=sample_ids, epochs=epochs)
            text = text._replace(input_ids=blocks[:, :-1], targets=blocks[:, 1:])
        return GraftBatch(text, sampled, len(sample_ids) * config.anchors_per_block, answers)

    def sample_ids(self, step: int) -> list[int]:
        """Return the blocks of global batch `step`, of all ranks."""
        return self.loader.sample_ids(step)


def _batches(
    config: GraftRunConfig,
    dataset: TokenDataset,
    split: Split,
    *,
    batch_blocks: int,
    needles: NeedlesConfig | None,
    rank: int = 0,
    world_size: int = 1,
) -> GraftBatches:
    loader = BatchLoader(
        TokenBlocks(dataset, split, config.data.block_size),
        injection=NoInjection(),
        block_size=config.data.block_size,
        seed=config.seed,
        meta_token_id=dataset.vocab_size,
        loss_policy="skip",
        reconstruct=config.reconstruct if split == "train" else None,
        batch_blocks=batch_blocks,
        rank=rank,
        world_size=world_size,
    )
    if needles is None:
        return GraftBatches(loader, config, None)
    encoder, size = TextEncoder(dataset.tokenizer(), threads=1), config.data.block_size
    hidden = Needles(needles, encoder=encoder, window=config.graft.window, block_size=size, seed=config.seed)
    return GraftBatches(loader, config, hidden)


def _evaluation_of(
    config: GraftRunConfig, dataset: TokenDataset, processes: Processes, model: Student
) -> Callable[[], dict[str, tuple[float, float]]]:
    """Return what measures every objective over the first blocks of the validation split.

    The text is plain; with needles the same blocks are read once more, with a needle in each, for its answer alone.
    """
    text = {"validation_loss": "language_model", "validation_distillation": "distillation"}
    passes = [(_batches(config, dataset, "validation", batch_blocks=1, needles=None), text)]
    if config.needles is not None:
        each = config.needles.model_copy(update={"share": 1.0})
        asking = _batches(config, dataset, "validation", batch_blocks=1, needles=each)
        passes.append((asking, {"validation_needles": "needles"}))

    def measure() -> dict[str, tuple[float, float]]:
        sums: dict[str, tuple[float, float]] = {}
        for batches, objectives in passes:
            sums |= sum_over_validation(config, processes, batches, partial(parts, objectives), names=list(objectives))
        return sums

    def parts(objectives: Mapping[str, str], **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        found = model(**inputs).parts
        return {name: found[objective] for name, objective in objectives.items()}

    return measure
