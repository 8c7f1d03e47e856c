"""What a verb prints: its result on standard output, what it says meanwhile on standard error."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any


def emit(options: argparse.Namespace, result: Any, show: Callable[[], None]) -> int:
    """Write the result as JSON, or show it to a person."""
    if options.json:
        tree = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
        print(json.dumps(tree, indent=2, default=str))
    else:
        show()
    return 0


def say(line: str) -> None:
    """Say on standard error what is going on."""
    print(line, file=sys.stderr, flush=True)
