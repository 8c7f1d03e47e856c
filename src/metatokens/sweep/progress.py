"""Progress of a sweep on standard error: a line for each running process, the runs that are done, the time left."""

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from metatokens.errors import printable
from metatokens.sweep.planning import SweepRun, stage_steps

_TAIL_BYTES = 4_096  # of metrics.jsonl: more than its last line


class SweepDisplay:
    """Shows bars on a terminal, lines elsewhere, and nothing if `shown` is False.

    Work is counted in training FLOPs, so that the time left accounts for expensive arms to come.
    """

    def __init__(self, runs: Sequence[SweepRun], *, shown: bool) -> None:
        """Prepare the display; it appears when entered."""
        self._runs, self._shown = runs, shown
        self._num_runs, self._num_done = len(runs), 0
        self._work = dict.fromkeys((run.name for run in runs), 0.0)
        self._total = sum(run.budget.training_flops for run in runs)
        self._began_with: float | None = None
        self._began = time.monotonic()
        self._said: set[str] = set()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            disable=not (shown and sys.stderr.isatty()),
        )
        self._overall = self._bars.add_task("sweep", total=1.0, text="")
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def skip(self, run: SweepRun) -> None:
        """Count a run that was done before the sweep started."""
        self._num_done += 1
        self._work[run.name] = run.budget.training_flops

    def start(self, run: SweepRun, activity: str) -> None:
        """Show that a process of a run has started."""
        if self._began_with is None:
            for other in self._runs:  # work that earlier processes did must not count as speed
                self._note_work(other)
            self._began_with, self._began = sum(self._work.values()), time.monotonic()
            if self._num_done:
                self.say(f"{self._num_done} of {self._num_runs} runs are done already")
        if run.name not in self._tasks:
            self._tasks[run.name] = self._bars.add_task(run.name, total=run.budget.steps, text="")
        self._bars.update(self._tasks[run.name], text=activity)
        if self._bars.disable:
            self.say(f"{run.name} {activity}")

    def update(self, run: SweepRun) -> None:
        """Show how far a run has come."""
        line = self._note_work(run)
        if self._bars.disable:
            return
        step, loss = int(line.get("step", 0)), line.get("loss")
        text = f"{step}/{run.budget.steps}" + ("" if loss is None else f"  loss {loss:.3f}")
        if step < run.budget.steps:
            self._bars.update(self._tasks[run.name], completed=step, text=text)
        else:
            self._bars.update(self._tasks[run.name], completed=step)
        self._update_overall()

    def finish(self, run: SweepRun) -> None:
        """Show that a run is done."""
        self._num_done += 1
        self._work[run.name] = run.budget.training_flops
        self.drop(run)
        self.say(f"{run.name} is done, {self._num_done} of {self._num_runs}{self._left()}")

    def fail(self, run: SweepRun, error: str) -> None:
        """Show that a run has failed."""
        self._total -= run.budget.training_flops
        self._work[run.name] = 0.0
        self.drop(run)
        self.say(f"{run.name} failed: {error}")

    def drop(self, run: SweepRun) -> None:
        """Remove the bar of a run."""
        self._bars.remove_task(self._tasks.pop(run.name))
        self._update_overall()

    def say(self, line: str) -> None:
        """Write a line that stays."""
        if self._shown:
            self._bars.console.print(printable(line), highlight=False, markup=False, soft_wrap=True)

    def say_once(self, line: str) -> None:
        """Write a line unless it has been written."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def _note_work(self, run: SweepRun) -> dict[str, float]:
        """Count the work of a run so far, and return its last metrics."""
        line = last_metrics(run.folder.metrics_path)
        self._work[run.name] = flops_after(run, int(line.get("step", 0)))
        return line

    def _update_overall(self) -> None:
        share = sum(self._work.values()) / self._total if self._total else 1.0
        self._bars.update(self._overall, completed=share, text=f"{self._num_done}/{self._num_runs} runs{self._left()}")

    def _left(self) -> str:
        done = sum(self._work.values())
        gained, seconds = done - (self._began_with or 0.0), time.monotonic() - self._began
        if gained <= 0 or done >= self._total:
            return ""
        left = round(seconds * (self._total - done) / gained)
        return f", about {left // 3600}:{left % 3600 // 60:02}:{left % 60:02} left"


def flops_after(run: SweepRun, step: int) -> float:
    """Return the estimated operations of the first `step` steps of a run."""
    stages = stage_steps(run.config)
    costs = zip(stages, accumulate(stages), run.budget.flops_of_stages, strict=True)
    return sum(flops * min(max(step - (end - steps), 0), steps) for steps, end, flops in costs)


def last_metrics(path: Path) -> dict[str, float]:
    """Return the last whole line of a metrics.jsonl; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
        return dict(json.loads(lines[-2])) if len(lines) > 1 else {}
    except (OSError, ValueError):
        return {}
