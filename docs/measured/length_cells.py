"""What every table of experiments/length-generalisation shares: its cells, and how two arms are compared."""

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any

from measured.source import load

LENGTH = "experiments/length-generalisation"
MULTIPLES = ("L", "2 L", "4 L", "8 L")
COUPLED = "learned-coupled"  # position coupling is told where the answer stands, and is no rival of the others


def cells_of(task: str) -> dict[tuple[str, str], Any]:
    """Return the cells of a sweep by position encoding and arm; sweeps without that axis have "" for it."""
    cells = load(f"{LENGTH}/{task}.json")["cells"]
    return {(cell["labels"].get("position", ""), cell["labels"]["arm"]): cell for cell in cells}


def mean_of(cell: Any, key: str) -> float:
    """Return the mean of a field of the trainings of a cell."""
    return float(sum(one[key] for one in cell["trainings"]) / len(cell["trainings"]))


def is_more(own: dict[int, float], other: dict[int, float]) -> bool:
    """Tell whether one is more than the other with every seed."""
    return all(own[seed] > other[seed] for seed in own)


def encodings_with_more(values: dict[tuple[str, str], dict[int, float]], first: str, second: str) -> list[str]:
    """Return the encodings in which an arm has more than another with every seed; position coupling does not count."""
    positions = [position for position, arm in values if arm == first and position != COUPLED]
    return [position for position in positions if is_more(values[position, first], values[position, second])]


def over_encodings(
    task: str, first: str, second: str, compare: Callable[[Any, Any, int], float], without: str = ""
) -> dict[int, float]:
    """Return, seed by seed, the mean over encodings of a comparison of two arms; position coupling does not count."""
    cells, left_out = cells_of(task), {COUPLED, *without.split()}
    pairs = [(cells[name, first], cells[name, second]) for name, arm in cells if arm == first and name not in left_out]
    return {seed: fmean(compare(*pair, seed) for pair in pairs) for seed in pairs[0][0]["seeds"]}


def names_of(names: Iterable[str], kind: str = "encoding") -> str:
    return ", ".join(f"`{name}`" for name in names) or f"no {kind}"


def seeds_to_text(values: dict[int, float], form: str) -> str:
    return ", ".join(format(value, form) for value in values.values())
