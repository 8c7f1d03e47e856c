"""What a verb prints: its result on standard output, its messages on standard error."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from metatokens.errors import printable, redact
from metatokens.storage import to_json


def emit(
    options: argparse.Namespace, result: Any, show: Callable[[], None], *, following: Sequence[Any] | None = None
) -> int:
    """Print the result as JSON, with null for numbers that are not finite, or show it to a person.

    Args:
        options: of the command; `json` decides.
        result: a dataclass or a tree of plain values.
        show: shows it.
        following: words of the next natural command, which a person is shown on standard error.
    """
    if options.json:
        tree = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        print(to_json(tree))
    else:
        show()
        if following:
            say(f"next: {shlex.join(map(str, following))}")
    return 0


def announce(options: argparse.Namespace, line: str) -> None:
    """Tell a person what the command is doing before its slow imports, unless they have been made already."""
    if not options.json and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        say(f"{line} ...")


def say(line: str) -> None:
    """Print a message on standard error."""
    print(printable(redact(line)), file=sys.stderr, flush=True)
