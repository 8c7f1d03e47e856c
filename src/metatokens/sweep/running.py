"""Run a sweep: each training and each evaluation is a process of its own, several at a time.

The run folders show what is done: a training by its result, an evaluation by its entry in RUN/evaluation.json with the
same request. So the same command continues a sweep that was killed, and each run continues from its last checkpoint. A
run that fails does not stop the others.

OUT/
  results.json, table.md     rewritten after every finished run
  runs/LABEL/.../seed-N/
    preset.yaml              the resolved config, for `metatokens finetune`
    evaluation.json          the model's answers, by evaluation
    cpu_seconds.json         processor time of the run's processes
    log.txt                  standard error of the run's processes
  lock
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.loading import to_yaml
from metatokens.config.sweep import PerplexityConfig
from metatokens.errors import DataError, UsageError
from metatokens.report.sweep_results import FailedRun
from metatokens.storage import hold_lock, no_follow, read_sealed, write_sealed
from metatokens.sweep.forking import ForkServer
from metatokens.sweep.progress import SweepDisplay
from metatokens.training.signals import StopRequest, collect_stop_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from metatokens.sweep.planning import EvaluationRequest, SweepRun

_POLL_SECONDS = 0.1
_FREE_KEYS = {"batch_size"}  # fields of an evaluation that do not change its result


@dataclass(frozen=True)
class Slot:
    """A place for one process."""

    gpu: str | None = None
    """For CUDA_VISIBLE_DEVICES; None leaves it as it is."""

    def own_environment(self) -> dict[str, str]:
        """Return the variables that its processes have beside those of the sweep."""
        return {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}


def parse_gpus(text: str | None) -> list[str]:
    """Read GPUs as written on the command line: indices or UUIDs, separated by commas.

    Raises:
        UsageError: a GPU is empty or named twice.
    """
    if text is None:
        return []
    gpus = [gpu.strip() for gpu in text.split(",")]
    if not all(gpus) or len(set(gpus)) < len(gpus):
        raise UsageError("--gpus", expected="different indices as 0,1", found=repr(text), remedy="see `nvidia-smi -L`")
    return gpus


def make_slots(jobs: int, gpus: Sequence[str]) -> list[Slot]:
    """Return a slot for each GPU, or without GPUs `jobs` slots that share the cores.

    Raises:
        ValueError: `jobs` is less than 1.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    return [Slot(gpu) for gpu in gpus] or [Slot()] * jobs


def count_threads(num_slots: int) -> int:
    """Return how many threads a process of each slot gets: the slots share the cores, and none has less than one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_slots)


def is_done(run: SweepRun) -> bool:
    """Tell whether a run is trained and has answered every evaluation."""
    return run.folder.is_finished(run.config) and not _unanswered(run)


def read_answers(run: SweepRun) -> dict[str, dict[str, Any]]:
    """Return the stored reports of a run's evaluations, by name, that match what the sweep requests."""
    stored = _read_json(run.folder.path / "evaluation.json", default={})
    return {
        evaluation.name: stored[evaluation.name]["report"]
        for evaluation in run.evaluations
        if evaluation.name in stored and _answers(stored[evaluation.name], evaluation)
    }


def read_reports(run_folder: Path) -> dict[str, dict[str, Any]]:
    """Return the stored reports of a run's evaluations by name, whatever the sweep requests now."""
    stored = _read_json(run_folder / "evaluation.json", default={})
    return {name: answer["report"] for name, answer in stored.items()}


def read_cpu_seconds(run: SweepRun) -> float:
    """Return the processor time of a run's processes, but for those that outlived a sweep that was killed."""
    stored = _read_json(run.folder.path / "cpu_seconds.json", default=0.0)
    # older files hold the bare number
    return float(stored["cpu_seconds"] if isinstance(stored, dict) else stored)


def run_sweep(
    runs: Sequence[SweepRun],
    out: Path,
    slots: Sequence[Slot],
    *,
    show_progress: bool = True,
    on_finished: Callable[[Sequence[FailedRun]], None],
) -> list[FailedRun]:
    """Run the runs that are not done yet, in order.

    The first signal that would end the sweep is passed on as SIGTERM, so that each training saves a checkpoint and
        ends.

    Args:
        runs: from `plan_sweep`.
        out: folder of the sweep.
        slots: the places for processes; each runs one at a time.
        show_progress: whether to show progress on standard error.
        on_finished: called after every run, with the runs that have failed so far.

    Returns:
        The runs that failed.

    Raises:
        UsageError: another process is running this sweep.
        Preempted: after a signal, when every process has ended.
    """
    with (
        hold_lock(out / "lock", folder=out, work="another `metatokens sweep` is at work in this folder"),
        collect_stop_signals() as stop,
        SweepDisplay(runs, shown=show_progress) as display,
        # a variable that torch reads when it is imported
        ForkServer({**os.environ, "OMP_NUM_THREADS": str(count_threads(len(slots)))}) as server,
    ):
        return _Scheduler(runs, slots, server, display, on_finished).run(stop)


class _Scheduler:
    def __init__(
        self,
        runs: Sequence[SweepRun],
        slots: Sequence[Slot],
        server: ForkServer,
        display: SweepDisplay,
        on_finished: Callable[[Sequence[FailedRun]], None],
    ) -> None:
        self._server, self._display, self._on_finished = server, display, on_finished
        self._waiting: deque[SweepRun] = deque()
        for run in runs:
            if is_done(run):
                display.skip(run)
            else:
                self._waiting.append(run)
        self._free = list(slots)
        self._active: list[_Process] = []
        self._failed: list[FailedRun] = []

    def run(self, stop: StopRequest) -> list[FailedRun]:
        passed_on = False
        try:
            while self._active or (self._waiting and not stop):
                if stop and not passed_on:
                    passed_on = True
                    self._display.say(f"stopping: {len(self._active)} processes save and end")
                    for process in self._active:
                        process.command.send_signal(signal.SIGTERM)
                if not stop:
                    self._start_waiting()
                for process in list(self._active):
                    code = process.command.poll()
                    if code is None:
                        self._display.update(process.run)
                    else:
                        self._active.remove(process)
                        self._end(process, code, stopping=bool(stop))
                time.sleep(_POLL_SECONDS)
        finally:
            for process in self._active:  # after an error here, no process may go on alone
                process.command.send_signal(signal.SIGTERM)
        if stop:
            raise stop.preempted()
        return self._failed

    def _start_waiting(self) -> None:
        """Fill the free slots; a run that another process still holds has to wait."""
        for run in list(self._waiting):
            if not self._free:
                return
            holder = run.folder.holder()
            if holder:
                self._display.say_once(f"{run.name} waits: {holder} holds it")
            else:
                self._waiting.remove(run)
                run.folder.path.mkdir(parents=True, exist_ok=True)
                write_sealed(run.folder.path / "preset.yaml", to_yaml(run.config))
                self._go_on(run, self._free.pop(0))

    def _go_on(self, run: SweepRun, slot: Slot) -> None:
        """Start the next process of a run, or finish it."""
        if not run.folder.is_finished(run.config):
            self._start(run, slot, None)
        elif unanswered := _unanswered(run):
            self._start(run, slot, unanswered[0])
        else:
            self._free.append(slot)
            self._on_finished(self._failed)
            self._display.finish(run)

    def _start(self, run: SweepRun, slot: Slot, evaluation: EvaluationRequest | None) -> None:
        process = _Process(self._server, run, slot, evaluation)
        self._active.append(process)
        self._display.start(run, process.activity)

    def _end(self, process: _Process, code: int, *, stopping: bool) -> None:
        run, slot = process.run, process.slot
        spent = {"cpu_seconds": round(read_cpu_seconds(run) + process.command.cpu_seconds, 2)}
        write_sealed(run.folder.path / "cpu_seconds.json", json.dumps(spent) + "\n")
        error, output = process.error(code), process.take_output()
        if error is None and process.evaluation is not None:
            store_answer(run, process.evaluation, output)
        if error is None and not process.has_left_its_result():
            error = f"{process.activity} ended without its result; see {run.folder.path / 'log.txt'}"
        if error is None and not (stopping and not is_done(run)):
            self._go_on(run, slot)
            return
        self._free.append(slot)
        if error is None or stopping:
            self._display.drop(run)
            return
        self._failed.append(FailedRun(run.name, error))
        self._on_finished(self._failed)
        self._display.fail(run, error)


class _Process:
    """A training or an evaluation under way."""

    def __init__(self, server: ForkServer, run: SweepRun, slot: Slot, evaluation: EvaluationRequest | None) -> None:
        self.run, self.slot, self.evaluation = run, slot, evaluation
        folder = run.folder.path
        self.activity = "training" if evaluation is None else f"evaluation {evaluation.name}"
        self._log_path = folder / "log.txt"
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it outlives this function
        arguments = training_arguments(run) if evaluation is None else evaluation_arguments(run, evaluation)
        with open(self._log_path, "ab", opener=no_follow) as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self.command = server.start(arguments, slot.own_environment(), self._output.fileno(), log.fileno())

    def has_left_its_result(self) -> bool:
        return (
            self.run.folder.is_finished(self.run.config)
            if self.evaluation is None
            else self.evaluation not in _unanswered(self.run)
        )

    def take_output(self) -> str:
        """Return the standard output and close it; to be called once."""
        with self._output:
            self._output.seek(0)
            return self._output.read().decode()

    def error(self, code: int) -> str | None:
        """Return in one line what went wrong, or None if nothing did."""
        if code == 0:
            return None
        if code < 0:
            return f"ended by {signal.Signals(-code).name}; the same command continues it"
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("metatokens: ") and "metatokens: warning: " not in line]
        return (told or lines or [f"exit code {code}"])[-1].removeprefix("metatokens: ")


def training_arguments(run: SweepRun) -> list[str]:
    """Return the command line of the training of a run, without the program."""
    verb = "finetune" if isinstance(run.config, FinetuneConfig) else "pretrain"
    return [verb, str(run.folder.path / "preset.yaml"), "--out", str(run.folder.path), "--json"]


def evaluation_arguments(run: SweepRun, request: EvaluationRequest) -> list[str]:
    """Return the command line of an evaluation of a trained run, without the program."""
    folder = run.folder.path
    interventions = [f"--intervention={intervention}" for intervention in request.interventions]
    fields = request.config.model_dump(mode="json")
    if isinstance(request.config, PerplexityConfig):
        given = {f"--{key.replace('_', '-')}": value for key, value in fields.items() if key != "text"}
        options = [
            name if value is True else f"{name}={value}"  # a switch is there or not
            for name, value in given.items()
            if value is not None and value is not False
        ]
        return ["perplexity", str(folder), request.config.text, *options, *interventions, "--json"]
    compact = (",", ":")  # argparse takes a word with a space for an argument of its own
    overrides = [f"--{key}={json.dumps(value, separators=compact)}" for key, value in fields.items()]
    return ["evaluate", str(folder), *overrides, *interventions, "--json"]


def _unanswered(run: SweepRun) -> list[EvaluationRequest]:
    answers = read_answers(run)
    return [evaluation for evaluation in run.evaluations if evaluation.name not in answers]


def store_answer(run: SweepRun, request: EvaluationRequest, report: str) -> None:
    """Keep what an evaluation wrote as JSON, beside the answers to others."""
    path = run.folder.path / "evaluation.json"
    stored = _read_json(path, default={})
    asked = request.config.model_dump(mode="json")
    stored[request.name] = {
        "interventions": list(request.interventions),
        "asked": asked,
        "report": json.loads(report),
    }
    write_sealed(path, json.dumps(stored) + "\n")


def _read_json(path: Path, *, default: Any) -> Any:
    """Return the content of a file of a run; the default if there is none."""
    if not path.is_file():
        return default
    remedy = "remove it, and the same command measures it again"
    try:
        return json.loads(read_sealed(path, remedy=remedy))
    except (ValueError, RecursionError) as error:
        raise DataError(str(path), expected="JSON", found=str(error), remedy=remedy) from None


def _answers(stored: dict[str, Any], request: EvaluationRequest) -> bool:
    """Tell whether a stored answer is one to this request."""
    # older files have no `asked`, but the report of a recall task repeats it
    new = request.config.model_dump(mode="json")
    # nor do they have fields that came later, whose defaults leave everything as it was
    old = type(request.config)().model_dump(mode="json") | (stored.get("asked") or stored["report"]["config"])
    same = all(old.get(key) == new.get(key) for key in (old.keys() | new.keys()) - _FREE_KEYS)
    return same and stored["interventions"] == list(request.interventions)
