"""The training loop: from batches to a Hugging Face checkpoint, for pre-training and fine-tuning alike.

An optimizer step counts the valid targets of all its micro-batches and processes and divides every micro-batch's
summed loss by that count. It changes nothing if the loss or gradient is not finite. Learning rate and batches are
functions of the step, so a run that was killed continues to the bit from its last checkpoint. A `TrainingSetup` holds
the model, the batches and the evaluation of a run; `pretraining.py` and `finetuning.py` make it.
"""

import contextlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metatokens.baselines.pretrained import PretrainedCausalLM
from metatokens.config.finetuning import SolveConfig
from metatokens.config.schema import RunConfig
from metatokens.data.keyed_random import Purpose, hash_key
from metatokens.data.loader import Batch, Batches
from metatokens.errors import CheckpointError, DataError, NumericError, Preempted, ResourceError
from metatokens.model.accounting import training_flops
from metatokens.model.export import save_model
from metatokens.storage import new_folder, remove_leftovers, to_json, write_atomically
from metatokens.training.checkpoint import (
    TrainingState,
    describe_newest,
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    write_manifest,
)
from metatokens.training.distributed import Processes
from metatokens.training.metrics import MetricsWriter, ProgressDisplay, check_trackers
from metatokens.training.model_card import Training, write_model_card
from metatokens.training.optimizer import build_optimizer, learning_rate_at
from metatokens.training.run_folder import RunFolder, differences_from_checkpoint, run_sha256
from metatokens.training.signals import collect_stop_signals

MAX_CONSECUTIVE_SKIPS = 3
BYTES_PER_PARAMETER_OF_CHECKPOINT = 12  # float32 weight and two moments


@dataclass(frozen=True)
class TrainingSetup:
    """The model, the batches and the evaluation of a run."""

    model: Any
    """On this process's device, in training mode, with the weights that the run starts from."""
    tokenizer: Any
    """Saved with every checkpoint."""
    content_id: str
    """Identity of the data, and of the initial weights unless they are new; a run never continues on others."""
    made: Training
    """For the model card: the verb, what it reads and what it starts from."""
    batches: Batches
    count_flops: Callable[[Batch], int]
    """Returns the floating-point operations of the forward and backward pass over a batch."""
    evaluate: Callable[[], dict[str, float]] | None = None
    """Called by every process, without gradients, with the model in evaluation mode; None means no evaluation."""
    evaluation_steps: int | None = None
    """Optimizer steps between evaluations; one more after the last step."""
    solve: SolveConfig | None = None
    """Ends the run once the sequence accuracy of `evaluate` has been high enough; None means after the last step."""


@dataclass(frozen=True)
class TrainingResult:
    """The measurements of a finished run."""

    run: str
    model: str
    num_parameters: int
    steps: int
    text_tokens: int
    meta_tokens: int
    training_flops: float
    """Operations of forward and backward passes, counted, not measured; see `metatokens.model.accounting`."""
    final_loss: float | None
    """Mean training loss of the last step, nats per target; None if there was no step."""
    validation: dict[str, float]
    """The last evaluation; empty if there was none."""
    text_tokens_per_second: float | None
    """Mean over the steps since the run last started, without evaluation and saving; None without a step."""
    meta_tokens_per_second: float | None
    waited_for_batches: float
    """Time spent waiting for the loader, as a share of the training time."""
    solved: bool | None = None
    """Whether the run ended because its task was solved, after `steps`; None if it does not stop for that."""


def train(
    config: RunConfig,
    folder: RunFolder,
    processes: Processes,
    make_job: Callable[[], TrainingSetup],
    *,
    show_progress: bool = True,
    label: str = "",
) -> TrainingResult:
    """Run a training job in a run folder; continue from its last checkpoint, if any.

    The first signal that would end the process ends the run after the current step, with a checkpoint; see
    `metatokens.training.signals`.

    Raises:
        UsageError, DataError, CheckpointError, NumericError, ResourceError: see `metatokens.errors`.
        Preempted: after a signal, when the checkpoint is safe.
    """
    with contextlib.ExitStack() as stack:
        with processes.raise_together():
            if processes.is_main:
                stack.enter_context(folder.locked())
                folder.check_config(config)
                remove_leftovers(folder.path)
                remove_leftovers(folder.checkpoints_path)
        with processes.raise_together():
            run = _Run(config, make_job(), folder, processes)
        return run.train(show_progress=show_progress, label=label or folder.path.name)


def check_start(config: RunConfig, folder: RunFolder, job: TrainingSetup) -> None:
    """Raise the errors that `train` would before its first step, except for a held lock; write nothing."""
    folder.check_writable()
    folder.check_config(config)
    check_trackers(config.logging.trackers)
    _find_start(config, folder, job)
    _check_disk(folder, job.model.num_parameters())


def count_batch_flops(model: Any, batch: Batch) -> int:
    """Count the operations of a training step over a batch, including those spent on padding."""
    count = model.training_flops if isinstance(model, PretrainedCausalLM) else partial(training_flops, model.config)
    num_positions = batch.input_ids.shape[1]
    num_meta = round(batch.num_meta / batch.num_rows)
    num_logits = round(batch.num_targets / batch.num_rows)
    flops: int = count(num_positions=num_positions, num_meta=num_meta, num_logits=num_logits)
    return batch.num_rows * flops


class _Run:
    """A run in progress, with everything that a step needs."""

    def __init__(self, config: RunConfig, job: TrainingSetup, folder: RunFolder, processes: Processes) -> None:
        self.config, self.job, self.folder, self.processes = config, job, folder, processes
        self.model = job.model
        if processes.is_main:
            _check_disk(folder, self.model.num_parameters())
        if config.training.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        checkpoint, state = _find_start(config, folder, job)
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.model, self.optimizer)
        self.state = replace(state, config=config.model_dump(mode="json"), run_sha256=None)
        self.has_dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules()) or bool(
            getattr(self.model.config, "attention_dropout", 0)
        )

    # Training ------------------------------------------------------------------------------------------------

    def train(self, *, show_progress: bool, label: str) -> TrainingResult:
        config, total = self.config, self.config.total_steps
        start, seconds, loss = self.state, 0.0, None
        first, metrics = start.step, None
        validation: dict[str, float] = {}
        shown = show_progress and self.processes.is_main
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(collect_stop_signals())
            with self.processes.raise_together():
                if self.processes.is_main:
                    metrics = MetricsWriter(
                        self.folder.metrics_path, config.logging.trackers, config.model_dump(mode="json")
                    )
                    stack.callback(metrics.close)
                    self.folder.write_config(config)
            wrapped = self.processes.wrap(self.model)
            self.step_model: Any = torch.compile(wrapped) if config.training.compile else wrapped
            display = stack.enter_context(ProgressDisplay(label, start=first, total=total, shown=shown))
            if first:
                display.say(f"{label} continues after step {first}")
            self._settle_buckets(first)
            batches = stack.enter_context(contextlib.closing(self.job.batches.prefetch(first, total)))
            while not self._is_over:
                step, started = self.state.step, time.perf_counter()
                loss, grad_norm, stopping = self._step(step, next(batches), stopping=bool(stop))
                seconds += time.perf_counter() - started
                if _due(step + 1, config.logging.interval_steps, total):
                    rates = self._rates(start, seconds)
                    self._log(step, loss, grad_norm, rates, display=display, metrics=metrics)
                if self.job.evaluate and _due(step + 1, self.job.evaluation_steps, total):
                    validation = self._evaluate(self.job.evaluate)
                    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in validation.items())
                    display.say(f"{label} step {step + 1} {figures}")
                    if metrics:
                        metrics.write(step + 1, **validation)
                if _due(step + 1, config.checkpoint.interval_steps, total) or stopping or self._is_over:
                    self._save()
                if stopping and not self._is_over:
                    raise Preempted(f"stopped by a signal after step {step + 1}; the same command continues from there")
        self._check_end()
        result = self._result(start, seconds, loss, validation)
        self._finish(result)
        if first < self.state.step:
            return result
        measured = json.loads(self.folder.result_path.read_text())
        return TrainingResult(**{**measured, "run": result.run, "model": result.model})

    def _log(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        rates: tuple[float, float],
        *,
        display: ProgressDisplay,
        metrics: MetricsWriter | None,
    ) -> None:
        text_rate, meta_rate = rates
        display.update(step + 1, f"loss {loss:.3f}  {text_rate:,.0f} text + {meta_rate:,.0f} meta tokens/s")
        if metrics:
            metrics.write(
                step + 1,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=self._learning_rate(step),
                skipped_steps=self.state.skipped_steps,
                text_tokens_per_second=text_rate,
                meta_tokens_per_second=meta_rate,
            )

    def _step(self, step: int, batch: Batch, *, stopping: bool) -> tuple[float, float, bool]:
        """Do one optimizer step; return mean loss and gradient norm over all processes, and whether to stop."""
        counts = (batch.num_targets, stopping, batch.num_text, batch.num_meta, self.job.count_flops(batch))
        num_targets, stop, num_text, num_meta, flops = self.processes.sum(*map(float, counts))
        device, world_size = self.processes.device, self.processes.world_size
        rows = min(self.config.training.micro_batch_blocks, batch.num_rows)
        micro_batches = [batch.to_model_inputs(slice(i, i + rows), device) for i in range(0, batch.num_rows, rows)]
        self._seed_dropout(step)
        total = torch.zeros((), device=device)
        for index, inputs in enumerate(micro_batches):
            last = index + 1 == len(micro_batches)
            with contextlib.nullcontext() if last or world_size == 1 else self.step_model.no_sync():
                # DDP averages over processes, so the sum is divided by the targets of an average process
                part = self._forward(inputs, num_targets / world_size)
                part.backward()
            total += part.detach() / world_size
        grad_norm = float(
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.gradient_clip or float("inf"))
        )
        loss = self.processes.sum(float(total))[0]
        # every process decides the same, because gradients are averaged and the loss is summed over processes
        if math.isfinite(grad_norm) and math.isfinite(loss):
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            self.optimizer.step()
            self.state = replace(self.state, consecutive_skips=0)
        else:
            self._skip(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.state = replace(
            self.state,
            step=step + 1,
            world_size=world_size,
            text_tokens=self.state.text_tokens + int(num_text),
            meta_tokens=self.state.meta_tokens + int(num_meta),
            training_flops=self.state.training_flops + flops,
        )
        return loss, grad_norm, bool(stop)

    def _forward(self, inputs: dict[str, Tensor], num_targets: float) -> Tensor:
        bfloat16 = self.config.training.precision == "bfloat16"
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=bfloat16):
            loss: Tensor = self.step_model(**inputs, use_cache=False, num_items_in_batch=num_targets).loss
        return loss

    def _skip(self, step: int) -> None:
        """Count a step that changes nothing because its loss or its gradient is not finite."""
        warnings.warn(f"step {step} changes nothing: its loss or its gradient is not finite", stacklevel=2)
        skips = self.state.consecutive_skips + 1
        self.state = replace(self.state, skipped_steps=self.state.skipped_steps + 1, consecutive_skips=skips)
        if skips > MAX_CONSECUTIVE_SKIPS:
            raise self._diverged(f"step {step}", "a finite loss and gradient", f"{skips} steps in a row without")

    def _check_end(self) -> None:
        """Refuse to end as a success a run whose last steps changed nothing."""
        if skips := self.state.consecutive_skips:
            raise self._diverged("end of the run", "a finite loss and gradient", f"none in the last {skips} steps")

    def _diverged(self, where: str, expected: str, found: str) -> NumericError:
        kept = describe_newest(self.folder.checkpoints_path)
        return NumericError(
            where, expected=expected, found=found, remedy=f"lower optimizer.learning_rate, with another --out; {kept}"
        )

    def _seed_dropout(self, step: int) -> None:
        """Seed dropout by step and process, so that a resumed run draws the same masks."""
        if self.has_dropout:
            key = hash_key(self.config.seed, step, self.processes.rank, Purpose.DROPOUT)
            torch.manual_seed(int(key[0] >> 1))

    def _settle_buckets(self, step: int) -> None:
        """Run one backward pass for DDP and drop its gradients.

        After its first backward pass DDP regroups the gradients, which changes the order in which three or more
        processes add them up. If it regroups before the first step, a resumed run equals an uninterrupted one to the
        bit.
        """
        if self.processes.world_size == 1 or step == self.config.total_steps:
            return
        rows = slice(0, self.config.training.micro_batch_blocks)
        self._forward(self.job.batches.batch_at(step).to_model_inputs(rows, self.processes.device), 1.0).backward()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _evaluate(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        self.model.eval()
        figures = evaluate()
        self.model.train()
        for name, value in figures.items():
            if not math.isfinite(value):
                where = f"evaluation after step {self.state.step}"
                raise self._diverged(where, f"a finite {name.replace('_', ' ')}", str(value))
        if rule := self.job.solve:
            reached = figures["sequence_accuracy"] >= rule.accuracy
            self.state = replace(self.state, solved_evaluations=self.state.solved_evaluations + 1 if reached else 0)
        return figures

    @property
    def _is_solved(self) -> bool:
        rule = self.job.solve
        return rule is not None and self.state.solved_evaluations >= rule.evaluations

    @property
    def _is_over(self) -> bool:
        return self._is_solved or self.state.step >= self.config.total_steps

    def _save(self) -> None:
        with self.processes.raise_together():
            if self.processes.is_main:
                save_checkpoint(
                    self.folder.checkpoints_path,
                    self.model,
                    self.optimizer,
                    self.state,
                    tokenizer=self.job.tokenizer,
                    keep=self.config.checkpoint.keep,
                )

    def _finish(self, result: TrainingResult) -> None:
        """Write the model and the result of the run, once."""
        with self.processes.raise_together():
            if self.processes.is_main and not self.folder.result_path.exists():
                write_atomically(self.folder.result_path, to_json(asdict(result)) + "\n")
            if self.processes.is_main and not self.folder.model_path.exists():
                with new_folder(self.folder.model_path) as path:
                    save_model(self.model, path, self.job.tokenizer)
                    numbers = {
                        "steps": result.steps,
                        "text tokens": result.text_tokens,
                        "meta-tokens": result.meta_tokens,
                    }
                    made = replace(self.job.made, numbers=numbers, evaluation=result.validation)
                    write_model_card(path, self.model, made, name=self.folder.path.name)
                    write_manifest(path)

    # Numbers -------------------------------------------------------------------------------------------------

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(
            step,
            total_steps=self.config.total_steps,
            peak=self.config.optimizer.learning_rate,
            schedule=self.config.schedule,
        )

    def _rates(self, start: TrainingState, seconds: float) -> tuple[float, float]:
        """Return text and meta-tokens per second over all processes, since the run last started."""
        text = self.state.text_tokens - start.text_tokens
        return text / seconds, (self.state.meta_tokens - start.meta_tokens) / seconds

    def _result(
        self, start: TrainingState, seconds: float, loss: float | None, validation: dict[str, float]
    ) -> TrainingResult:
        rates = self._rates(start, seconds) if seconds else (None, None)
        return TrainingResult(
            run=str(self.folder.path),
            model=str(self.folder.model_path),
            num_parameters=self.model.num_parameters(),
            steps=self.state.step,
            text_tokens=self.state.text_tokens,
            meta_tokens=self.state.meta_tokens,
            training_flops=self.state.training_flops,
            final_loss=loss,
            validation=validation,
            text_tokens_per_second=rates[0],
            meta_tokens_per_second=rates[1],
            waited_for_batches=self.job.batches.seconds_waited / seconds if seconds else 0.0,
            solved=self._is_solved if self.job.solve else None,
        )


def _find_start(config: RunConfig, folder: RunFolder, job: TrainingSetup) -> tuple[Path | None, TrainingState]:
    """Return the checkpoint that a run continues from and its state; None and a fresh state for a new run."""
    path = find_checkpoint(folder.checkpoints_path)
    if path is None:
        return None, TrainingState(0, job.content_id, 1)
    state = read_state(path)
    if state.content_id != job.content_id:
        raise DataError(
            str(folder.path),
            expected=f"the data and weights that the run began with, content_id {state.content_id}",
            found=job.content_id,
            remedy="pass the same data and weights, or choose another --out",
        )
    _check_run(config, path, state)
    return path, state


def _check_run(config: RunConfig, path: Path, state: TrainingState) -> None:
    """Refuse the checkpoint of another run."""
    remedy = "take the config that it was made with, or another --out"
    if state.config is None:
        run = run_sha256(config)
        if state.run_sha256 not in (None, run):
            raise CheckpointError(
                str(path),
                expected=f"a checkpoint of this config, run_sha256 {run[:12]}...",
                found=f"one of another, {state.run_sha256[:12]}...",
                remedy=remedy,
            )
        return
    for key, old, new in differences_from_checkpoint(state.config, config, str(path)):
        raise CheckpointError(
            str(path), expected=f"a checkpoint of this config, {key} {new!r}", found=f"{old!r}", remedy=remedy
        )


def _check_disk(folder: RunFolder, num_parameters: int) -> None:
    needed = 2 * BYTES_PER_PARAMETER_OF_CHECKPOINT * num_parameters
    disk = next(path for path in (folder.path, *folder.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise ResourceError(
            str(folder.path),
            expected=f"{needed} bytes free for two checkpoints",
            found=str(free),
            remedy="free some space or choose another --out",
        )


def _due(step: int, interval: int | None, total: int) -> bool:
    """Tell whether a periodic action is due after `step` steps: at its interval and at the end."""
    return step == total or (interval is not None and step % interval == 0)
