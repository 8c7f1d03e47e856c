"""Errors that a user can cause; each has a message of one line and an exit code.

The command line prints the message and exits with `exit_code`; it shows a traceback only with `--debug`.
Exit codes: 2 usage or config, 3 data integrity, 4 checkpoint integrity, 5 numeric, 6 resource,
75 preempted after a good save.
"""

import errno
import re
import shutil
from pathlib import Path
from typing import Any, Self

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # the errors of a write without room


# control characters but tab and line end; a picture takes one cell of a terminal
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


_SECRETS = (
    # the user and the password of an address; a Path has made one slash of two
    (re.compile(r"(:/{1,2})[^\s/@]+(?=@)"), r"\1REDACTED"),
    (
        re.compile(r"([?&][^=&\s]*(?:token|key|secret|password|signature)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE),
        r"\1REDACTED",
    ),
    (re.compile(r"\b(?:hf|gh[oprsu]|github_pat|glpat|sk)[_-][A-Za-z0-9_-]{16,}"), "REDACTED"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "REDACTED"),
)


def redact(text: str) -> str:
    """Return a text with REDACTED for tokens of well-known services and for credentials in an address or its query."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redact_values(tree: Any) -> Any:
    """Return a tree of plain values with each text in it redacted."""
    if isinstance(tree, dict):
        return {key: redact_values(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_values(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def printable(text: str) -> str:
    """Return a text with a picture for each control character but tab and line end, so that it commands no terminal."""
    return text.translate(_PICTURES)


def _one_line(text: str) -> str:
    return printable(redact(" ".join(text.split())))


class MetaTokensError(Exception):
    """Base of all errors that name their cause and remedy in one line."""

    exit_code = 1
    is_repeated = False
    """Whether another process raised this error first and reports it."""

    def __init__(self, what: str, *, expected: str, found: str, remedy: str) -> None:
        """Compose the line `what: expected ..., found ...; remedy`."""
        super().__init__(_one_line(f"{what}: expected {expected}, found {found}; {remedy}"))

    @classmethod
    def plain(cls, what: str, *, happened: str, remedy: str) -> Self:
        """Return the error `what: happened; remedy`, for a problem without an expected and a found value."""
        return cls.__new__(cls, _one_line(f"{what}: {happened}; {remedy}"))

    @classmethod
    def repeat(cls, line: str) -> Self:
        """Return the error that another process raised with this line."""
        error = cls.__new__(cls, line)
        error.is_repeated = True
        return error


class UsageError(MetaTokensError, ValueError):
    """A wrong argument, preset, key or combination of settings; in Python a kind of ValueError."""

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
        """Return the error for a path that could not be written; it says how much of the disk is free."""
        disk = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        return cls(
            str(path),
            expected="room to write it",
            found=f"{error}, {shutil.disk_usage(disk).free} bytes free",
            remedy="free some space and start again",
        )


class Preempted(BaseException):
    """The work was asked to stop and can be continued: what had to be saved is saved.

    Like KeyboardInterrupt it may be raised anywhere, so no handler of ordinary errors may take it for one of them.
    """

    exit_code = 75
    is_repeated = False

    @classmethod
    def repeat(cls, line: str) -> Self:
        """Return the exception that another process raised with this line."""
        preempted = cls(line)
        preempted.is_repeated = True
        return preempted
