"""experiments/decomposition."""

from typing import Any

from measured.source import load, percent
from metatokens.replication.solve_times import ratio_text


def solve_contrasts(task: str, at_equal: str, verdict: str) -> int:
    """Return how many of the contrasts of E1 have a verdict; `at_equal` is steps or operations."""
    return sum(row["verdict"] == verdict for row in _task(task)[f"at_equal_{at_equal}"])


def solve_ratio(task: str, first: str, second: str) -> str:
    """Return the ratio of the steps of two arms, with its interval, or its bound."""
    return ratio_text(_contrast(task, "at_equal_steps", first, second))


def solve_p(task: str, first: str, second: str) -> str:
    """Return the p-value of a difference of two arms at equal steps, corrected after Holm."""
    return f"{_contrast(task, 'at_equal_steps', first, second)['p_holm']:.3f}"


def solve_finds(task: str, first: str, second: str) -> str:
    """Return the smallest ratio that the design finds in 80% of cases, with the spread of two arms."""
    ratio = _contrast(task, "power", first, second)["smallest_ratio"]
    return "none" if ratio is None else f"{ratio:.2f}"


def solve_finds_equal(task: str, first: str, second: str) -> str:
    """Return how often the design finds equal arms equivalent, with the spread of two arms."""
    return percent(_contrast(task, "power", first, second)["equal_found_equivalent"])


def solve_seeds(task: str) -> int:
    """Return how many seeds every arm has finished."""
    return len(_task(task)["seeds"])


def solve_solved(task: str, arm: str) -> int:
    """Return how many trainings of an arm have solved the task."""
    return int(_arm(task, arm)["solved"])


def solve_censored(task: str, arm: str) -> int:
    """Return how many trainings of an arm ended without solving the task."""
    return int(_arm(task, arm)["censored"])


def _task(task: str) -> dict[str, Any]:
    tasks = (one for part in ("e1", "e1-list") for one in load(f"experiments/decomposition/{part}.json")["tasks"])
    return dict(next(one for one in tasks if one["task"] == task))


def _arm(task: str, arm: str) -> dict[str, Any]:
    (row,) = [row for row in _task(task)["arms"] if row["arm"] == arm]
    return dict(row)


def _contrast(task: str, table: str, first: str, second: str) -> dict[str, Any]:
    (row,) = [row for row in _task(task)[table] if (row["first"], row["second"]) == (first, second)]
    return dict(row)


NAMES = (
    solve_censored,
    solve_contrasts,
    solve_finds,
    solve_finds_equal,
    solve_p,
    solve_ratio,
    solve_seeds,
    solve_solved,
)
