"""Requests to stop: signals, as schedulers and terminals send them, and a time limit of the user's own.

Schedulers send SIGTERM, or SIGUSR1 or SIGUSR2 some time before their limit, often to all processes of a job at once;
torchrun then sends its workers the same signal again. A terminal or connection that closes sends SIGHUP. By default
each of them ends a process at once.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from metatokens.errors import Preempted

ALWAYS = (signal.SIGTERM, signal.SIGINT)
UNLESS_HANDLED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Left alone if they are handled or ignored already, as under `nohup`."""
GRACE_SECONDS = 60.0
GRACE_SECONDS_OF_SIGINT = 3.0  # a person who presses Ctrl-C again means it
TIME_LIMIT = signal.SIGALRM


class StopRequest:
    """Whether the work has been asked to stop, and what asked; it is true from then on."""

    def __init__(self) -> None:
        """Begin without a request."""
        self.cause = ""
        """Name of the signal that came first, or "--stop-after"."""
        self._is_interruptible = False

    def __bool__(self) -> bool:
        """Tell whether there is a request."""
        return bool(self.cause)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a request raise Preempted inside the block, where nothing is lost if the work ends at any point."""
        before, self._is_interruptible = self._is_interruptible, True
        try:
            if self:
                raise self.preempted()
            yield
        finally:
            self._is_interruptible = before

    def preempted(self, when: str = "") -> Preempted:
        """Return the exception that ends the work; `when` says at which point, such as " after step 7"."""
        return Preempted(f"stopped by {self.cause}{when}; the same command continues from there")

    def note(self, number: int) -> None:
        """Take note of a signal; the first one counts."""
        is_first = not self.cause
        self.cause = self.cause or ("--stop-after" if number == TIME_LIMIT else signal.Signals(number).name)
        if is_first and self._is_interruptible:
            raise self.preempted()


@contextlib.contextmanager
def collect_stop_signals(stop_after: float | None = None) -> Iterator[StopRequest]:
    """Collect signals that ask to stop.

    For a grace period, repeats of a signal are ignored; after it a repeat takes its usual effect.

    Args:
        stop_after: seconds from now until the work asks itself to stop; None means never.
    """
    request = StopRequest()
    first_seen: dict[int, float] = {}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        grace = GRACE_SECONDS_OF_SIGINT if number == signal.SIGINT else GRACE_SECONDS
        if now - first_seen.setdefault(number, now) > grace:
            signal.signal(number, old[number])
            signal.raise_signal(number)
            return
        request.note(number)

    old: dict[int, Any] = {}
    left = (number for number in UNLESS_HANDLED if signal.getsignal(number) is signal.SIG_DFL)
    try:
        for taken in (*ALWAYS, *left):
            old[int(taken)] = signal.signal(taken, note)
        if stop_after is not None:
            old[int(TIME_LIMIT)] = signal.signal(TIME_LIMIT, note)
            signal.setitimer(signal.ITIMER_REAL, max(stop_after, 1e-3))
    except ValueError:  # not in the main thread: the caller keeps its own handlers
        yield request
        return
    try:
        yield request
    finally:
        if stop_after is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)
