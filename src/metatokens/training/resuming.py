"""Resuming: it finds the checkpoint that a run continues from, and refuses one of another run or of other data.

It also says what a continuation changes: keys that the user has allowed, and whatever makes its bits differ from those
of a run that was never interrupted.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from metatokens.config.changes import differences_from_tree, remedy_for
from metatokens.config.loading import flatten
from metatokens.config.schema import RunConfig
from metatokens.errors import CheckpointError, DataError, ResourceError, UsageError
from metatokens.storage import file_sha256
from metatokens.training.checkpoint import (
    MANIFEST,
    TrainingState,
    find_checkpoint,
    read_state,
    step_folders,
    verify_checkpoint,
)
from metatokens.training.distributed import Processes
from metatokens.training.run_folder import RunFolder

BYTES_PER_PARAMETER_OF_CHECKPOINT = 12  # float32 weight and two moments
# keys that may change in a run, and with them the order in which numbers are added up
_BITS = ("training.micro_batch_blocks", "training.compile", "training.parallel.kind")


@dataclass(frozen=True)
class Resume:
    """How the user wants a run to continue."""

    path: Path | None = None
    """The checkpoint to continue from; None means the newest of the run that verifies."""
    allowed: tuple[str, ...] = ()
    """Keys of the config that may have changed; see `metatokens.config.changes`."""

    @classmethod
    def of(cls, path: str | Path | None, allowed: Sequence[str]) -> Self:
        """Return it from the arguments of a caller."""
        return cls(None if path is None else Path(path), tuple(allowed))


def find_start(
    config: RunConfig, folder: RunFolder, content_id: str, processes: Processes, resume: Resume
) -> tuple[Path | None, TrainingState]:
    """Return the checkpoint that a run continues from and its state; None and a fresh state for a new run.

    Every process of the run must call this; see `find_checkpoint`.

    Raises:
        CheckpointError: if there are checkpoints but none that this run can continue from, if there were some, or if
            the one that the user names is damaged.
        DataError: if the newest one was made with other data or initial weights.
        UsageError: if the user names one, and the run has gone on from another.
    """
    digest = _verify_named(resume, processes)
    path = find_checkpoint(folder.checkpoints_path, processes)
    if path is None or (digest is not None and file_sha256(path / MANIFEST) == digest):
        path, resumed_from = resume.path, digest
    else:
        resumed_from = None
    if path is None:
        with processes.raise_together():
            if processes.is_main:
                _check_logged(config, folder, begun=0)
                _check_begun_anew(config, folder)
        return None, TrainingState(0, content_id, 1)
    with processes.raise_together():
        state = read_state(path)
        if resumed_from is not None:
            state = replace(state, resumed_from=resumed_from)
            if processes.is_main and path == resume.path and not step_folders(folder.checkpoints_path):
                _check_logged(config, folder, begun=state.step)
        elif digest is not None and state.resumed_from != digest:
            raise UsageError(
                f"--resume {resume.path}",
                expected=f"the newest checkpoint of {folder.path}, or the one that this run was begun from",
                found=f"newer ones, up to {path.name}",
                remedy="choose another --out",
            )
        if state.content_id != content_id:
            raise DataError(
                str(folder.path),
                expected=f"the data and weights that the run began with, content_id {state.content_id}",
                found=content_id,
                remedy="pass the same data and weights, or choose another --out",
            )
        _check_run(config, path, state, resume)
    return path, state


def has_ended(config: RunConfig, state: TrainingState) -> bool:
    """Tell whether a run has no step left to make: all are done, or its task is solved."""
    rule = getattr(config, "solve", None)
    return state.step >= config.total_steps or (rule is not None and state.solved_evaluations >= rule.evaluations)


def changes_of_bits(state: TrainingState, config: RunConfig, found: dict[str, Any], world_size: int) -> Iterator[str]:
    """Yield each reason why the steps after a checkpoint may not have the bits that they would have had.

    Args:
        state: of the checkpoint.
        config: of the run that continues.
        found: `run_folder.environment` now.
        world_size: number of processes now.
    """
    if state.world_size != world_size:
        yield f"world_size {state.world_size}->{world_size}"
    for key, old in state.environment.items():
        if found.get(key) != old:
            yield f"{key} {old}->{found.get(key)}"
    if state.config is None:
        return
    for key, before, after in differences_from_tree(state.config, config, "the checkpoint"):
        yield f"{key} {before}->{after}"
    old_keys, new_keys = flatten(state.config), flatten(config.model_dump(mode="json"))
    for key in _BITS:
        if key in old_keys and old_keys[key] != new_keys[key]:
            yield f"{key.removeprefix('training.')} {old_keys[key]}->{new_keys[key]}"


def _verify_named(resume: Resume, processes: Processes) -> str | None:
    """Verify the checkpoint that the user names, and return the digest of its manifest; None without one."""
    if resume.path is None:
        return None
    with processes.raise_together():
        verify_checkpoint(resume.path, share=processes.node_share)
    return file_sha256(resume.path / MANIFEST)


def _check_logged(config: RunConfig, folder: RunFolder, *, begun: int) -> None:
    """Refuse to start again, after step `begun`, a run that has gone past its first checkpoint after that step."""
    furthest = max((line["step"] for line in folder.read_metrics() if "loss" in line), default=0)
    settings = folder.stored(type(config)) if folder.config_path.exists() else config
    interval = settings.checkpoint.interval_steps
    total = settings.total_steps
    first = total if interval is None else min((begun // interval + 1) * interval, total)
    # a step is logged before it is saved, and a save in the background is known to be there when the next one begins
    if furthest > first + (interval or 0) * settings.checkpoint.background:
        raise CheckpointError(
            str(folder.checkpoints_path),
            expected=f"the checkpoints of a run that has logged step {furthest} and saves after step {first}",
            found="none",
            remedy="put them back, or start anew with another --out",
        )


def _check_begun_anew(config: RunConfig, folder: RunFolder) -> None:
    """Refuse to start at step 0 a run that was begun from a checkpoint which now nobody names."""
    first = next((line["step"] for line in folder.read_metrics() if "loss" in line), 0)
    settings = folder.stored(type(config)) if folder.config_path.exists() else config
    has_continued = any(event.get("event") == "continued" for event in folder.read_events())
    if has_continued or first > max(settings.logging.interval_steps, config.logging.interval_steps):
        raise CheckpointError(
            str(folder.checkpoints_path),
            expected="a checkpoint, for the log says that this run did not begin at step 0",
            found="none",
            remedy="name the one that it was begun from with --resume, or start anew with another --out",
        )


def _check_run(config: RunConfig, path: Path, state: TrainingState, resume: Resume) -> None:
    """Refuse the checkpoint of another run."""
    remedy = "take the config that it was made with, or another --out"
    if state.config is None:
        raise CheckpointError(
            str(path),
            expected="a checkpoint with the config of its run",
            found="one made by an older version, which kept no config",
            remedy="go on with that version, or start anew with another --out",
        )
    for key, old, new in differences_from_tree(state.config, config, str(path), resume.allowed):
        raise CheckpointError(
            str(path),
            expected=f"a checkpoint of this config, {key} {new!r}",
            found=f"{old!r}",
            remedy=remedy_for(key, remedy),
        )
    if has_ended(config, state):
        for key, old, new in differences_from_tree(state.config, config, str(path)):
            raise UsageError(
                f"--allow-change {key}",
                expected=f"{old!r} for a run that has no step left after step {state.step}",
                found=f"{new!r}, which would train nothing",
                remedy="take the old value, lengthen the run, or choose another --out",
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
