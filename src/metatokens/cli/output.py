"""What a verb prints: its result on standard output, its messages on standard error."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

from metatokens.storage import to_json


def emit(options: argparse.Namespace, result: Any, show: Callable[[], None]) -> int:
    """Print the result as JSON, with null for numbers that are not finite, or show it to a person."""
    if options.json:
        tree = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        print(to_json(tree))
    else:
        show()
    return 0


def say(line: str) -> None:
    """Print a message on standard error."""
    print(line, file=sys.stderr, flush=True)
