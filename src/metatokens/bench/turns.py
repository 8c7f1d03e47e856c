"""Contenders take turns, round by round, so that a drift of the machine's speed affects all of them alike.

Figures are medians over rounds with the middle half of them; a ratio is taken within each round.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

Turn: TypeAlias = Callable[[], Mapping[str, float]]
"""Does the work of a contender once and returns the seconds of each part of it."""
Rounds: TypeAlias = dict[str, dict[str, list[float]]]
"""By contender and part, the seconds of each round."""


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    """A quarter of the rounds are below."""
    high: float
    """A quarter of the rounds are above."""


def take_turns(
    turns: Mapping[str, Turn], *, rounds: int, warmup: int = 1, on_round: Callable[[int], None] | None = None
) -> Rounds:
    """Give every contender one turn per round, after `warmup` rounds that do not count.

    Every second round goes in the opposite order, so that a steady drift within a round cancels.

    Args:
        turns: by the contenders' names.
        rounds: how many count.
        warmup: how many come before.
        on_round: called before each round with its index, warm-up included.
    """
    seconds: Rounds = {name: {} for name in turns}
    for index in range(warmup + rounds):
        if on_round is not None:
            on_round(index)
        for name in turns if index % 2 == 0 else reversed([*turns]):
            parts = turns[name]()
            if index >= warmup:
                for part, value in parts.items():
                    seconds[name].setdefault(part, []).append(value)
    return seconds


def time_in_turns(tasks: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Let tasks of a single part take turns, and return the seconds of each in each round."""
    turns: dict[str, Turn] = {name: lambda task=task: {"all": timed(task)} for name, task in tasks.items()}  # type: ignore[misc]
    return {name: parts["all"] for name, parts in take_turns(turns, rounds=rounds, warmup=warmup).items()}


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that some work takes; on a GPU, until its work there is done."""
    _wait_for_device()
    started = time.perf_counter()
    work()
    _wait_for_device()
    return time.perf_counter() - started


def spread(values: Iterable[float]) -> Spread:
    """Return median and quartiles of the rounds."""
    ordered = sorted(values)
    if len(ordered) == 1:
        ordered *= 2
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(above: Sequence[float], below: Sequence[float], scale: float = 1) -> Spread:
    """Return the ratio of two contenders' seconds over the rounds, each within its own round, times `scale`."""
    return spread(scale * one / other for one, other in zip(above, below, strict=True))


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
