"""Processes of their own that start in milliseconds, for tests that kill them or let several work together.

They are forked from a server that has imported the package once, which takes seconds.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["metatokens.training.finetuning", "metatokens.training.pretraining", "torch._dynamo"]
)  # DDP imports dynamo


def run_all(target: Callable[..., None], each: Sequence[tuple[Any, ...]], *, seconds: float) -> None:
    """Run a process for each tuple of arguments, at once; all must end well, and none takes much longer."""
    started = [processes.Process(target=target, args=arguments) for arguments in each]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(seconds)
            assert process.exitcode == 0
    finally:
        for process in started:
            process.kill()


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
