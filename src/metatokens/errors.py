"""Errors that a user can cause, each one line and each with its exit code.

The command line prints the message and ends with `exit_code`; a traceback is shown only with `--debug`.
Exit codes: 2 usage or config, 3 data integrity, 4 checkpoint integrity, 5 numeric, 6 resource,
75 preempted after a good save.
"""

import errno
import shutil
from pathlib import Path
from typing import Self

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # what a write gives where there is no room


class MetaTokensError(Exception):
    """Base of every error that names its cause and its remedy in one line."""

    exit_code = 1
    is_repeated = False
    """Whether another process has the same error and says it."""

    def __init__(self, what: str, *, expected: str, found: str, remedy: str) -> None:
        """Compose the line `what: expected ..., found ...; remedy`."""
        super().__init__(" ".join(f"{what}: expected {expected}, found {found}; {remedy}".split()))

    @classmethod
    def plain(cls, what: str, *, happened: str, remedy: str) -> Self:
        """Return the error `what: happened; remedy`, where no value was expected in the place of another."""
        return cls.__new__(cls, " ".join(f"{what}: {happened}; {remedy}".split()))

    @classmethod
    def repeat(cls, line: str) -> Self:
        """Return the error of another process, whose line this is."""
        error = cls.__new__(cls, line)
        error.is_repeated = True
        return error


class UsageError(MetaTokensError):
    """A wrong argument, preset, key or combination of settings."""

    exit_code = 2


class DataError(MetaTokensError):
    """A missing, malformed, truncated or altered input file or token shard."""

    exit_code = 3


class CheckpointError(MetaTokensError):
    """A checkpoint that is incomplete, altered or made with another config."""

    exit_code = 4


class NumericError(MetaTokensError):
    """A loss or a gradient that is not finite."""

    exit_code = 5


class ResourceError(MetaTokensError):
    """Too little disk or memory."""

    exit_code = 6

    @classmethod
    def no_room(cls, path: Path, error: BaseException) -> Self:
        """Return the error of a path that could not be written, with what is free on its disk."""
        disk = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        return cls(
            str(path),
            expected="room to write it",
            found=f"{error}, {shutil.disk_usage(disk).free} bytes free",
            remedy="free some space and start again",
        )


class Preempted(Exception):
    """The run was asked to stop by a signal and saved a checkpoint first."""

    exit_code = 75
    is_repeated = False
