"""The folder of a new dataset: its place is checked, locked, filled under a hidden name, and renamed at the end."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from metatokens.data.shard_writer import holds_finished_shards
from metatokens.data.shards import MANIFEST_NAME
from metatokens.errors import FULL_DISK, MetaTokensError, ResourceError, UsageError
from metatokens.storage import hold_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_TOOLS = ("metatokens", "numpy", "tokenizers", "tiktoken")


def tool_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that make tokens, for the manifest."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _TOOLS}


def check_place(out: Path) -> None:
    """Refuse a path at which the finished folder could not be put.

    Raises:
        UsageError: It cannot be made or written, or is the root of a mounted disk.
    """
    try:
        place = out.resolve()
        _partial_folder(place).exists()
        existing = next(path for path in place.parents if path.exists())
    except OSError as error:  # a name too long, a folder that may not be entered
        raise disk_error(out, error) from error
    except RuntimeError as error:
        raise disk_error(out, OSError(errno.ELOOP, os.strerror(errno.ELOOP))) from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        number = errno.EACCES if existing.is_dir() else errno.ENOTDIR
        raise disk_error(out, OSError(number, os.strerror(number)))
    if place.is_mount():
        raise UsageError(
            str(out),
            expected="a folder that the finished one can replace",
            found="the root of a mounted disk",
            remedy=f"choose a folder in it, such as {out / 'tokens'}",
        )


def check_free(out: Path) -> None:
    """Refuse a path that is taken, except by an empty folder.

    Raises:
        UsageError: It is taken.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a prepared dataset" if (out / MANIFEST_NAME).exists() else "other files"
        raise UsageError(
            str(out), expected="a folder that does not exist", found=what, remedy="choose another, or remove it"
        )


def check_unstarted(out: Path) -> None:
    """Refuse a path whose dataset is begun, for work that cannot go on with what is finished.

    Raises:
        UsageError: The hidden folder beside it holds finished work.
    """
    folder = _partial_folder(out.resolve())
    is_whole = (folder / MANIFEST_NAME).exists()
    if is_whole or holds_finished_shards(folder):
        raise UsageError(
            str(folder),
            expected="no finished work of a command that was interrupted",
            found="a finished dataset" if is_whole else "finished shards of `metatokens prepare`",
            remedy="rename it" if is_whole else "run that command again, remove the folder or choose another --out",
        )


@contextmanager
def locked(out: Path, waiting: Callable[[str], None] | None) -> Iterator[None]:
    """Keep other processes from `out`.

    Args:
        out: The folder.
        waiting: Called with a line of text if another process has it, which is then waited for; None refuses.

    Raises:
        UsageError: Another process has it and is not waited for.
    """
    lock = out.parent / f".{out.name}.lock"
    work = "another `metatokens prepare` or `metatokens adopt` is writing this folder"
    with hold_lock(lock, folder=out, work=work, waiting=waiting):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, under its lock.

    After an error, a folder with finished work stays and the error names it; any other is removed.

    Raises:
        UsageError: `out` is taken.
    """
    check_free(out)  # again, now that no other process can make it
    # the lock ends with its process, so a hidden folder that exists now was left by a killed or failed run
    folder = _partial_folder(out)
    if folder.is_symlink():
        raise disk_error(folder, OSError(errno.ELOOP, os.strerror(errno.ELOOP)))
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except (MetaTokensError, OSError) as error:
        failure = disk_error(out, error) if isinstance(error, OSError) else error
        _keep_finished_work(folder, failure)
        raise failure from error.__cause__


def disk_error(out: Path, error: OSError) -> MetaTokensError:
    """Return the error for a dataset that could not be written to `out`."""
    if error.errno in FULL_DISK:
        free = shutil.disk_usage(next(p for p in out.absolute().parents if p.exists())).free
        return ResourceError(
            str(out),
            expected="room for the token shards",
            found=f"{error.strerror}, {free} bytes free",
            remedy="free some disk or choose another --out",
        )
    return UsageError(
        str(out),
        expected="a folder that can be made and written",
        found=error.strerror or str(error),
        remedy="choose another --out",
    )


def _partial_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _keep_finished_work(folder: Path, error: MetaTokensError) -> None:
    """Add to the error's message where the finished shards are kept; remove a folder that has none."""
    if (folder / MANIFEST_NAME).exists():
        kept = f"the finished dataset is kept in {folder}: rename it"
    elif holds_finished_shards(folder):
        kept = f"the finished shards are kept in {folder}, and the same command takes them over"
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return
    error.args = (f"{error}; {kept}",)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
