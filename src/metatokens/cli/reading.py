"""What verbs that read text have in common: how the text is read, and how far they have come."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from metatokens.cli.arguments import at_least
from metatokens.cli.output import say

if TYPE_CHECKING:
    from metatokens.data.sources import SourceOptions

SOURCE_HELP = (
    "a .txt, .jsonl, .json (.gz, .zst, .bz2, .xz too) or .parquet file, a folder, a dataset id on the hub, or "
    "python-docs"
)
_TERMINAL_SECONDS = 0.5
_PIPE_SECONDS = 30.0


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a source is read, one for each field of `SourceOptions`."""
    parser.add_argument("--text-field", default="text", help="column of json, parquet and datasets that holds the text")
    parser.add_argument("--config-name", help="configuration of a Hugging Face dataset, such as en")
    parser.add_argument("--split", default="train", help="split of a Hugging Face dataset")
    parser.add_argument("--max-documents", type=at_least(1), help="stop after so many documents")
    parser.add_argument(
        "--on-bad-text",
        choices=("error", "replace", "skip"),
        default="error",
        help="for text that is not valid UTF-8, or begins with a byte order mark; skip also leaves out malformed rows",
    )
    parser.add_argument(
        "--max-document-bytes", type=at_least(1), default=64 << 20, help="longest document that is not cut or refused"
    )


def source_options(options: argparse.Namespace) -> "SourceOptions":
    """Return what the flags of `add_source_options` say."""
    from dataclasses import fields

    from metatokens.data.sources import SourceOptions

    return SourceOptions(**{field.name: getattr(options, field.name) for field in fields(SourceOptions)})


class Progress:
    """Shows on standard error how far some work has come: in place on a terminal, else a line now and then.

    Work that is done within the first interval says nothing.
    """

    def __init__(self) -> None:
        self._in_place = sys.stderr.isatty()
        self._interval = _TERMINAL_SECONDS if self._in_place else _PIPE_SECONDS
        self._last = time.monotonic()
        self._is_line_open = False

    def show(self, text: str) -> None:
        """Show where the work is, unless that was shown a moment ago."""
        if time.monotonic() - self._last < self._interval:
            return
        self._last = time.monotonic()
        if self._in_place:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._is_line_open = True
        else:
            say(text)

    def close(self) -> None:
        """End the line that is open."""
        if self._is_line_open:
            print(file=sys.stderr, flush=True)
            self._is_line_open = False

    def say(self, text: str) -> None:
        """Say what begins now, on a line of its own."""
        self.close()
        say(text)
