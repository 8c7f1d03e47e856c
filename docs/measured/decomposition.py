"""experiments/decomposition."""

from measured.source import load, span


def solve_contrasts(task: str, at_equal: str, verdict: str) -> int:
    """Return how many of the contrasts of E1 have a verdict; `at_equal` is steps or operations."""
    (found,) = [one for one in load("experiments/decomposition/e1.json")["tasks"] if one["task"] == task]
    return sum(row["verdict"] == verdict for row in found[f"at_equal_{at_equal}"])


def solve_ratio(task: str, first: str, second: str) -> str:
    """Return the ratio of the steps of two arms, with its interval."""
    (found,) = [one for one in load("experiments/decomposition/e1.json")["tasks"] if one["task"] == task]
    (row,) = [row for row in found["at_equal_steps"] if (row["first"], row["second"]) == (first, second)]
    return span(row["ratio"], ".2f")


def solve_censored(task: str, arm: str) -> int:
    """Return how many trainings of an arm ended without solving the task."""
    (found,) = [one for one in load("experiments/decomposition/e1.json")["tasks"] if one["task"] == task]
    (row,) = [row for row in found["arms"] if row["arm"] == arm]
    return int(row["censored"])


NAMES = (
    solve_censored,
    solve_contrasts,
    solve_ratio,
)
