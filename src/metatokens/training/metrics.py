"""Metrics of a run in progress: metrics.jsonl, a progress bar, and trackers if the config names any.

Progress goes to standard error, so that standard output holds only a command's result.
"""

import json
import math
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metatokens.errors import FULL_DISK, ResourceError, UsageError, printable
from metatokens.storage import no_follow, write_atomically
from metatokens.training.checkpoint import TrainingState

PLAIN_LINE_SECONDS = 10  # least time between two progress lines without a terminal


class MetricsWriter:
    """Appends lines to metrics.jsonl and passes their numbers to the trackers.

    A loss is written twice: readable, and exactly under `<name>_hex`. A number that is not finite is written as null.
    """

    def __init__(self, path: Path, trackers: tuple[str, ...], config: Mapping[str, Any] | None = None) -> None:
        """Open the file for appending, and start the trackers with the config of the run.

        Raises:
            UsageError: a tracker is not installed or does not start.
        """
        started = {name: _start_tracker(name, path.parent, dict(config or {})) for name in trackers}
        self._trackers = {name: tracker for name, tracker in started.items() if tracker is not None}
        # unbuffered: a line that did not fit must not come back when the file is closed
        self._file = open(path, "ab", buffering=0, opener=no_follow)  # noqa: SIM115 - it outlives this function
        self._broken = False

    def write(self, step: int, **metrics: float) -> None:
        """Write one line; on a full disk or if a tracker fails, its numbers are lost with a warning, not the run."""
        readable = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        exact = {f"{name}_hex": value.hex() for name, value in metrics.items() if name.endswith("loss")}
        self._append(json.dumps({"step": step, **readable, **exact}).encode() + b"\n")
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.write(step, metrics))

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for name in list(self._trackers):
            self._try(name, lambda tracker: tracker.close())

    def _try(self, name: str, act: Callable[[Any], None]) -> None:
        try:
            act(self._trackers[name])
        except Exception as error:  # noqa: BLE001 - each tracker package raises errors of its own
            del self._trackers[name]
            problem = f"{name} failed ({_in_one_line(error)})"
            warnings.warn(f"{problem}; it gets no more numbers, metrics.jsonl still does", stacklevel=4)

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) == len(line):
                return
            os.ftruncate(self._file.fileno(), end)  # half a line would spoil the next one
            problem = "the disk is full"
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            problem = str(error.strerror)
        if not self._broken:
            warnings.warn(f"metrics are not written: {problem}", stacklevel=3)
        self._broken = True


class _TensorBoard:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._writer = _tracker_package("tensorboard").SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{yaml.safe_dump(config, sort_keys=False)}```", 0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a full disk shows here

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        package = _tracker_package("wandb")
        # the run folder keeps the tracker's run id, so that a resume continues the same tracked run
        identity = folder / "wandb-run-id"
        if not identity.exists():
            write_atomically(identity, uuid.uuid4().hex)
        self._run = package.init(
            project="metatokens",
            name=folder.name,
            dir=str(folder),
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=config,
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def _start_tracker(name: str, folder: Path, config: dict[str, Any]) -> Any:
    """Start and return the tracker; on a full disk warn and return None."""
    try:
        return _TRACKERS[name](folder, config)
    except UsageError:
        raise
    except Exception as error:  # each tracker package raises errors of its own
        if isinstance(error, ResourceError) or (isinstance(error, OSError) and error.errno in FULL_DISK):
            problem = f"{name} did not start ({_in_one_line(error)})"
            warnings.warn(f"{problem}; it gets no numbers, metrics.jsonl does", stacklevel=4)
            return None
        raise UsageError(
            "logging.trackers",
            expected=f"{name} to start",
            found=_in_one_line(error),
            remedy=f"set it up as its own documentation says, or leave {name} out",
        ) from error


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def check_trackers(trackers: tuple[str, ...]) -> None:
    """Raise UsageError for a tracker whose package is not installed; none is started."""
    for name in trackers:
        _tracker_package(name)


def _tracker_package(package: str) -> Any:
    try:
        return import_module(_MODULES[package])
    except ImportError:
        raise UsageError(
            "logging.trackers",
            expected=f"the package {package}",
            found="not installed",
            remedy="run `pip install 'metatokens[trackers]'`",
        ) from None


_PACE_SECONDS = 600
"""Over which the bar takes the pace; it needs two updates, and those of a slow run are far apart."""


class ProgressDisplay:
    """Progress on standard error: a bar on a terminal, a line every few seconds elsewhere; `shown` turns it on."""

    def __init__(self, label: str, *, start: int, total: int, shown: bool) -> None:
        """Prepare the display; it appears when entered."""
        self._label, self._total, self._shown = label, total, shown
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            speed_estimate_period=_PACE_SECONDS,
            console=Console(stderr=True),
            disable=not (shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task(label, total=total, completed=start, numbers="")

    def __enter__(self) -> Self:
        with suppress(OSError):  # as in `say`
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._bar.stop()

    def update(self, step: int, numbers: str) -> None:
        """Show that `step` steps are done, followed by `numbers`."""
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if self._bar.disable and self._shown and (now - self._last_line >= PLAIN_LINE_SECONDS or step == self._total):
            self._last_line = now
            self.say(f"{self._label} step {step}/{self._total} {numbers}")

    def say(self, line: str) -> None:
        """Write a line that stays; if the terminal is gone, the line is lost and the run goes on."""
        if self._shown:
            with suppress(OSError):
                self._bar.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


_SHARES = {"token_accuracy": "tokens", "sequence_accuracy": "answers", "chance": "guesses"}
"""What is right of an evaluation, in words so short that a line fits a terminal."""


@dataclass(frozen=True)
class TrainingReport:
    """Says on the display and in the metrics what has been measured."""

    label: str
    display: ProgressDisplay
    metrics: MetricsWriter | None

    def step(
        self, state: TrainingState, loss: float, grad_norm: float, speed: Mapping[str, float], **numbers: float
    ) -> None:
        """Say what came of a training step; `speed` is that of `metatokens.training.loop`."""
        text, meta = speed["text_tokens_per_second"], speed["meta_tokens_per_second"]
        self.display.update(state.step, f"loss {loss:.3f}  {text:,.0f} text + {meta:,.0f} meta tokens/s")
        if self.metrics:
            self.metrics.write(
                state.step,
                loss=loss,
                grad_norm=grad_norm,
                **numbers,
                skipped_steps=state.skipped_steps,
                loss_spikes=state.loss_spikes,
                **speed,
            )

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Say what came of an evaluation."""
        shares = [f"{word} {figures[name]:.1%}" for name, word in _SHARES.items() if name in figures]
        words = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items() if name not in _SHARES]
        words += [f"right: {', '.join(shares)}"] if shares else []
        self.display.say(f"{self.label} step {step} {', '.join(words)}")
        if self.metrics:
            self.metrics.write(step, **figures)
