"""experiments/length-generalisation."""

from functools import partial
from itertools import permutations
from typing import Any

from measured.source import load, span, table

LENGTH = "experiments/length-generalisation"
MULTIPLES = ("L", "2 L", "4 L", "8 L")
RIGHT, MOST_SEEDS, ABOVE_GUESSES = 0.9, 0.8, 0.6  # the rules of its README
ARMS_OF_POSITIONS = ("plain", "pause", "meta")


def _cells(task: str) -> dict[tuple[str, str], Any]:
    """Return the cells of a sweep by position encoding and arm; sweeps without that axis have "" for it."""
    cells = load(f"{LENGTH}/{task}.json")["cells"]
    return {(cell["labels"].get("position", ""), cell["labels"]["arm"]): cell for cell in cells}


def _row(cell: Any, multiple: str) -> Any:
    return cell["evaluations"][0]["rows"][MULTIPLES.index(multiple)]


def _by_seed(cell: Any, multiple: str) -> dict[int, float]:
    """Return the share of answers right, seed by seed, at a multiple of the trained length."""
    row = _row(cell, multiple)
    return dict(zip(row["seeds"], row["sequence_by_seed"], strict=True))


def _generalises(cell: Any, multiple: str) -> bool:
    found = _by_seed(cell, multiple).values()
    return sum(share >= RIGHT for share in found) >= MOST_SEEDS * len(found)


def _accuracy(cell: Any, multiple: str) -> str:
    text = span(_row(cell, multiple)["sequence_accuracy"], ".0f", 100)
    return f"**{text}**" if _generalises(cell, multiple) else text


def _mean(cell: Any, key: str) -> float:
    return float(sum(one[key] for one in cell["trainings"]) / len(cell["trainings"]))


def length_table(task: str) -> str:
    """Write every arm of a sweep: what it has right at each length, and how long it took to solve the task."""
    cells = _cells(task)
    rows = []
    for (position, arm), cell in cells.items():
        solved = sum(one["solved"] for one in cell["trainings"])
        costs = [f"{_mean(cell, 'steps'):.0f}", f"{_mean(cell, 'training_flops') / 1e9:.0f}"]
        accuracies = [_accuracy(cell, multiple) for multiple in MULTIPLES]
        name = [position, arm] if position else [arm, f"{cell['parameters']:,}"]
        rows.append([*name, *accuracies, f"{solved} of {len(cell['trainings'])}", *costs])
    first = ["positions", "arm"] if any(position for position, _ in cells) else ["arm", "parameters"]
    return table([*first, *MULTIPLES, "solved", "steps", "10^9 operations"], rows)


def length_reach(*tasks: str) -> str:
    """Write the longest multiple of L up to which each encoding generalises, arm by arm."""
    sweeps = [_cells(task) for task in tasks]
    positions = list(dict.fromkeys(position for cells in sweeps for position, _ in cells))

    def reach(cells: dict[tuple[str, str], Any], position: str, arm: str) -> str:
        if (position, arm) not in cells:
            return ""
        good = [multiple for multiple in MULTIPLES if _generalises(cells[position, arm], multiple)]
        unbroken = [a for a, b in zip(good, MULTIPLES, strict=False) if a == b]
        return unbroken[-1] if unbroken else "none"

    rows = [
        [position, *(reach(cells, position, arm) for cells in sweeps for arm in ARMS_OF_POSITIONS)]
        for position in positions
    ]
    return table(["positions", *(f"{task}, {arm}" for task in tasks for arm in ARMS_OF_POSITIONS)], rows)


def length_right(task: str, position: str, arm: str, multiple: str) -> str:
    """Return the share of answers right with its interval, in percent."""
    return span(_row(_cells(task)[position, arm], multiple)["sequence_accuracy"], ".0f", 100)


def length_generalising(task: str, arm: str, multiple: str) -> str:
    """Return the encodings that generalise to a length, or "none"."""
    found = [position for (position, own), cell in _cells(task).items() if own == arm and _generalises(cell, multiple)]
    return ", ".join(f"`{position}`" for position in found) or "none"


def length_order_changes(task: str) -> int:
    """Return how often the first of two encodings is ahead without meta-tokens and the second with them.

    Counted over pairs, arms and lengths beyond L. Whoever is ahead does better than guesses, with every seed too.
    """
    cells = _cells(task)

    def ahead(first: str, second: str, arm: str, multiple: str) -> bool:
        own, other = (_by_seed(cells[position, arm], multiple) for position in (first, second))
        return all(own[seed] > other[seed] and own[seed] >= ABOVE_GUESSES for seed in own)

    positions = [position for position, own in cells if own == "plain"]
    return sum(
        ahead(a, b, "plain", multiple) and ahead(b, a, arm, multiple)
        for a, b in permutations(positions, 2)
        for arm in ("pause", "meta")
        for multiple in MULTIPLES[1:]
    )


def length_ahead(task: str, first: str, second: str, multiple: str) -> int:
    """Return in how many encodings an arm has more answers right than another with every seed."""
    cells = _cells(task)
    positions = [position for position, arm in cells if arm == first and (position, second) in cells]
    both = [[_by_seed(cells[position, arm], multiple) for arm in (first, second)] for position in positions]
    return sum(all(own[seed] > other[seed] for seed in own) for own, other in both)


def length_operations(task: str, arm: str, beside: str = "full") -> str:
    """Return the operations of a step of an arm over those of another, of a sweep without encodings."""
    own, other = (_cells(task)["", name] for name in (arm, beside))
    whole = _mean(own, "training_flops") / _mean(other, "training_flops")
    return f"{whole * _mean(other, 'steps') / _mean(own, 'steps'):.2f}"


SWEEPS = ("parity", "memory-parity")
TABLES = {
    **{f"length-{task}": partial(length_table, task) for task in SWEEPS},
    "length-reach": partial(length_reach, "parity"),
}
NAMES = (length_ahead, length_right, length_generalising, length_order_changes, length_operations)
