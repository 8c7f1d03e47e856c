"""A run's folder: resolved config, versions, metrics and checkpoints; one run at a time may use it.

RUN/
  config.yaml       the resolved config, a valid preset, sealed
  versions.json     python, torch, transformers, metatokens
  metrics.jsonl     one line per logged step, losses also as exact hexadecimal floats
  events.jsonl      one line for each continuation and each step that was skipped or whose loss was a spike
  checkpoints/      step-00001000/ ...
  diagnostic/       the state whose numbers went wrong, if they did; no run continues from it
  model/            the trained model, loadable with from_pretrained; written last
  result.json       the measurements of the finished run, sealed
  preempted.json    there while the run has been asked to stop and waits to be continued
  lock              names the process that holds it
"""

import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel

from metatokens.config.changes import differences, remedy_for
from metatokens.config.loading import Config, digest, load_preset, to_yaml
from metatokens.errors import DataError, UsageError, redact, redact_values
from metatokens.storage import (
    check_file,
    check_folder,
    commit,
    flush_path,
    hold_lock,
    lock_holder,
    make_folder,
    no_follow,
    read_sealed,
    to_json,
    write_atomically,
    write_sealed,
)
from metatokens.training.checkpoint import MANIFEST

_STARTS = ("start", "start_from", "base")


class RunFolder:
    """Paths and small files of a run."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is touched yet."""
        self.path = path
        self.config_path = path / "config.yaml"
        self.metrics_path = path / "metrics.jsonl"
        self.events_path = path / "events.jsonl"
        self.checkpoints_path = path / "checkpoints"
        self.diagnostic_path = path / "diagnostic"
        self.model_path = path / "model"
        self.result_path = path / "result.json"
        self.marker_path = path / "preempted.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold its lock; the lock ends with the process, however it ends.

        Raises:
            UsageError: if the folder cannot be written or another process holds it.
            ResourceError: if the disk is full.
        """
        self.check_writable()
        make_folder(self.checkpoints_path)
        with hold_lock(self.path / "lock", folder=self.path, work="another run uses this folder"):
            yield

    def holder(self) -> str:
        """Return which process holds the lock; empty if none does."""
        return lock_holder(self.path / "lock")

    def holder_named(self) -> str:
        """Return which process the lock file names, whether or not it still holds the lock; empty without a file."""
        lock = self.path / "lock"
        return lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() else ""

    def is_finished(self, config: BaseModel) -> bool:
        """Tell whether the folder holds the finished run of this config.

        The initial weights are not opened, so another path to start from counts as another run.
        """
        if not (self.result_path.is_file() and self.model_path.is_dir() and self.config_path.is_file()):
            return False
        stored = self.stored(type(config))
        starts = [{key: tree.get(key) for key in _STARTS} for tree in (stored.model_dump(), config.model_dump())]
        return starts[0] == starts[1] and not any(differences(stored, config))

    def check_writable(self) -> None:
        """Check that the folder can be written, or made if it does not exist; nothing is touched.

        Raises:
            UsageError: if it cannot be written or made, or something else is in the place of one of its files.
        """
        for folder in (self.path, self.checkpoints_path):
            check_folder(folder, num_bytes=0)  # the space that a run needs is known once its model is built
        for name in (
            "lock",
            "config.yaml",
            "versions.json",
            "metrics.jsonl",
            "events.jsonl",
            "result.json",
            "preempted.json",
        ):
            check_file(self.path / name, num_bytes=0)
        is_in_the_way = os.path.lexists(self.model_path) and not (self.model_path / MANIFEST).is_file()
        if is_in_the_way and not self.result_path.exists():
            raise UsageError(
                str(self.model_path),
                expected="no model before the end of the run",
                found="a file or folder that no run wrote",
                remedy="move it away or choose another --out",
            )

    def check_config(self, config: BaseModel, allowed: Sequence[str] = ()) -> None:
        """Check that the config continues the run that the folder holds, if it holds one.

        Args:
            config: of the run.
            allowed: keys that may differ; see `metatokens.config.changes`.

        Raises:
            UsageError: naming the first key that makes it another run.
            DataError: config.yaml is not what the run wrote.
        """
        if self.config_path.exists():
            stored = self.stored(type(config))
            for key, old, new in differences(stored, config, allowed):
                raise UsageError(
                    f"{self.path}: {key}",
                    expected=f"{old!r} as in its config.yaml",
                    found=repr(new),
                    remedy=remedy_for(key, "take the old value, or another --out"),
                )

    def stored(self, schema: type[Config]) -> Config:
        """Return the config in config.yaml.

        Raises:
            DataError: it is not what the run wrote.
            UsageError: it is not a config of this schema.
        """
        remedy = "remove it: the checkpoints hold the config too"
        lines = read_sealed(self.config_path, remedy=remedy).splitlines()
        if all(line.startswith("#") for line in lines):  # it was cut off, and the seal with it
            raise DataError(str(self.config_path), expected="the config of a run", found="no key", remedy=remedy)
        return load_preset(self.config_path, schema=schema)

    def write_config(self, config: BaseModel) -> None:
        """Write config and versions, which ties the folder to this run; call once no check can refuse the start."""
        write_sealed(self.config_path, redact(to_yaml(config)))
        document = {**versions(), "config_sha256": digest(config)}
        write_atomically(self.path / "versions.json", json.dumps(document, indent=2) + "\n")

    def remove_outcome(self) -> None:
        """Remove the result and then the model of a run that is to make further steps, each at once."""
        self.result_path.unlink(missing_ok=True)
        flush_path(self.path)
        if self.model_path.is_symlink():
            self.model_path.unlink()
        elif self.model_path.exists():
            # a model that lacks some files would be in the way of the next start
            hidden = self.model_path.with_name(f".{self.model_path.name}.tmp-{os.getpid()}")
            commit(self.model_path, hidden)
            shutil.rmtree(hidden)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the measurements of the finished run."""
        write_sealed(self.result_path, to_json(result) + "\n")

    def read_result(self) -> dict[str, Any]:
        """Return the measurements of the finished run.

        Raises:
            DataError: there is no result.json, or it is not what was written.
        """
        remedy = "remove it, and the same command writes it again from the last checkpoint"
        text = read_sealed(self.result_path, remedy=remedy)
        try:
            result = json.loads(text)
            if not isinstance(result, dict):
                raise ValueError(type(result).__name__)
        except (ValueError, RecursionError) as error:
            raise DataError(
                str(self.result_path), expected="the measurements of a run", found=str(error), remedy=remedy
            ) from None
        return result

    def note(self, step: int, event: str, **facts: Any) -> None:
        """Add a line to events.jsonl; if it cannot be written, it is lost with a warning, not the run."""
        line = json.dumps({"step": step, "event": event, **redact_values(facts)}, default=str) + "\n"
        try:
            with open(self.events_path, "a", encoding="utf-8", opener=no_follow) as file:
                file.write(line)
        except OSError as error:
            warnings.warn(f"{self.events_path} is not written: {error.strerror or error}", stacklevel=2)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl; one that is not whole, as after a loss of power, is left out.

        Raises:
            DataError: the file cannot be read.
        """
        return _read_log(self.metrics_path)

    def read_events(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of events.jsonl, as `read_metrics` does."""
        return _read_log(self.events_path)

    def logged_at(self, step: int) -> dict[str, Any]:
        """Return the last numbers that were logged after this many training steps; none if there are none."""
        logged = [line for line in self.read_metrics() if line["step"] == step and "loss" in line]
        return logged[-1] if logged else {}

    def mark_preempted(self, cause: str, message: str) -> None:
        """Leave the marker that the run was asked to stop and can be continued; `unmark` removes it."""
        write_atomically(self.marker_path, json.dumps({"cause": cause, "message": message}, indent=2) + "\n")

    def unmark(self) -> None:
        """Remove the marker: the run has been continued."""
        self.marker_path.unlink(missing_ok=True)


def _read_log(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError, RecursionError):
                    found = json.loads(line)
                    if isinstance(found, dict) and isinstance(found.get("step"), int):
                        yield found
    except OSError as error:
        raise DataError(
            str(path),
            expected="a readable log",
            found=error.strerror or str(error),
            remedy="move it away: the run needs it only to know how far it was",
        ) from None


def environment(device: torch.device) -> dict[str, str | int]:
    """Return what the bits of a training step depend on besides its config and the number of processes."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    found = versions()
    del found["python"]
    return {**found, "device": f"{device.type} {kind}"}


def versions() -> dict[str, str | int]:
    """Return the versions and the number of threads on which the bits of a run depend."""
    return {
        "metatokens": version("metatokens"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
