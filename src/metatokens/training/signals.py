"""Signals that ask a run to end; the run saves a checkpoint first.

Schedulers send SIGTERM, or SIGUSR1 or SIGUSR2 some time before their limit. A terminal or connection that closes sends
SIGHUP. By default each of them ends a process at once.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

ALWAYS = (signal.SIGTERM, signal.SIGINT)
UNLESS_HANDLED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Left alone if they are handled or ignored already, as under `nohup`."""


@contextlib.contextmanager
def collect_stop_signals() -> Iterator[list[int]]:
    """Collect signals that ask to stop in a list; a second signal of the same kind takes its usual effect."""
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
