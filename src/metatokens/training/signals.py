"""Signals that ask a run to end: it saves what it has first.

Schedulers send SIGTERM, or SIGUSR1 and SIGUSR2 some time before their limit; a terminal or connection that is closed
sends SIGHUP. By default each ends a process at once.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

ALWAYS = (signal.SIGTERM, signal.SIGINT)
UNLESS_HANDLED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Left alone where somebody handles or ignores them, as `nohup` does."""


@contextlib.contextmanager
def collect_stop_signals() -> Iterator[list[int]]:
    """Collect signals that ask to stop in a list; a second one of a kind acts at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(number, old[number])

    old: dict[int, Any] = {}
    left = (number for number in UNLESS_HANDLED if signal.getsignal(number) is signal.SIG_DFL)
    try:
        for taken in (*ALWAYS, *left):
            old[int(taken)] = signal.signal(taken, note)
    except ValueError:  # not in the main thread: the caller keeps its own handlers
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
