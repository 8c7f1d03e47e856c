"""What verbs that read text share: the flags for reading it, and their progress."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from metatokens.cli.arguments import at_least
from metatokens.cli.output import say
from metatokens.errors import printable

if TYPE_CHECKING:
    from metatokens.data.sources import SourceOptions

SOURCE_HELP = (
    "a .txt, .jsonl, .json (.gz, .zst, .bz2, .xz too) or .parquet file, a folder, a dataset id on the hub, or "
    "python-docs"
)
_TERMINAL_SECONDS = 0.5
_PIPE_SECONDS = 10.0
_FIRST_SECONDS = 2.0


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags for reading a source, one for each field of `SourceOptions`."""
    parser.add_argument("--text-field", default="text", help="column of json, parquet and datasets that holds the text")
    parser.add_argument("--config-name", help="configuration of a Hugging Face dataset, such as en")
    parser.add_argument("--split", default="train", help="split of a Hugging Face dataset")
    parser.add_argument("--max-documents", type=at_least(1), help="read at most this many documents")
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
    """Return the options that the flags of `add_source_options` set."""
    from dataclasses import fields

    from metatokens.data.sources import SourceOptions

    return SourceOptions(**{field.name: getattr(options, field.name) for field in fields(SourceOptions)})


class Progress:
    """Shows progress on standard error: in place on a terminal, elsewhere as a line now and then.

    Work that ends within the first interval shows nothing.
    """

    def __init__(self) -> None:
        self._in_place = sys.stderr.isatty()
        self._interval = _TERMINAL_SECONDS if self._in_place else _PIPE_SECONDS
        # elsewhere the first line comes sooner than the next ones
        self._last = time.monotonic() - max(0.0, self._interval - _FIRST_SECONDS)
        self._first: tuple[float, float] | None = None
        self._is_line_open = False
        self._is_shown = False

    def show(self, text: str, share: float | None = None) -> None:
        """Show the progress, unless it was shown a moment ago; with the share that is done, the time left too."""
        now = time.monotonic()
        if share is not None and self._first is None:
            self._first = now, share
        is_end = share is not None and share >= 1 and self._is_shown
        if now - self._last < self._interval and not is_end:
            return
        self._is_shown = not is_end
        self._last = now
        if share is not None:
            text += f" ({share:.0%}){self._time_left(now, share)}"
        if self._in_place:
            print(f"\r\x1b[K{printable(text)}", end="", file=sys.stderr, flush=True)
            self._is_line_open = True
        else:
            say(text)

    def _time_left(self, now: float, share: float) -> str:
        """Write the time left at the pace since the first share."""
        from metatokens.report.numbers import format_seconds

        start, first_share = self._first or (now, share)
        if not first_share < share < 1:
            return ""
        return f", {format_seconds((now - start) * (1 - share) / (share - first_share))} left"

    def close(self) -> None:
        """End an open line."""
        if self._is_line_open:
            print(file=sys.stderr, flush=True)
            self._is_line_open = False

    def say(self, text: str) -> None:
        """Print a message on a line of its own."""
        self.close()
        say(text)
