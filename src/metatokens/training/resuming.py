"""Resuming: it finds the checkpoint that a run continues from, and refuses one of another run or of other data."""

import shutil
from pathlib import Path

from metatokens.config.schema import RunConfig
from metatokens.errors import CheckpointError, DataError, ResourceError
from metatokens.training.checkpoint import TrainingState, find_checkpoint, read_state
from metatokens.training.distributed import Processes
from metatokens.training.run_folder import RunFolder, differences_from_checkpoint, run_sha256

BYTES_PER_PARAMETER_OF_CHECKPOINT = 12  # float32 weight and two moments


def find_start(
    config: RunConfig, folder: RunFolder, content_id: str, processes: Processes
) -> tuple[Path | None, TrainingState]:
    """Return the checkpoint that a run continues from and its state; None and a fresh state for a new run.

    Every process of the run must call this; see `find_checkpoint`.

    Raises:
        CheckpointError: if there are checkpoints but none that this run can continue from, or if there were some.
        DataError: if the newest one was made with other data or initial weights.
    """
    path = find_checkpoint(folder.checkpoints_path, processes)
    if path is None:
        with processes.raise_together():
            if processes.is_main:
                _check_new(config, folder)
        return None, TrainingState(0, content_id, 1)
    with processes.raise_together():
        state = read_state(path)
        if state.content_id != content_id:
            raise DataError(
                str(folder.path),
                expected=f"the data and weights that the run began with, content_id {state.content_id}",
                found=content_id,
                remedy="pass the same data and weights, or choose another --out",
            )
        _check_run(config, path, state)
    return path, state


def _check_new(config: RunConfig, folder: RunFolder) -> None:
    """Refuse to start from scratch a run that has gone past its first checkpoint."""
    furthest = max((line["step"] for line in folder.read_metrics() if "loss" in line), default=0)
    settings = folder.stored(type(config)) if folder.config_path.exists() else config
    interval = settings.checkpoint.interval_steps
    first = settings.total_steps if interval is None else min(interval, settings.total_steps)
    # a step is logged before it is saved, and a save in the background is known to be there when the next one begins
    if furthest > first * (2 if settings.checkpoint.background else 1):
        raise CheckpointError(
            str(folder.checkpoints_path),
            expected=f"the checkpoints of a run that has logged step {furthest} and saves after step {first}",
            found="none",
            remedy="put them back, or start anew with another --out",
        )


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


def check_disk(folder: RunFolder, num_parameters: int) -> None:
    """Raise ResourceError unless the disk has room for two checkpoints."""
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
