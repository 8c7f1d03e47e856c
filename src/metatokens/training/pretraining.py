"""Pre-training: it feeds verified tokens, with meta-tokens injected at load time, into the training loop."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from metatokens.config.schema import PretrainConfig, TokenRunConfig
from metatokens.data.loader import Batch, BatchLoader, TokenBlocks
from metatokens.data.shards import Split, TokenDataset, require_path
from metatokens.data.tokenizer import build_hf_tokenizer, ends_clause_table
from metatokens.evaluation.extrapolation import texts_of
from metatokens.generation.decoding import schedule_for
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.schedule import state_schedule
from metatokens.training.distributed import Processes, join_processes
from metatokens.training.initialization import build_model, build_model_on_meta_device
from metatokens.training.loading import ModelFolder
from metatokens.training.loop import check_start, train
from metatokens.training.model_card import Training
from metatokens.training.result import TrainingResult
from metatokens.training.resuming import BYTES_PER_PARAMETER_OF_CHECKPOINT, Resume
from metatokens.training.run_folder import RunFolder
from metatokens.training.setup import TrainingSetup, count_batch_flops
from metatokens.training.signals import collect_stop_signals
from metatokens.training.starting import check_tokenizer, load_start

MANY_PASSES = 1_000
"""Passes over a text from which on a dry run warns; more than 40 gain nothing (Muennighoff et al. 2023)."""

AnyConfig = TypeVar("AnyConfig", bound=TokenRunConfig)


def pretrain(
    config: PretrainConfig,
    out: str | Path,
    *,
    show_progress: bool = True,
    label: str = "",
    stop_after: float | None = None,
    resume: str | Path | None = None,
    allow_change: Sequence[str] = (),
) -> TrainingResult:
    """Train the model of `config` into the run folder `out`; continue from its last checkpoint, if any.

    Under torchrun every process calls this. For signals and errors see `metatokens.training.loop.train`.

    Args:
        config: the run.
        out: its folder.
        show_progress: whether to show progress on standard error.
        label: name of the run there; by default that of the folder.
        stop_after: seconds from now after which the run saves and ends as by a signal.
        resume: checkpoint to continue from, in place of the newest of `out`; it must be whole, and no other is taken.
        allow_change: keys of the schedule that may differ from those that the run was made with, such as
            `optimizer.learning_rate`.
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


def train_on_tokens(
    config: AnyConfig,
    out: str | Path,
    make_job: Callable[[AnyConfig, TokenDataset, Processes], TrainingSetup],
    *,
    show_progress: bool,
    label: str,
    stop_after: float | None,
    resume: str | Path | None,
    allow_change: Sequence[str],
) -> TrainingResult:
    """Train what `make_job` makes of a config and of the verified tokens that it names; see `pretrain`."""
    with (
        collect_stop_signals(stop_after) as stop,
        join_processes(config.training) as processes,
        contextlib.ExitStack() as stack,
    ):
        with processes.raise_together():
            dataset = stack.enter_context(open_dataset(config, verify="size"))

        def make_verified_job() -> TrainingSetup:
            if config.data.verify == "full":  # of many shards this takes minutes
                dataset.verify_hashes(processes.node_share)
            return make_job(config, dataset, processes)

        folder = RunFolder(Path(out))
        return train(
            config,
            folder,
            processes,
            make_verified_job,
            stop=stop,
            show_progress=show_progress,
            label=label,
            resume=Resume.of(resume, allow_change),
        )


def plan(
    config: PretrainConfig, out: str | Path, *, resume: str | Path | None = None, allow_change: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the plan of a run, for `--dry-run`: sizes, steps, tokens and passes over the text.

    Raises:
        UsageError, DataError, CheckpointError, ResourceError: the errors that the run would raise before its first
            step.
    """
    job, rows = plan_on_tokens(config, out, _make_job, resume=resume, allow_change=allow_change)
    num_meta = config.data.block_size - config.text_tokens_per_block
    return {
        "parameters": job.model.num_parameters(),
        "meta_tokens_per_step": num_meta * config.training.batch_blocks,
        **rows,
    }


def plan_on_tokens(
    config: AnyConfig,
    out: str | Path,
    make_job: Callable[[AnyConfig, TokenDataset, Processes], TrainingSetup],
    *,
    resume: str | Path | None,
    allow_change: Sequence[str],
) -> tuple[TrainingSetup, dict[str, Any]]:
    """Return what `train_on_tokens` would train, and the part of its plan that any run on tokens has; see `plan`."""
    with join_processes(config.training) as processes, open_dataset(config) as dataset:
        job = make_job(config, dataset, processes)
        check_start(config, RunFolder(Path(out)), job, Resume.of(resume, allow_change))
        num_blocks = len(TokenBlocks(dataset, "train", config.text_tokens_per_block))
    steps, blocks, text = config.total_steps, config.training.batch_blocks, config.text_tokens_per_block
    passes = blocks * steps / num_blocks
    if passes >= MANY_PASSES:
        warnings.warn(
            f"the run reads the same {num_blocks * text:,} text tokens {passes:,.0f} times and will know them by "
            f"heart: prepare more text, or lower the number of steps, {steps:,}",
            stacklevel=3,
        )
    return job, {
        "steps": steps,
        "text_tokens_per_step": text * blocks,
        "text_tokens": text * blocks * steps,
        "passes_over_the_text": passes,
        "checkpoint_bytes": job.model.num_parameters() * BYTES_PER_PARAMETER_OF_CHECKPOINT,
    }


def first_batch(config: PretrainConfig) -> tuple[Any, Tokenizer, Batch]:
    """Return the run's model without its weights, on the meta device, its text tokenizer, and its first batch."""
    with open_dataset(config) as dataset:
        model = build_model_on_meta_device(config.model, **vocabulary(dataset))
        loader = _loader(config, dataset, "train", batch_blocks=config.training.batch_blocks)
        return model, dataset.tokenizer(), loader.batch_at(0)


def open_dataset(config: TokenRunConfig, *, verify: Literal["full", "size"] | None = None) -> TokenDataset:
    """Open the tokens that `config` names, and verify them as it says or as the caller does."""
    return TokenDataset.open(require_path(config.data.path), verify=verify or config.data.verify)


def vocabulary(dataset: TokenDataset) -> dict[str, int]:
    """Return the arguments of `build_model` that come from the tokens."""
    return {"text_vocab_size": dataset.vocab_size, "eos_token_id": dataset.eos_token_id}


def _make_model(
    config: PretrainConfig, dataset: TokenDataset, processes: Processes
) -> tuple[MetaTokenForCausalLM, str]:
    """Return the model that a run starts from, and the identity of its tokens and of its weights unless new."""
    model = build_model(config.model, **vocabulary(dataset), seed=config.seed)
    state_schedule(model.generation_config, schedule_for(config.injection))
    if config.start_from is None:
        return model, dataset.content_id
    folder = ModelFolder(config.start_from)
    check_tokenizer(folder, dataset.manifest.tokenizer_sha256, dataset.path)
    return model, f"{dataset.content_id}+{load_start(folder, model, config.model, share=processes.node_share)}"


def _make_job(config: PretrainConfig, dataset: TokenDataset, processes: Processes) -> TrainingSetup:
    model, content_id = _make_model(config, dataset, processes)
    return TrainingSetup(
        model=model,
        tokenizer=build_hf_tokenizer(dataset.tokenizer()),
        content_id=content_id,
        made=Training("pretrain", data=dataset.manifest.source, base_model=str(config.start_from or "")),
        batches=_loader(
            config,
            dataset,
            "train",
            batch_blocks=config.training.batch_blocks,
            rank=processes.rank,
            world_size=processes.world_size,
        ),
        count_flops=lambda batch: count_batch_flops(model, batch),
        evaluate=None if config.evaluation.interval_steps is None else evaluation_of(config, dataset, processes, model),
        evaluation_steps=config.evaluation.interval_steps,
    )


def _loader(config: PretrainConfig, dataset: TokenDataset, split: Split, **share: int) -> BatchLoader:
    return BatchLoader(
        TokenBlocks(dataset, split, config.text_tokens_per_block),
        injection=config.injection,
        block_size=config.data.block_size,
        seed=config.seed,
        meta_token_id=dataset.vocab_size,
        loss_policy=config.model.loss_policy,
        ends_clause=ends_clause_table(dataset.tokenizer()) if config.injection.follows_punctuation else None,
        reconstruct=config.reconstruct if split == "train" else None,
        **share,
    )


def evaluation_of(
    config: PretrainConfig, dataset: TokenDataset, processes: Processes, model: Any
) -> Callable[[], dict[str, tuple[float, float]]]:
    """Return what measures the mean loss over the first blocks of the validation split, injected as in training."""
    loader = _loader(config, dataset, "validation", batch_blocks=1)

    def loss(**inputs: Tensor) -> dict[str, Tensor]:
        with texts_of(model, inputs["input_ids"].shape[1]):
            return {"validation_loss": model(**inputs, use_cache=False, num_items_in_batch=1, logits_to_keep=1).loss}

    return partial(sum_over_validation, config, processes, loader, loss, names=("validation_loss",))


def sum_over_validation(
    config: TokenRunConfig,
    processes: Processes,
    batches: Any,
    measure: Callable[..., Mapping[str, Tensor]],
    *,
    names: Sequence[str],
) -> dict[str, tuple[float, float]]:
    """Return sums over this process's share of the first validation blocks, and the number of their text tokens.

    Every evaluation uses the same blocks with the same draws, whatever the micro-batch and the number of processes.

    Args:
        config: says how many blocks there are, and how they are read.
        processes: which share them.
        batches: the loader of the validation split, or what has its `blocks` and `make_batch`.
        measure: maps the model's keyword arguments for some blocks to their sums, by name.
        names: of the sums.
    """
    num_blocks = min(config.evaluation.blocks, len(batches.blocks))
    # shares may differ by a block, or be empty: processes only add up their sums
    sample_ids = np.arange(num_blocks)[processes.rank :: processes.world_size]
    device, rows = processes.device, config.training.micro_batch_blocks
    bfloat16 = config.training.precision == "bfloat16"
    totals, count = dict.fromkeys(names, 0.0), 0
    for start in range(0, len(sample_ids), rows):
        batch = batches.make_batch(sample_ids[start : start + rows], epochs=0)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            sums = measure(**batch.to_model_inputs(device=device))
        for name in names:
            totals[name] += float(sums[name])
        count += batch.num_targets
    return {name: (total, count) for name, total in totals.items()}
