"""experiments/decomposition."""

import math
from statistics import stdev
from typing import Any

from measured.source import load, span


def solve_contrasts(task: str, at_equal: str, verdict: str) -> int:
    """Return how many of the contrasts of E1 have a verdict; `at_equal` is steps or operations."""
    return sum(row["verdict"] == verdict for row in _task(task)[f"at_equal_{at_equal}"])


def solve_ratio(task: str, first: str, second: str) -> str:
    """Return the ratio of the steps of two arms, with its interval."""
    (row,) = [row for row in _task(task)["at_equal_steps"] if (row["first"], row["second"]) == (first, second)]
    return span(row["ratio"], ".2f")


def solve_censored(task: str, arm: str) -> int:
    """Return how many trainings of an arm ended without solving the task."""
    return int(_arm(task, arm)["censored"])


def solve_spread(task: str, arm: str) -> float:
    """Return the standard deviation of the log of an arm's steps, in which censored trainings have the last step."""
    return stdev(math.log(steps) for steps in _arm(task, arm)["steps"])


def _task(task: str) -> dict[str, Any]:
    (found,) = [one for one in load("experiments/decomposition/e1.json")["tasks"] if one["task"] == task]
    return dict(found)


def _arm(task: str, arm: str) -> dict[str, Any]:
    (row,) = [row for row in _task(task)["arms"] if row["arm"] == arm]
    return dict(row)


NAMES = (
    solve_censored,
    solve_contrasts,
    solve_ratio,
    solve_spread,
)
