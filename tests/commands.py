"""The console command in this process: its outputs and its exit code."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

from metatokens.cli import main


class Done(NamedTuple):
    stdout: str
    stderr: str


def metatokens(*arguments: str | Path, code: int = 0) -> Done:
    """Run a command that ends with the exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            found = main([str(argument) for argument in arguments])
        except SystemExit as exit_of_help:
            found = exit_of_help.code
    assert found == code, err.getvalue()
    return Done(out.getvalue(), err.getvalue())


def error_line(*arguments: str | Path, code: int) -> str:
    """Return the one line of a command that fails with the exit code."""
    done = metatokens(*arguments, code=code)
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert "expected" in lines[0]
    assert "found" in lines[0]
    return lines[0]
