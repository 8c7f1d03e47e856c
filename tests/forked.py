"""Processes of their own that start in milliseconds, for tests that kill them or let several work together.

They are forked from a server that has imported the package once, which takes seconds.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["metatokens.training.finetuning", "metatokens.training.pretraining", "torch._dynamo"]
)  # DDP imports dynamo


def run_all(target: Callable[..., None], each: Sequence[tuple[Any, ...]], *, seconds: float) -> None:
    """Run a process for each tuple of arguments, at once; all must end well, and none takes much longer."""
    with TemporaryDirectory() as folder:
        errors = [Path(folder, str(number)) for number in range(len(each))]
        runs = zip(errors, each, strict=True)
        started = [processes.Process(target=_tell, args=(target, *run)) for run in runs]
        try:
            for process in started:
                process.start()
            for process in started:
                process.join(seconds)
            codes = [process.exitcode for process in started]
            told = [error.read_text() for error in errors if error.exists()]
            assert codes == [0] * len(codes), f"exit codes {codes}, None is still running: {told}"
        finally:
            for process in started:
                process.kill()


def _tell(target: Callable[..., None], errors: Path, arguments: tuple[Any, ...]) -> None:
    """Call a function; its error goes to a file too, since nobody sees what a process prints."""
    try:
        target(*arguments)
    except BaseException:
        errors.write_text(traceback.format_exc())
        raise


def start_command(arguments: Sequence[str], errors: Path) -> Any:
    """Start `metatokens` with these arguments; its exit code is the process's, its standard error goes to a file."""
    process = processes.Process(target=_command, args=(arguments, errors))
    process.start()
    return process


def _command(arguments: Sequence[str], errors: Path) -> None:
    from metatokens.cli import main

    with errors.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(main(arguments))
