"""The training loop: from batches to a Hugging Face checkpoint, for pre-training and fine-tuning alike.

`metatokens.training.step` does an optimizer step, `saving` commits checkpoints and `resuming` finds them. Learning rate
and batches are functions of the step, so a run that was killed continues to the bit from its last checkpoint. A
`TrainingSetup` holds the model, the batches and the evaluation of a run.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch

from metatokens.config.loading import flatten
from metatokens.config.parallel import Fsdp2
from metatokens.config.schema import RunConfig
from metatokens.data.loader import Batch
from metatokens.errors import (
    CheckpointError,
    DataError,
    NumericError,
    Preempted,
    UsageError,
    redact_values,
)
from metatokens.model.export import save_model
from metatokens.storage import new_folder, remove_leftovers
from metatokens.training.checkpoint import (
    TrainingState,
    describe_newest,
    load_checkpoint,
    own_weights,
    write_manifest,
)
from metatokens.training.distributed import Processes, is_of_transport
from metatokens.training.metrics import MetricsWriter, ProgressDisplay, TrainingReport, check_trackers
from metatokens.training.model_card import write_model_card
from metatokens.training.optimizer import build_optimizer
from metatokens.training.parallel import share_model, whole_tensor
from metatokens.training.remote import RemoteCopies
from metatokens.training.result import TrainingResult, measured_before, written_before
from metatokens.training.resuming import Resume, changes_of_bits, check_disk, find_start, has_ended
from metatokens.training.run_folder import RunFolder, environment, versions
from metatokens.training.saving import Saver
from metatokens.training.setup import TrainingSetup
from metatokens.training.signals import StopRequest
from metatokens.training.spikes import JudgedStep, spike_limit
from metatokens.training.step import OptimizerStep

MAX_CONSECUTIVE_SKIPS = 3
MAX_SKIPS = 100
"""Most steps of a whole run that may change nothing. A single one can be chance; more than these are a fault."""


# a request to stop that meets the entry of a `no_grad` leaves the thread without gradients: see `StopRequest.at_once`
@torch.enable_grad()
def train(
    config: RunConfig,
    folder: RunFolder,
    processes: Processes,
    make_job: Callable[[], TrainingSetup],
    *,
    stop: StopRequest,
    show_progress: bool = True,
    label: str = "",
    resume: Resume | None = None,
) -> TrainingResult:
    """Run a training job in a run folder; continue from its last checkpoint, or from the one that `resume` names.

    A request to stop ends the run after the current step, with a checkpoint and the marker `preempted.json`; where no
    step would be lost it ends the run at once.

    Raises:
        UsageError, DataError, CheckpointError, NumericError, ResourceError: see `metatokens.errors`.
        Preempted: after a request to stop, when the checkpoint is safe.
    """
    resume = resume or Resume()
    _agree_on_command(config, folder, processes, resume)
    with contextlib.ExitStack() as stack:
        with processes.raise_together():
            if processes.is_main:
                stack.enter_context(folder.locked())
                folder.check_config(config, resume.allowed)
                remove_leftovers(folder.path)
                remove_leftovers(folder.checkpoints_path)
                if config.checkpoint.copy_to is not None:
                    RemoteCopies(config.checkpoint.copy_to).fetch_newest(folder.checkpoints_path)
        if isinstance(config.training.parallel, Fsdp2):
            _agree_on_disk(folder, processes)
        if (measured := measured_before(config, folder, processes)) is not None:
            return measured
        try:
            with processes.raise_together(), stop.at_once():
                job = make_job()
            run = _Run(config, job, folder, processes, stop, resume)
            return run.train(show_progress=show_progress, label=label or folder.path.name)
        except Preempted as preempted:
            _mark(folder, processes, stop, preempted)
            raise
        except RuntimeError as error:
            if not (stop and is_of_transport(error)):
                raise
            # another process that was asked to stop has ended at once
            ended = stop.preempted()
            _mark(folder, processes, stop, ended)
            raise ended from error


def _mark(folder: RunFolder, processes: Processes, stop: StopRequest, preempted: Preempted) -> None:
    if processes.is_main:
        folder.mark_preempted(stop.cause or "a signal to another process", str(preempted))


def check_start(config: RunConfig, folder: RunFolder, job: TrainingSetup, resume: Resume | None = None) -> None:
    """Raise the errors that `train` would before its first step, except for a held lock; write nothing."""
    resume = resume or Resume()
    folder.check_writable()
    folder.check_config(config, resume.allowed)
    check_trackers(config.logging.trackers)
    if config.checkpoint.copy_to is not None:
        RemoteCopies(config.checkpoint.copy_to)
    if measured_before(config, folder, Processes()) is None:
        find_start(config, folder, job.content_id, Processes(), resume)
    check_disk(folder, job.model.num_parameters())


def _agree_on_command(config: RunConfig, folder: RunFolder, processes: Processes, resume: Resume) -> None:
    own = {"--out": str(folder.path), "--resume": str(resume.path), "--allow-change": resume.allowed}
    facts = {**own, **versions(), **flatten(config.model_dump(mode="json"))}
    remedy = "start all processes with the same command, packages and threads"
    processes.agree(facts, error=UsageError, remedy=remedy)


def _agree_on_disk(folder: RunFolder, processes: Processes) -> None:
    """Refuse a run folder that is another one for a process which has to write its part of a checkpoint there."""
    remedy = "put --out on a disk that all processes see"
    processes.agree({f"lock of {folder.path}": folder.holder_named()}, error=UsageError, remedy=remedy)


class _Run:
    """A run in progress."""

    def __init__(
        self,
        config: RunConfig,
        job: TrainingSetup,
        folder: RunFolder,
        processes: Processes,
        stop: StopRequest,
        resume: Resume,
    ) -> None:
        self.config, self.job, self.folder, self.processes, self.stop = config, job, folder, processes, stop
        self.model = job.model
        processes.agree({"content_id": job.content_id}, error=DataError, remedy="give all processes the same data")
        with processes.raise_together():
            if processes.is_main:
                check_disk(folder, self.model.num_parameters())
        if config.training.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.shared = share_model(config.training, processes)
        self.shared.place(self.model)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        checkpoint, state = find_start(config, folder, job.content_id, processes, resume)
        with processes.raise_together(), stop.at_once():
            if checkpoint is not None:
                load_checkpoint(checkpoint, self.model, self.optimizer)
        processes.agree({"step": state.step}, error=CheckpointError, remedy="give all processes the same --out")
        found = environment(processes.device)
        self.state = self.saved = state
        self.inexact: list[str] = []
        if checkpoint is not None and not self._is_over:
            self.inexact = list(changes_of_bits(state, config, found, processes.world_size))
        self.state = self.saved = replace(
            state,
            config=redact_values(config.model_dump(mode="json")),
            run_sha256=None,
            environment=found,
            bit_exact=state.bit_exact and not self.inexact,
        )
        self.saver = Saver(
            folder.checkpoints_path,
            config.checkpoint,
            processes,
            is_sharded=self.shared.is_sharded,
            tokenizer=job.tokenizer,
        )

    # Training ------------------------------------------------------------------------------------------------

    def train(self, *, show_progress: bool, label: str) -> TrainingResult:
        config, total = self.config, self.config.total_steps
        start, seconds = self.state, 0.0
        first, metrics = start.step, None
        shown = show_progress and self.processes.is_main
        with contextlib.ExitStack() as stack:
            stack.callback(self.shared.release)
            stack.callback(self.saver.abandon)
            with self.processes.raise_together():
                if self.processes.is_main:
                    metrics = MetricsWriter(
                        self.folder.metrics_path,
                        config.logging.trackers,
                        redact_values(config.model_dump(mode="json")),
                    )
                    stack.callback(metrics.close)
                    self._begin()
            optimizer_step = OptimizerStep(config, self.model, self.optimizer, self.processes, self.shared)
            display = stack.enter_context(ProgressDisplay(label, start=first, total=total, shown=shown))
            report = TrainingReport(label, display, metrics)
            if first:
                display.say(f"{label} {'ended at' if self._is_over else 'continues after'} step {first}")
                self._note_continuation()
            if self.state.evaluation_due and self.job.evaluate:
                self._evaluate(report)
            if not self._is_over:
                with self.stop.at_once():
                    optimizer_step.settle_buckets(lambda: self.job.batches.batch_at(first))
            batches = stack.enter_context(contextlib.closing(self.job.batches.prefetch(first, total)))
            while not self._is_over:
                step, started = self.state.step, time.perf_counter()
                # the first step may compile for minutes, and until it is done nothing is lost
                is_first = step == first
                self._enter(f"step {step + 1}", None if is_first else config.training.step_timeout_seconds)
                with self.stop.at_once() if is_first else contextlib.nullcontext():
                    batch = next(batches)
                    counts = self._count(batch)
                    judged = optimizer_step.take(step, batch, counts[0], spike_limit(self.state.recent_losses))
                self._advance(step, counts, judged)
                seconds += time.perf_counter() - started
                self._enter(f"what follows step {step + 1}")
                if _due(step + 1, config.logging.interval_steps, total):
                    numbers = {"learning_rate": optimizer_step.learning_rate(step)}
                    report.step(self.state, judged.loss, judged.grad_norm, self._speed(start, seconds), **numbers)
                if self.job.evaluate and _due(step + 1, self.job.evaluation_steps, total):
                    self._evaluate(report)
                if _due(step + 1, config.checkpoint.interval_steps, total) or self._is_over:
                    self._save()
            self.saver.finish()
            self._check_end()
        result = self._result(start, seconds)
        self._finish(result)
        if first < self.state.step:
            return result
        return written_before(self.folder, result)

    def _begin(self) -> None:
        """Tie the folder to this start of the run, which nothing can refuse any more."""
        if not self._is_over:
            self.folder.remove_outcome()
        # a run that only ends keeps the config that made it
        if not self._is_over or self.state.evaluation_due or not self.folder.config_path.exists():
            self.folder.write_config(self.config)
        self.folder.unmark()

    def _note_continuation(self) -> None:
        """Leave a record of a run that goes on, and warn if its bits will be others."""
        if not self.processes.is_main or self._is_over:
            return
        self.folder.note(self.state.step, "continued", bit_exact=not self.inexact, reasons=self.inexact)
        if self.inexact:
            warnings.warn(f"bit_exact=false reason={', '.join(self.inexact)}", stacklevel=2)

    def _enter(self, place: str, seconds: int | None = None) -> None:
        limit = self.config.training.distributed_timeout_seconds
        self.processes.enter(place, limit if seconds is None else min(seconds, limit))

    def _count(self, batch: Batch) -> list[float]:
        """Return the numbers of targets, of text and meta-tokens and of operations of a step, over all processes.

        On the way the processes agree on whether to stop before the step.

        Raises:
            Preempted: if any process was asked to stop.
            ResourceError: if a save in the background has failed.
        """
        counts = (batch.num_targets, batch.num_text, batch.num_meta, self.job.count_flops(batch))
        *totals, stopping, failed = self.processes.sum(*map(float, (*counts, bool(self.stop), self.saver.has_failed)))
        if failed:
            self.saver.finish()
        if stopping:
            self._end_early()
        return totals

    def _end_early(self) -> None:
        """Commit the steps done and raise Preempted."""
        if (self.state.step, self.state.evaluation_due) > (self.saved.step, self.saved.evaluation_due):
            self._save()
        self.saver.finish()
        self.stop.cause = self.stop.cause or "a signal to another process"
        preempted = self.stop.preempted(
            f" after step {self.state.step}" if self.state.step else " before the first step"
        )
        preempted.is_repeated = not self.processes.is_main
        raise preempted

    def _advance(self, step: int, counts: list[float], judged: JudgedStep) -> None:
        """Count a step that is done, and leave a record of one whose numbers are unusual."""
        _, num_text, num_meta, flops = counts
        state = self.state
        self.state = replace(
            state,
            step=step + 1,
            world_size=self.processes.world_size,
            text_tokens=state.text_tokens + int(num_text),
            meta_tokens=state.meta_tokens + int(num_meta),
            training_flops=state.training_flops + flops,
            consecutive_skips=0 if judged.is_finite else state.consecutive_skips + 1,
            skipped_steps=state.skipped_steps + judged.is_skipped,
            loss_spikes=state.loss_spikes + judged.is_spike,
            recent_losses=judged.remembered(state.recent_losses),
            final_loss=judged.loss if math.isfinite(judged.loss) else None,
        )
        if not judged.is_unusual:
            return
        if self.processes.is_main:
            samples = self.job.batches.sample_ids(step)
            self.folder.note(step + 1, "unusual step", **judged.record(), samples=samples)
        if not judged.is_finite or self.state.loss_spikes.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ... spike
            warnings.warn(f"step {step + 1} {judged}", stacklevel=2)
        if (skips := self.state.consecutive_skips) > MAX_CONSECUTIVE_SKIPS:
            raise self._diverged(f"step {step + 1}", "a finite loss and gradient", f"{skips} steps in a row without")
        if (skips := self.state.skipped_steps) > MAX_SKIPS:
            raise self._diverged(f"step {step + 1}", f"at most {MAX_SKIPS} steps that change nothing", str(skips))

    def _check_end(self) -> None:
        """Refuse to end as a success a run whose last steps changed nothing."""
        if skips := self.state.consecutive_skips:
            raise self._diverged("end of the run", "a finite loss and gradient", f"none in the last {skips} steps")

    def _diverged(self, where: str, expected: str, found: str) -> NumericError:
        self.saver.save_diagnostic(self.model, self.optimizer, self.state, self.folder.diagnostic_path)
        kept = describe_newest(self.folder.checkpoints_path)
        error = NumericError(
            where, expected=expected, found=found, remedy=f"lower optimizer.learning_rate, with another --out; {kept}"
        )
        error.is_repeated = not self.processes.is_main  # every process finds the same
        return error

    @torch.no_grad()
    def _evaluate(self, report: TrainingReport) -> None:
        """Evaluate on all processes; a request to stop cuts it short, and a resume begins with it."""
        assert self.job.evaluate is not None
        self.model.eval()
        sums: Mapping[str, tuple[float, float]] | None = None
        with (
            self.shared.evaluating(self.model),
            self.processes.raise_together(),
            contextlib.suppress(Preempted),
            self.stop.at_once(),
        ):
            sums = self.job.evaluate()
        self.model.train()
        (is_cut_short,) = self.processes.sum(float(sums is None))
        self.state = replace(self.state, evaluation_due=bool(is_cut_short))
        if is_cut_short:
            self._end_early()
        assert sums is not None
        names = list(sums)
        totals = self.processes.sum(*(number for name in names for number in sums[name]))
        figures = {name: totals[2 * i] / totals[2 * i + 1] for i, name in enumerate(names)}
        for name, value in figures.items():
            if not math.isfinite(value):
                where = f"evaluation after step {self.state.step}"
                raise self._diverged(where, f"a finite {name.replace('_', ' ')}", str(value))
        report.evaluation(self.state.step, figures)
        self.state = replace(self.state, validation=figures)
        if rule := self.job.solve:
            reached = figures["sequence_accuracy"] >= rule.accuracy
            self.state = replace(self.state, solved_evaluations=self.state.solved_evaluations + 1 if reached else 0)

    @property
    def _is_solved(self) -> bool:
        rule = self.job.solve
        return rule is not None and self.state.solved_evaluations >= rule.evaluations

    @property
    def _is_over(self) -> bool:
        return has_ended(self.config, self.state)

    def _save(self) -> None:
        try:
            self.saver.save(self.model, self.optimizer, self.state)
        except NumericError:
            self.saver.save_diagnostic(self.model, self.optimizer, self.state, self.folder.diagnostic_path)
            raise
        self.saved = self.state

    def _finish(self, result: TrainingResult) -> None:
        """Write the model and the result of the run, once."""
        is_written = self.processes.gather(self.folder.model_path.exists())[0]
        weights = None if is_written else self._gather_weights()
        with self.processes.raise_together():
            if self.processes.is_main and not self.folder.result_path.exists():
                self.folder.write_result(asdict(result))
            if self.processes.is_main and not is_written:
                with new_folder(self.folder.model_path) as path:
                    save_model(self.model, path, self.job.tokenizer, weights=weights)
                    numbers = {
                        "steps": result.steps,
                        "text tokens": result.text_tokens,
                        "meta-tokens": result.meta_tokens,
                    }
                    made = replace(self.job.made, numbers=numbers, evaluation=result.validation)
                    write_model_card(path, self.model, made, name=self.folder.path.name)
                    write_manifest(path)

    def _gather_weights(self) -> dict[str, torch.Tensor] | None:
        """Return the whole weights on the main process; None where the model has them itself."""
        if not self.shared.is_sharded:
            return None
        weights: dict[str, torch.Tensor] = {}
        for name, tensor in own_weights(self.model).items():
            whole = whole_tensor(tensor.detach())
            if self.processes.is_main:
                weights[name] = whole.cpu()
        return weights

    # Numbers -------------------------------------------------------------------------------------------------

    def _speed(self, start: TrainingState, seconds: float) -> dict[str, float]:
        """Return tokens per second over all processes, and the share of time spent waiting, since the last start."""
        return {
            "text_tokens_per_second": (self.state.text_tokens - start.text_tokens) / seconds,
            "meta_tokens_per_second": (self.state.meta_tokens - start.meta_tokens) / seconds,
            "waited_for_batches": self.job.batches.seconds_waited / seconds,
        }

    def _result(self, start: TrainingState, seconds: float) -> TrainingResult:
        """Return what was measured; nothing of it is lost if the run died after its last checkpoint."""
        speed = self._speed(start, seconds) if seconds else self.folder.logged_at(self.state.step)
        return TrainingResult(
            run=str(self.folder.path),
            model=str(self.folder.model_path),
            num_parameters=self.model.num_parameters(),
            steps=self.state.step,
            text_tokens=self.state.text_tokens,
            meta_tokens=self.state.meta_tokens,
            training_flops=self.state.training_flops,
            final_loss=self.state.final_loss,
            validation=self.state.validation,
            text_tokens_per_second=speed.get("text_tokens_per_second"),
            meta_tokens_per_second=speed.get("meta_tokens_per_second"),
            waited_for_batches=speed.get("waited_for_batches", 0.0),
            solved=self._is_solved if self.job.solve else None,
            bit_exact=self.state.bit_exact,
        )


def _due(step: int, interval: int | None, total: int) -> bool:
    """Tell whether a periodic action is due after `step` steps: at its interval and at the end."""
    return step == total or (interval is not None and step % interval == 0)
