"""The tasks of experiments/length-generalisation: what is right at longer lengths, and the steps to get there."""

import math
from functools import partial
from itertools import permutations
from statistics import fmean
from typing import Any

from measured.length_cells import (
    COUPLED,
    MULTIPLES,
    cells_of,
    encodings_with_more,
    is_more,
    mean_of,
    names_of,
    over_encodings,
    seeds_to_text,
)
from measured.source import span, table

RIGHT, MOST_SEEDS, ABOVE_GUESSES = 0.9, 0.8, 0.6  # the rules of its README; the last is about the guesses of parity
SEEDS_OF_AN_INTERVAL = 5  # with fewer it would be too narrow
ARMS_OF_POSITIONS = ("plain", "pause", "meta")


def _row(cell: Any, multiple: str) -> Any:
    return cell["evaluations"][0]["rows"][MULTIPLES.index(multiple)]


def _by_seed(cell: Any, multiple: str) -> dict[int, float]:
    """Return the share of answers right, seed by seed, at a multiple of the trained length."""
    row = _row(cell, multiple)
    return dict(zip(row["seeds"], row["sequence_by_seed"], strict=True))


def _generalises(cell: Any, multiple: str) -> bool:
    found = _by_seed(cell, multiple).values()
    return sum(share >= RIGHT for share in found) >= MOST_SEEDS * len(found)


def _right(cell: Any, multiple: str) -> str:
    """Write the share of answers right in percent, with its interval; of few seeds, one by one."""
    by_seed = _by_seed(cell, multiple)
    if len(by_seed) < SEEDS_OF_AN_INTERVAL:
        return seeds_to_text({seed: 100 * share for seed, share in by_seed.items()}, ".0f")
    return span(_row(cell, multiple)["sequence_accuracy"], ".0f", 100)


def _accuracy(cell: Any, multiple: str) -> str:
    text = _right(cell, multiple)
    return f"**{text}**" if _generalises(cell, multiple) else text


def _solved(cell: Any) -> int:
    return sum(one["solved"] for one in cell["trainings"])


def length_table(task: str) -> str:
    """Write every arm of a sweep: what it has right at each length, and how long it took to solve the task."""
    cells = cells_of(task)
    rows = []
    for (position, arm), cell in cells.items():
        costs = [f"{mean_of(cell, 'steps'):.0f}", f"{mean_of(cell, 'training_flops') / 1e9:.0f}"]
        accuracies = [_accuracy(cell, multiple) for multiple in MULTIPLES]
        name = [position, arm] if position else [arm, f"{cell['parameters']:,}"]
        rows.append([*name, *accuracies, f"{_solved(cell)} of {len(cell['trainings'])}", *costs])
    first = ["positions", "arm"] if any(position for position, _ in cells) else ["arm", "parameters"]
    return table([*first, *MULTIPLES, "solved", "steps", "10^9 operations"], rows)


def length_reach(*tasks: str) -> str:
    """Write the longest multiple of L up to which each encoding generalises, in the order of `ARMS_OF_POSITIONS`."""
    sweeps = {task: cells_of(task) for task in tasks}
    positions = list(dict.fromkeys(position for cells in sweeps.values() for position, _ in cells))

    def reach(cell: Any) -> str:
        good = [multiple for multiple in MULTIPLES if _generalises(cell, multiple)]
        unbroken = [a for a, b in zip(good, MULTIPLES, strict=False) if a == b]
        return unbroken[-1] if unbroken else "below L"

    def reaches(cells: dict[tuple[str, str], Any], position: str) -> str:
        return ", ".join(reach(cells[position, arm]) for arm in ARMS_OF_POSITIONS if (position, arm) in cells)

    rows = [[position, *(reaches(cells, position) for cells in sweeps.values())] for position in positions]
    return table(["positions", *(task.replace("-", " ") for task in tasks)], rows)


def length_right(task: str, position: str, arm: str, multiple: str) -> str:
    """Return the share of answers right in percent, with its interval; of few seeds, one by one."""
    return _right(cells_of(task)[position, arm], multiple)


def _rivals(task: str, *arms: str) -> list[Any]:
    """Return the cells of all encodings but position coupling, of these arms or of all."""
    return [cell for (name, arm), cell in cells_of(task).items() if name != COUPLED and (not arms or arm in arms)]


def length_solved(task: str, *arms: str) -> int:
    """Return how many trainings of some arms have solved the task, without position coupling."""
    return sum(_solved(cell) for cell in _rivals(task, *arms))


def length_encodings_solved(task: str, arm: str) -> int:
    """Return in how many encodings every training of an arm has solved the task, without position coupling."""
    return sum(_solved(cell) == len(cell["trainings"]) for cell in _rivals(task, arm))


def length_cells_generalising(task: str, multiple: str) -> int:
    """Return how many arms of a sweep generalise to a length, without position coupling."""
    return sum(_generalises(cell, multiple) for cell in _rivals(task))


def length_solved_and_right(task: str, multiple: str) -> int:
    """Return how many trainings that solved the task have enough right at a length, without position coupling."""
    return sum(
        one["solved"] and _by_seed(cell, multiple)[one["seed"]] >= RIGHT
        for cell in _rivals(task)
        for one in cell["trainings"]
    )


def length_best(task: str, multiple: str) -> str:
    """Return the encoding that has most right at a length, its arm and its percentage.

    Of those that generalise to L, and without position coupling.
    """
    good = [cell for cell in _rivals(task) if _generalises(cell, "L")]
    best = max(good, key=lambda cell: float(_row(cell, multiple)["sequence_accuracy"]["estimate"]))
    labels = best["labels"]
    return f"`{labels['position']}` in `{labels['arm']}`, with {_right(best, multiple)}"


def length_chance(task: str, multiple: str) -> str:
    """Return what guesses have right, in percent."""
    return f"{100 * _row(_rivals(task, 'plain')[0], multiple)['chance']:.0f}"


def _steps_by_seed(cell: Any) -> dict[int, float]:
    return {one["seed"]: one["steps"] for one in cell["trainings"]}


def length_ahead_in(task: str, first: str, second: str, multiple: str) -> str:
    """Return the encodings in which an arm has more right than another with every seed, or "no encoding"."""
    right = {key: _by_seed(cell, multiple) for key, cell in cells_of(task).items()}
    return names_of(encodings_with_more(right, first, second))


def length_ahead(task: str, first: str, second: str, multiple: str) -> int:
    """Return in how many encodings an arm has more answers right than another with every seed."""
    right = {key: _by_seed(cell, multiple) for key, cell in cells_of(task).items()}
    return len(encodings_with_more(right, first, second))


def length_slower(task: str, first: str, second: str) -> str:
    """Return the encodings in which an arm takes more steps than another with every seed, or "no encoding"."""
    steps = {key: _steps_by_seed(cell) for key, cell in cells_of(task).items()}
    return names_of(encodings_with_more(steps, first, second))


def length_pooled_steps(task: str, first: str, second: str, without: str = "") -> str:
    """Return the ratio of the steps of two arms, seed by seed; the geometric mean over encodings but for some."""

    def log_ratio(own: Any, other: Any, seed: int) -> float:
        return math.log(_steps_by_seed(own)[seed] / _steps_by_seed(other)[seed])

    logs = over_encodings(task, first, second, log_ratio, without)
    return seeds_to_text({seed: math.exp(value) for seed, value in logs.items()}, ".2f")


def length_pooled_points(task: str, first: str, second: str, multiple: str, without: str = "") -> str:
    """Return by how many points an arm has more right, seed by seed; the mean over encodings but for some."""

    def points(own: Any, other: Any, seed: int) -> float:
        return 100 * (_by_seed(own, multiple)[seed] - _by_seed(other, multiple)[seed])

    return seeds_to_text(over_encodings(task, first, second, points, without), "+.1f")


def length_faster_in(task: str, first: str, second: str) -> int:
    """Return in how many encodings an arm takes fewer steps than another, by the geometric mean over seeds."""
    names = (name for name, arm in cells_of(task) if arm == first and name != COUPLED)
    return sum(_ratio_of_steps(task, name, first, second) < 1 for name in names)


def length_unsolved(task: str, first: str, second: str) -> str:
    """Return in how many pairs of trainings neither of two arms has solved the task, and in how many one alone."""
    cells = cells_of(task)
    both = [
        sum(one["solved"] for arm in (first, second) for one in cells[name, arm]["trainings"] if one["seed"] == seed)
        for name, own in cells
        if own == first and name != COUPLED
        for seed in _steps_by_seed(cells[name, first])
    ]
    return f"{both.count(0)} and {both.count(1)} of {len(both)}"


def length_steps_ratios(task: str, positions: str, first: str, second: str) -> str:
    """Return the ratio of the steps of two arms, the geometric mean over seeds, of each of some encodings."""
    ratios = [_ratio_of_steps(task, position, first, second) for position in positions.split()]
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _ratio_of_steps(task: str, position: str, first: str, second: str) -> float:
    own, other = (_steps_by_seed(cells_of(task)[position, arm]) for arm in (first, second))
    return math.exp(fmean(math.log(own[seed] / other[seed]) for seed in own))


def length_arms_beside_full(task: str, what: str, *, more: bool) -> str:
    """Return the arms that have more, or less, than full attention with every seed, or "no arm".

    Args:
        task: of a sweep without encodings.
        what: "steps", or a length at which answers are right.
        more: whether more.
    """
    cells = {arm: cell for (_, arm), cell in cells_of(task).items()}
    found = {arm: _steps_by_seed(cell) if what == "steps" else _by_seed(cell, what) for arm, cell in cells.items()}
    full = found.pop("full")
    return names_of((arm for arm, own in found.items() if is_more(*((own, full) if more else (full, own)))), "arm")


def length_steps_over_full(task: str, arm: str) -> str:
    """Return the mean steps of an arm over those of full attention."""
    own, full = (mean_of(cells_of(task)["", name], "steps") for name in (arm, "full"))
    return f"{own / full:.2f}"


def length_solved_by(task: str, position: str) -> str:
    """Return how many seeds of an encoding solve the task, arm by arm."""
    counts = [_solved(cells_of(task)[position, arm]) for arm in ARMS_OF_POSITIONS]
    return f"{counts[0]}, {counts[1]} and {counts[2]}"


def length_steps(task: str, position: str, arm: str) -> str:
    """Return the mean steps up to the solution; a training without one counts with its last step."""
    return f"{mean_of(cells_of(task)[position, arm], 'steps'):.0f}"


def length_generalising(task: str, arm: str, multiple: str) -> str:
    """Return the encodings that generalise to a length, or "no encoding"."""
    found = [
        position for (position, own), cell in cells_of(task).items() if own == arm and _generalises(cell, multiple)
    ]
    return names_of(found)


def length_order_changes(task: str) -> int:
    """Return how often the first of two encodings is ahead without meta-tokens and the second with them.

    Counted over pairs, arms and lengths beyond L. Whoever is ahead does better than guesses, with every seed too.
    """
    cells = cells_of(task)

    def ahead(first: str, second: str, arm: str, multiple: str) -> bool:
        own, other = (_by_seed(cells[position, arm], multiple) for position in (first, second))
        return is_more(own, other) and min(own.values()) >= ABOVE_GUESSES

    positions = [position for position, own in cells if own == "plain"]
    return sum(
        ahead(a, b, "plain", multiple) and ahead(b, a, arm, multiple)
        for a, b in permutations(positions, 2)
        for arm in ("pause", "meta")
        for multiple in MULTIPLES[1:]
    )


def length_above_guesses(task: str, multiple: str) -> str:
    """Return the encodings that do better than guesses with every seed of some arm, or "no encoding"."""
    cells = cells_of(task).items()
    found = [position for (position, _), cell in cells if min(_by_seed(cell, multiple).values()) >= ABOVE_GUESSES]
    return names_of(dict.fromkeys(found))


def length_cpu_hours(task: str) -> float:
    """Return the processor time of all trainings of a sweep, and of their evaluations."""
    return sum(one["cpu_seconds"] for cell in cells_of(task).values() for one in cell["trainings"]) / 3600


def length_operations(task: str, arm: str) -> str:
    """Return the operations of a step of an arm over those of full attention."""
    own, other = (cells_of(task)["", name] for name in (arm, "full"))
    whole = mean_of(own, "training_flops") / mean_of(other, "training_flops")
    return f"{whole * mean_of(other, 'steps') / mean_of(own, 'steps'):.2f}"


SWEEPS = ("parity", "memory-parity", "copying", "memory-copying", "list-recall", "memory-list-recall")
TABLES = {
    **{f"length-{task}": partial(length_table, task) for task in SWEEPS},
    "length-reach": partial(length_reach, "parity", "copying", "list-recall"),
}
NAMES = (
    length_above_guesses,
    length_ahead,
    length_ahead_in,
    length_arms_beside_full,
    length_best,
    length_cells_generalising,
    length_chance,
    length_cpu_hours,
    length_encodings_solved,
    length_faster_in,
    length_generalising,
    length_operations,
    length_order_changes,
    length_pooled_points,
    length_pooled_steps,
    length_right,
    length_slower,
    length_solved,
    length_solved_and_right,
    length_solved_by,
    length_steps,
    length_steps_over_full,
    length_steps_ratios,
    length_unsolved,
)
