"""The watch over the processes of a run: it names the one that died or hangs, and ends the others in bounded time.

Each process has a thread that writes a heartbeat and the place of its main thread into the store through which the
processes met. A process whose heartbeat stands still has died or is frozen. One that lives but has not reached the
place where the others wait for it hangs.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from metatokens.errors import ResourceError

_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 5.0  # without a beat for so long a process does not live, though its machine may be busy


class PeerWatch:
    """Reports where this process is, and what has become of the others."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        """Take the store of the rendezvous; `start` starts the thread."""
        self._store = PrefixStore("watch", store.clone())
        self._rank, self._world_size = rank, world_size
        self._place, self._number, self._deadline = "set-up", 0, float("inf")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start to report."""
        self._report(0)
        self._thread.start()

    def stop(self) -> None:
        """Stop reporting; the others take this process for dead then."""
        self._stopped.set()

    def enter(self, place: str, seconds: float) -> None:
        """Say where the main thread is from now on, such as "step 12", and after how many seconds to give up there."""
        self._place, self._number, self._deadline = place, self._number + 1, time.monotonic() + seconds

    def arrive(self) -> None:
        """Say that the main thread now waits for the others; all processes arrive equally often."""
        self._number += 1

    def explain(self) -> ResourceError:
        """Return the error that names the processes that died or hang; it takes some seconds to find out."""
        before = self._read()
        time.sleep(_SILENCE_SECONDS)
        now = self._read()
        where, number = self._place, self._number
        alive = [rank for rank in range(self._world_size) if rank == self._rank or now.get(rank) != before.get(rank)]
        silent = [rank for rank in range(self._world_size) if rank not in alive]
        if not now and self._rank:  # rank 0 keeps the store, unless torchrun does
            alive, silent = list(range(1, self._world_size)), [0]
        numbers = {rank: now[rank][1] if rank != self._rank else number for rank in alive if rank in now}
        behind = [rank for rank, its in numbers.items() if its < max(numbers.values())]
        if silent:
            happened = f"{_ranks(silent)} died or does not run (last seen in {now.get(silent[0], (0, 0, 'set-up'))[2]})"
        elif behind:
            happened = f"{_ranks(behind)} hangs in {now[behind[0]][2]}"
        else:
            happened = "the processes wait for one another, and none says which hangs"
        error = ResourceError.plain(
            where, happened=happened, remedy="the same command continues from the last checkpoint"
        )
        error.is_repeated = self._rank != min(alive)
        return error

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(_BEAT_SECONDS):
            beat += 1
            with suppress(RuntimeError):  # the store is gone, with the process that keeps it
                self._report(beat)
            if time.monotonic() > self._deadline:
                self._give_up()

    def _report(self, beat: int) -> None:
        self._store.set(str(self._rank), f"{beat} {self._number} {self._place}")

    def _read(self) -> dict[int, tuple[int, int, str]]:
        seen = {}
        with suppress(RuntimeError):  # as in `_run`
            for rank in range(self._world_size):
                if self._store.check([str(rank)]):
                    beat, number, place = self._store.get(str(rank)).decode().split(" ", 2)
                    seen[rank] = int(beat), int(number), place
        return seen

    def _give_up(self) -> None:
        """End this process from the thread: the main thread waits inside a library, where no exception reaches it."""
        self._deadline = float("inf")
        number = self._number
        # `explain` needs the beats of this process to go on for the others
        report = threading.Thread(target=self._explain_and_exit, args=(number,), name="report", daemon=True)
        report.start()

    def _explain_and_exit(self, number: int) -> None:
        error = self.explain()
        if self._number != number:  # it was only slow
            return
        if not error.is_repeated:
            print(f"metatokens: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the command line cannot
        os._exit(error.exit_code)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
