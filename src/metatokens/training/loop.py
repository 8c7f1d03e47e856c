"""Pre-training: the loop between verified tokens and a Hugging Face checkpoint.

One optimizer step: count the valid targets of the whole step over all micro-batches and processes, divide every
micro-batch's summed loss by that count, and change nothing if the gradient is not finite. Learning rate, batches and
layouts are functions of the step, so a run that was killed continues to the bit from its last checkpoint.
"""

import contextlib
import json
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from metatokens.config.schema import PretrainConfig
from metatokens.data.injection import InjectedBatch, hash_key
from metatokens.data.loader import BatchLoader, TokenBlocks
from metatokens.data.shards import TokenDataset
from metatokens.data.tokenizer import build_hf_tokenizer, ends_clause_table
from metatokens.errors import DataError, NumericError, Preempted, ResourceError, UsageError
from metatokens.model.export import save_model
from metatokens.training.checkpoint import (
    TrainingState,
    find_checkpoint,
    load_checkpoint,
    new_folder,
    read_state,
    remove_leftovers,
    save_checkpoint,
)
from metatokens.training.distributed import Processes, join_processes
from metatokens.training.initialization import build_model
from metatokens.training.metrics import MetricsWriter, ProgressDisplay
from metatokens.training.optimizer import build_optimizer, learning_rate_at
from metatokens.training.run_folder import RunFolder, write_atomically

MAX_CONSECUTIVE_SKIPS = 3
BYTES_PER_PARAMETER_OF_CHECKPOINT = 12  # float32 weight and two moments
_FOR_DROPOUT = 3  # what this draw is for; injection and the loader use 0 to 2


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run has to say for itself."""

    run: str
    model: str
    num_parameters: int
    steps: int
    text_tokens: int
    meta_tokens: int
    final_loss: float | None
    """Mean training loss of the last logged step, nats per text token; None where nothing was logged."""
    validation_loss: float | None
    """Nats per text token on fixed validation blocks, injected as in training; None if there was no evaluation."""
    text_tokens_per_second: float | None
    """Of the training steps since the run last started, evaluation and saving left out; None without a step."""
    meta_tokens_per_second: float | None
    waited_for_batches: float
    """Share of the training time that was spent waiting for the loader."""


def plan(config: PretrainConfig, dataset: TokenDataset) -> dict[str, Any]:
    """Return what a run would do, for `--dry-run`: sizes, steps, tokens and the passes over the text."""
    model = build_model(config.model, **vocabulary(dataset), seed=config.seed)
    text = config.text_tokens_per_block
    num_blocks = len(TokenBlocks(dataset, "train", text))
    return {
        "parameters": model.num_parameters(),
        "steps": config.total_steps,
        "text_tokens_per_step": text * config.training.batch_blocks,
        "meta_tokens_per_step": (config.data.block_size - text) * config.training.batch_blocks,
        "text_tokens": text * config.training.batch_blocks * config.total_steps,
        "passes_over_the_text": config.training.batch_blocks * config.total_steps / num_blocks,
        "checkpoint_bytes": model.num_parameters() * BYTES_PER_PARAMETER_OF_CHECKPOINT,
    }


def open_dataset(config: PretrainConfig) -> TokenDataset:
    """Open and verify the tokens that `config` names."""
    if config.data.path is None:
        raise UsageError(
            "data.path",
            expected="a folder of tokens",
            found="none",
            remedy="run `metatokens prepare` and pass --data.path DIR",
        )
    return TokenDataset.open(config.data.path, verify=config.data.verify)


def vocabulary(dataset: TokenDataset) -> dict[str, int]:
    """Return the arguments of `build_model` that come from the tokens."""
    return {"text_vocab_size": dataset.vocab_size, "eos_token_id": dataset.eos_token_id}


def pretrain(config: PretrainConfig, out: str | Path, *, show_progress: bool = True, label: str = "") -> PretrainResult:
    """Train the model of `config` into the run folder `out`, from its last checkpoint where there is one.

    Under torchrun every process calls this. Signals: the first SIGTERM or SIGINT ends the run after the current step
    with a checkpoint.

    Raises:
        UsageError, DataError, CheckpointError, NumericError, ResourceError: see `metatokens.errors`.
        Preempted: after a signal, when the checkpoint is safe.
    """
    folder = RunFolder(Path(out))
    with join_processes(config.training) as processes, contextlib.ExitStack() as stack:
        dataset = stack.enter_context(open_dataset(config))
        if processes.is_main:
            stack.enter_context(folder.locked())
            folder.settle_config(config)
            remove_leftovers(folder.path)
            remove_leftovers(folder.checkpoints_path)
        processes.wait()
        run = _Run(config, folder, dataset, processes)
        return run.train(show_progress=show_progress, label=label or folder.path.name)


class _Run:
    """A run in progress: everything that a step needs."""

    def __init__(self, config: PretrainConfig, folder: RunFolder, dataset: TokenDataset, processes: Processes) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        self.model = build_model(config.model, **vocabulary(dataset), seed=config.seed)
        self.model.to(processes.device)
        if config.training.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.tokenizer = build_hf_tokenizer(dataset.tokenizer())
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.state = self._restore(dataset)
        wrapped = processes.wrap(self.model)
        self.step_model: Any = torch.compile(wrapped) if config.training.compile else wrapped
        self.loader = self._loader(dataset, "train", config.training.batch_blocks)
        self.evaluation = self._evaluation(dataset)
        self.consecutive_skips = 0

    # Setting up ----------------------------------------------------------------------------------------------

    def _loader(self, dataset: TokenDataset, split: Any, batch_blocks: int) -> BatchLoader:
        config = self.config
        assert self.model.config.meta_token_id is not None
        punctuation = config.injection.kind == "punctuation"
        return BatchLoader(
            TokenBlocks(dataset, split, config.text_tokens_per_block),
            injection=config.injection,
            block_size=config.data.block_size,
            batch_blocks=batch_blocks,
            seed=config.seed,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            meta_token_id=self.model.config.meta_token_id,
            loss_policy=config.model.loss_policy,
            ends_clause=ends_clause_table(dataset.tokenizer()) if punctuation else None,
            shuffle=split == "train",
        )

    def _evaluation(self, dataset: TokenDataset) -> tuple[BatchLoader, int] | None:
        """Return the validation batches and how many of them an evaluation takes."""
        if self.config.evaluation.interval_steps is None:
            return None
        blocks = TokenBlocks(dataset, "validation", self.config.text_tokens_per_block)
        world_size = self.processes.world_size
        num_blocks = min(self.config.evaluation.blocks, len(blocks)) // world_size * world_size
        if num_blocks == 0:
            raise UsageError(
                "evaluation.interval_steps",
                expected=f"{world_size} validation blocks or more",
                found=str(len(blocks)),
                remedy="set it to null or prepare more text",
            )
        batch_blocks = min(self.config.training.micro_batch_blocks * world_size, num_blocks)
        return self._loader(dataset, "validation", batch_blocks), num_blocks // batch_blocks

    def _restore(self, dataset: TokenDataset) -> TrainingState:
        start = TrainingState(0, dataset.content_id, self.processes.world_size)
        path = find_checkpoint(self.folder.checkpoints_path)
        if path is None:
            return start
        state = read_state(path)
        if state.content_id != dataset.content_id:
            raise DataError(
                str(self.config.data.path),
                expected=f"the tokens of the run, content_id {state.content_id}",
                found=dataset.content_id,
                remedy="point --data.path to them",
            )
        load_checkpoint(path, self.model, self.optimizer)
        return state

    # Training ------------------------------------------------------------------------------------------------

    def train(self, *, show_progress: bool, label: str) -> PretrainResult:
        config, total = self.config, self.config.total_steps
        first, seconds, loss, validation = self.state.step, 0.0, None, None
        metrics = None
        shown = show_progress and self.processes.is_main
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(_stop_signals())
            if self.processes.is_main:
                self._check_disk()
                metrics = MetricsWriter(self.folder.metrics_path, config.logging.trackers)
                stack.callback(metrics.close)
            display = stack.enter_context(ProgressDisplay(label, start=first, total=total, shown=shown))
            if first:
                display.say(f"{label} continues after step {first}")
            self._settle_buckets(first)
            batches = stack.enter_context(contextlib.closing(self.loader.prefetch(first, total)))
            for step in range(first, total):
                started = time.perf_counter()
                step_loss, grad_norm, stopping = self._step(step, next(batches), stopping=bool(stop))
                seconds += time.perf_counter() - started
                if _due(step + 1, config.logging.interval_steps, total):
                    loss = self.processes.sum(float(step_loss))[0]
                    rates = self._rates(step + 1 - first, seconds)
                    self._log(step, loss, grad_norm, rates, display=display, metrics=metrics)
                if _due(step + 1, config.evaluation.interval_steps, total) and self.evaluation:
                    validation = self.evaluate()
                    display.say(f"{label} step {step + 1} validation loss {validation:.4f}")
                    if metrics:
                        metrics.write(step + 1, validation_loss=validation)
                if _due(step + 1, config.checkpoint.interval_steps, total) or stopping:
                    self._save()
                if stopping and step + 1 < total:
                    raise Preempted(f"stopped by a signal after step {step + 1}; the same command continues from there")
        result = self._result(total - first, seconds, loss, validation)
        self._finish(result)
        if first < total:
            return result
        measured = json.loads(self.folder.result_path.read_text())
        return PretrainResult(**{**measured, "run": result.run, "model": result.model})

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

    def _step(self, step: int, batch: InjectedBatch, *, stopping: bool) -> tuple[Tensor, float, bool]:
        """Do one optimizer step; returns this process's part of the mean loss, the gradient's norm, whether to stop."""
        num_targets, stop = self.processes.sum(float((batch.targets >= 0).sum()), float(stopping))
        device, world_size = self.processes.device, self.processes.world_size
        rows = min(self.config.training.micro_batch_blocks, len(batch.input_ids))
        micro_batches = [
            batch.to_model_inputs(slice(i, i + rows), device) for i in range(0, len(batch.input_ids), rows)
        ]
        self._seed_dropout(step)
        total = torch.zeros((), device=device)
        for index, inputs in enumerate(micro_batches):
            last = index + 1 == len(micro_batches)
            with contextlib.nullcontext() if last or world_size == 1 else self.step_model.no_sync():
                # DDP averages over processes, so the sum is divided by the targets of an average process
                loss = self._forward(inputs, num_targets / world_size)
                loss.backward()
            total += loss.detach() / world_size
        grad_norm = float(
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.gradient_clip or float("inf"))
        )
        if torch.isfinite(torch.tensor(grad_norm)):  # the same in every process: gradients are already averaged
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
            self.optimizer.step()
            self.consecutive_skips = 0
        else:
            self._skip(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.state = TrainingState(step + 1, self.state.content_id, world_size, self.state.skipped_steps)
        return total, grad_norm, bool(stop)

    def _forward(self, inputs: dict[str, Tensor], num_targets: float) -> Tensor:
        bfloat16 = self.config.training.precision == "bfloat16"
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=bfloat16):
            loss: Tensor = self.step_model(**inputs, use_cache=False, num_items_in_batch=num_targets).loss
        return loss

    def _skip(self, step: int) -> None:
        """Count a step that changes nothing because its gradient is not finite."""
        warnings.warn(f"step {step} changes nothing: its gradient is not finite", stacklevel=2)
        self.consecutive_skips += 1
        skipped = self.state.skipped_steps + 1
        self.state = TrainingState(self.state.step, self.state.content_id, self.state.world_size, skipped)
        if self.consecutive_skips > MAX_CONSECUTIVE_SKIPS:
            raise NumericError(
                f"step {step}",
                expected="a finite gradient",
                found=f"{self.consecutive_skips} steps in a row without one",
                remedy="lower optimizer.learning_rate; the last checkpoint is intact",
            )

    def _seed_dropout(self, step: int) -> None:
        """Key the masks of dropout by step and process, so that a resumed run draws the same."""
        if self.config.model.attention_dropout or self.config.model.hidden_dropout:
            key = hash_key(self.config.seed, step, self.processes.rank, _FOR_DROPOUT)
            torch.manual_seed(int(key[0] >> 1))

    def _settle_buckets(self, step: int) -> None:
        """Let DDP see one backward pass, whose gradients are dropped.

        After its first one it regroups the gradients, and with them the order in which three or more processes add
        them up. A resumed run is to the bit the uninterrupted one only if that happens before the first step of both.
        """
        if self.processes.world_size == 1 or step == self.config.total_steps:
            return
        rows = slice(0, self.config.training.micro_batch_blocks)
        self._forward(self.loader.batch_at(step).to_model_inputs(rows, self.processes.device), 1.0).backward()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss over the fixed validation blocks, nats per text token."""
        assert self.evaluation is not None
        loader, num_batches = self.evaluation
        self.model.eval()
        total, count = 0.0, 0
        for index in range(num_batches):
            batch = loader.batch_at(index)
            inputs = batch.to_model_inputs(device=self.processes.device)
            with torch.autocast(
                self.processes.device.type, torch.bfloat16, enabled=self.config.training.precision == "bfloat16"
            ):
                outputs = self.model(**inputs, use_cache=False, num_items_in_batch=1, logits_to_keep=1)
            total += float(outputs.loss)
            count += int((batch.targets >= 0).sum())
        self.model.train()
        total, num_targets = self.processes.sum(total, count)
        return total / num_targets

    def _save(self) -> None:
        if self.processes.is_main:
            save_checkpoint(
                self.folder.checkpoints_path,
                self.model,
                self.optimizer,
                self.state,
                tokenizer=self.tokenizer,
                keep=self.config.checkpoint.keep,
            )
        self.processes.wait()

    def _finish(self, result: PretrainResult) -> None:
        """Write the model and the result of the run, once."""
        if self.processes.is_main:
            if not self.folder.result_path.exists():
                write_atomically(self.folder.result_path, json.dumps(asdict(result), indent=2) + "\n")
            if not self.folder.model_path.exists():
                with new_folder(self.folder.model_path) as path:
                    save_model(self.model, path, self.tokenizer)
        self.processes.wait()

    # Numbers -------------------------------------------------------------------------------------------------

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(
            step,
            total_steps=self.config.total_steps,
            peak=self.config.optimizer.learning_rate,
            schedule=self.config.schedule,
        )

    def _rates(self, steps: int, seconds: float) -> tuple[float, float]:
        """Return text and meta-tokens per second over all processes."""
        blocks_per_second = steps * self.config.training.batch_blocks / seconds
        text = self.config.text_tokens_per_block
        return blocks_per_second * text, blocks_per_second * (self.config.data.block_size - text)

    def _check_disk(self) -> None:
        needed = 2 * BYTES_PER_PARAMETER_OF_CHECKPOINT * self.model.num_parameters()
        free = shutil.disk_usage(self.folder.path).free
        if free < needed:
            raise ResourceError(
                str(self.folder.path),
                expected=f"{needed} bytes free for two checkpoints",
                found=str(free),
                remedy="free some space or choose another --out",
            )

    def _result(self, steps: int, seconds: float, loss: float | None, validation: float | None) -> PretrainResult:
        config, total = self.config, self.config.total_steps
        text = config.text_tokens_per_block * config.training.batch_blocks * total
        rates = self._rates(steps, seconds) if steps else (None, None)
        return PretrainResult(
            run=str(self.folder.path),
            model=str(self.folder.model_path),
            num_parameters=self.model.num_parameters(),
            steps=total,
            text_tokens=text,
            meta_tokens=config.data.block_size * config.training.batch_blocks * total - text,
            final_loss=loss,
            validation_loss=validation,
            text_tokens_per_second=rates[0],
            meta_tokens_per_second=rates[1],
            waited_for_batches=self.loader.seconds_waited / seconds if seconds else 0.0,
        )


def _due(step: int, interval: int | None, total: int) -> bool:
    """Tell whether something happens after `step` steps: at its interval and at the end."""
    return step == total or (interval is not None and step % interval == 0)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list; a second signal acts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(number, old[number])

    old: dict[int, Any] = {}
    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            old[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: the caller keeps its own handlers
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
