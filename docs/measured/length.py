"""experiments/length-generalisation."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import permutations
from operator import mul
from statistics import fmean
from typing import Any

from measured.source import load, span, table

LENGTH = "experiments/length-generalisation"
MULTIPLES = ("L", "2 L", "4 L", "8 L")
RIGHT, MOST_SEEDS, ABOVE_GUESSES = 0.9, 0.8, 0.6  # the rules of its README; the last is about the guesses of parity
ARMS_OF_POSITIONS = ("plain", "pause", "meta")
COUPLED = "learned-coupled"  # position coupling is told where the answer stands, and is no rival of the others


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


def _solved(cell: Any) -> int:
    return sum(one["solved"] for one in cell["trainings"])


def length_table(task: str) -> str:
    """Write every arm of a sweep: what it has right at each length, and how long it took to solve the task."""
    cells = _cells(task)
    rows = []
    for (position, arm), cell in cells.items():
        costs = [f"{_mean(cell, 'steps'):.0f}", f"{_mean(cell, 'training_flops') / 1e9:.0f}"]
        accuracies = [_accuracy(cell, multiple) for multiple in MULTIPLES]
        name = [position, arm] if position else [arm, f"{cell['parameters']:,}"]
        rows.append([*name, *accuracies, f"{_solved(cell)} of {len(cell['trainings'])}", *costs])
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
        return unbroken[-1] if unbroken else "below L"

    rows = [
        [position, *(reach(cells, position, arm) for cells in sweeps for arm in ARMS_OF_POSITIONS)]
        for position in positions
    ]
    return table(["positions", *(f"{task}, {arm}" for task in tasks for arm in ARMS_OF_POSITIONS)], rows)


def length_right(task: str, position: str, arm: str, multiple: str) -> str:
    """Return the share of answers right with its interval, in percent."""
    return span(_row(_cells(task)[position, arm], multiple)["sequence_accuracy"], ".0f", 100)


def _rivals(task: str, *arms: str) -> list[Any]:
    """Return the cells of all encodings but position coupling, of these arms or of all."""
    return [cell for (name, arm), cell in _cells(task).items() if name != COUPLED and (not arms or arm in arms)]


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
    labels, accuracy = best["labels"], _row(best, multiple)["sequence_accuracy"]
    return f"`{labels['position']}` in `{labels['arm']}`, with {span(accuracy, '.0f', 100)}"


def length_chance(task: str, multiple: str) -> str:
    """Return what guesses have right, in percent."""
    return f"{100 * _row(_rivals(task, 'plain')[0], multiple)['chance']:.0f}"


def _steps_by_seed(cell: Any) -> dict[int, float]:
    return {one["seed"]: one["steps"] for one in cell["trainings"]}


def _is_more(own: dict[int, float], other: dict[int, float]) -> bool:
    """Tell whether one is more than the other with every seed."""
    return all(own[seed] > other[seed] for seed in own)


def _encodings_with_more(values: dict[tuple[str, str], dict[int, float]], first: str, second: str) -> list[str]:
    """Return the encodings in which an arm has more than another with every seed; position coupling does not count."""
    positions = [position for position, arm in values if arm == first and position != COUPLED]
    return [position for position in positions if _is_more(values[position, first], values[position, second])]


def length_ahead_in(task: str, first: str, second: str, multiple: str) -> str:
    """Return the encodings in which an arm has more right than another with every seed, or "no encoding"."""
    right = {key: _by_seed(cell, multiple) for key, cell in _cells(task).items()}
    return _names(_encodings_with_more(right, first, second))


def length_ahead(task: str, first: str, second: str, multiple: str) -> int:
    """Return in how many encodings an arm has more answers right than another with every seed."""
    right = {key: _by_seed(cell, multiple) for key, cell in _cells(task).items()}
    return len(_encodings_with_more(right, first, second))


def length_slower(task: str, first: str, second: str) -> str:
    """Return the encodings in which an arm takes more steps than another with every seed, or "no encoding"."""
    steps = {key: _steps_by_seed(cell) for key, cell in _cells(task).items()}
    return _names(_encodings_with_more(steps, first, second))


def _over_encodings(
    task: str, first: str, second: str, compare: Callable[[Any, Any, int], float], without: str = ""
) -> dict[int, float]:
    """Return, seed by seed, the mean over encodings of a comparison of two arms; position coupling does not count."""
    cells, left_out = _cells(task), {COUPLED, *without.split()}
    pairs = [(cells[name, first], cells[name, second]) for name, arm in cells if arm == first and name not in left_out]
    return {seed: fmean(compare(*pair, seed) for pair in pairs) for seed in pairs[0][0]["seeds"]}


def length_pooled_steps(task: str, first: str, second: str, without: str = "") -> str:
    """Return the ratio of the steps of two arms, seed by seed; the geometric mean over encodings but for some."""

    def log_ratio(own: Any, other: Any, seed: int) -> float:
        return math.log(_steps_by_seed(own)[seed] / _steps_by_seed(other)[seed])

    logs = _over_encodings(task, first, second, log_ratio, without)
    return _seeds({seed: math.exp(value) for seed, value in logs.items()}, ".2f")


def length_pooled_points(task: str, first: str, second: str, multiple: str) -> str:
    """Return by how many points an arm has more right than another, seed by seed; the mean over encodings."""

    def points(own: Any, other: Any, seed: int) -> float:
        return 100 * (_by_seed(own, multiple)[seed] - _by_seed(other, multiple)[seed])

    return _seeds(_over_encodings(task, first, second, points), "+.1f")


def length_faster_in(task: str, first: str, second: str) -> int:
    """Return in how many encodings an arm takes fewer steps than another, by the geometric mean over seeds."""
    names = (name for name, arm in _cells(task) if arm == first and name != COUPLED)
    return sum(_ratio_of_steps(task, name, first, second) < 1 for name in names)


def length_unsolved(task: str, first: str, second: str) -> str:
    """Return in how many pairs of trainings neither of two arms has solved the task, and in how many one alone."""
    cells = _cells(task)
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
    own, other = (_steps_by_seed(_cells(task)[position, arm]) for arm in (first, second))
    return math.exp(fmean(math.log(own[seed] / other[seed]) for seed in own))


def length_arms_beside_full(task: str, what: str, *, more: bool) -> str:
    """Return the arms that have more, or less, than full attention with every seed, or "no arm".

    Args:
        task: of a sweep without encodings.
        what: "steps", or a length at which answers are right.
        more: whether more.
    """
    cells = {arm: cell for (_, arm), cell in _cells(task).items()}
    found = {arm: _steps_by_seed(cell) if what == "steps" else _by_seed(cell, what) for arm, cell in cells.items()}
    full = found.pop("full")
    return _names((arm for arm, own in found.items() if _is_more(*((own, full) if more else (full, own)))), "arm")


def length_steps_over_full(task: str, arm: str) -> str:
    """Return the mean steps of an arm over those of full attention."""
    own, full = (_mean(_cells(task)["", name], "steps") for name in (arm, "full"))
    return f"{own / full:.2f}"


def length_solved_by(task: str, position: str) -> str:
    """Return how many seeds of an encoding solve the task, arm by arm."""
    counts = [_solved(_cells(task)[position, arm]) for arm in ARMS_OF_POSITIONS]
    return f"{counts[0]}, {counts[1]} and {counts[2]}"


def _names(names: Iterable[str], kind: str = "encoding") -> str:
    return ", ".join(f"`{name}`" for name in names) or f"no {kind}"


def length_steps(task: str, position: str, arm: str) -> str:
    """Return the mean steps up to the solution; a training without one counts with its last step."""
    return f"{_mean(_cells(task)[position, arm], 'steps'):.0f}"


def length_generalising(task: str, arm: str, multiple: str) -> str:
    """Return the encodings that generalise to a length, or "no encoding"."""
    found = [position for (position, own), cell in _cells(task).items() if own == arm and _generalises(cell, multiple)]
    return _names(found)


def length_order_changes(task: str) -> int:
    """Return how often the first of two encodings is ahead without meta-tokens and the second with them.

    Counted over pairs, arms and lengths beyond L. Whoever is ahead does better than guesses, with every seed too.
    """
    cells = _cells(task)

    def ahead(first: str, second: str, arm: str, multiple: str) -> bool:
        own, other = (_by_seed(cells[position, arm], multiple) for position in (first, second))
        return _is_more(own, other) and min(own.values()) >= ABOVE_GUESSES

    positions = [position for position, own in cells if own == "plain"]
    return sum(
        ahead(a, b, "plain", multiple) and ahead(b, a, arm, multiple)
        for a, b in permutations(positions, 2)
        for arm in ("pause", "meta")
        for multiple in MULTIPLES[1:]
    )


def length_above_guesses(task: str, multiple: str) -> str:
    """Return the encodings that do better than guesses with every seed of some arm, or "no encoding"."""
    cells = _cells(task).items()
    found = [position for (position, _), cell in cells if min(_by_seed(cell, multiple).values()) >= ABOVE_GUESSES]
    return _names(dict.fromkeys(found))


def length_cpu_hours(task: str) -> float:
    """Return the processor time of all trainings of a sweep, and of their evaluations."""
    return sum(one["cpu_seconds"] for cell in _cells(task).values() for one in cell["trainings"]) / 3600


def length_operations(task: str, arm: str) -> str:
    """Return the operations of a step of an arm over those of full attention."""
    own, other = (_cells(task)["", name] for name in (arm, "full"))
    whole = _mean(own, "training_flops") / _mean(other, "training_flops")
    return f"{whole * _mean(other, 'steps') / _mean(own, 'steps'):.2f}"


def _nats(cell: Any, window: str) -> dict[int, float]:
    """Return the nats per word on books, seed by seed, in windows of L, 2 L or 4 L."""
    row = cell["perplexities"][MULTIPLES.index(window)]
    return dict(zip(row["seeds"], row["by_seed"], strict=True))


def _longer(cell: Any, window: str) -> dict[int, float]:
    """Return by how much more a model of books loses in a longer window than in L, seed by seed."""
    return {seed: nats - _nats(cell, "L")[seed] for seed, nats in _nats(cell, window).items()}


def _reads_on(cell: Any) -> bool:
    return max(_longer(cell, "4 L").values()) < 0


def _seeds(values: dict[int, float], form: str) -> str:
    return ", ".join(format(value, form) for value in values.values())


def books_table(sweep: str) -> str:
    """Write every arm of a sweep on books: nats per word, what longer windows change, and what it cost."""
    rows = []
    for (position, arm), cell in _cells(sweep).items():
        changes = [_seeds(_longer(cell, window), "+.2f") for window in ("2 L", "4 L")]
        changes[-1] = f"**{changes[-1]}**" if _reads_on(cell) else changes[-1]
        costs = [f"{cell['parameters']:,}", f"{_mean(cell, 'training_flops') / 1e12:.1f}"]
        rows.append([*([position, arm] if position else [arm]), _seeds(_nats(cell, "L"), ".2f"), *changes, *costs])
    first = ["positions", "arm"] if any(position for position, _ in _cells(sweep)) else ["arm"]
    return table([*first, "L", "2 L - L", "4 L - L", "parameters", "10^12 operations"], rows)


def books_reading_on(arm: str) -> str:
    """Return the encodings that lose less in windows of 4 L than of L with every seed of an arm, or "no encoding"."""
    return _names(position for (position, own), cell in _cells("books").items() if own == arm and _reads_on(cell))


def books_arms_reading_on() -> str:
    """Return which ways to keep old text lose less in windows of 4 L than of L with every seed, or "no arm"."""
    return _names((arm for (_, arm), cell in _cells("memory-books").items() if _reads_on(cell)), "arm")


def books_arms_beside_full(window: str, *, more: bool) -> str:
    """Return which ways to keep old text lose more, or less, than full attention with every seed, or "no arm"."""
    nats = {arm: _nats(cell, window) for (_, arm), cell in _cells("memory-books").items()}
    full = nats.pop("full")
    return _names((arm for arm, own in nats.items() if _is_more(*((own, full) if more else (full, own)))), "arm")


def books_arm_minus(first: str, second: str, window: str = "L") -> str:
    """Return by how much more one way to keep old text loses than another, seed by seed."""
    own, other = (_nats(_cells("memory-books")["", arm], window) for arm in (first, second))
    return _seeds({seed: own[seed] - other[seed] for seed in own}, "+.3f")


def books_longer(sweep: str, position: str, arm: str, window: str = "4 L") -> str:
    """Return by how much more a model loses in a longer window than in L, seed by seed."""
    return _seeds(_longer(_cells(sweep)[position, arm], window), "+.3f")


def books_pooled(first: str, second: str) -> str:
    """Return by how much more an arm loses than another in windows of L, seed by seed; the mean over encodings."""

    def difference(own: Any, other: Any, seed: int) -> float:
        return _nats(own, "L")[seed] - _nats(other, "L")[seed]

    return _seeds(_over_encodings("books", first, second, difference), "+.2f")


def books_added_range(positions: str, first: str, second: str) -> str:
    """Return how much more windows of 4 L add to an arm's loss than to another's, from the least seed to the most."""
    cells = [(_cells("books")[position, first], _cells("books")[position, second]) for position in positions.split()]
    more = [_longer(own, "4 L")[seed] - _longer(other, "4 L")[seed] for own, other in cells for seed in own["seeds"]]
    return f"{min(more):.2f} to {max(more):.2f}"


def books_added_pooled(first: str, second: str) -> str:
    """Return how much more windows of 4 L add to the loss of an arm than of another, the mean over encodings."""

    def more(own: Any, other: Any, seed: int) -> float:
        return _longer(own, "4 L")[seed] - _longer(other, "4 L")[seed]

    return _seeds(_over_encodings("books", first, second, more), "+.3f")


def _by_context(cell: Any) -> list[float]:
    return [bucket["nats_per_token"] for bucket in cell["perplexities"][0]["by_context"]]


def books_gap_by_context(first: str, second: str) -> str:
    """Return by how many nats a token an arm loses more, at the first token of a window and at all later ones."""
    cells = _cells("books")
    pairs = [(_by_context(cells[name, first]), _by_context(cells[name, second])) for name, arm in cells if arm == first]
    gaps = [[a - b for a, b in zip(own, other, strict=True)] for own, other in pairs]
    start, *later = [fmean(of_bucket) for of_bucket in zip(*gaps, strict=True)]
    return f"{start:.2f} nats a token at the first of a window, {min(later):.2f} to {max(later):.2f} at all later ones"


def books_tiled_and_sliding(position: str, arm: str) -> str:
    """Return the nats per token in windows of L that do not overlap, and in sliding ones."""
    row = _cells("books")[position, arm]["perplexities"][0]
    # every window is full, so a bucket has as many tokens as it spans
    spans = [bucket["highest"] - bucket["lowest"] + 1 for bucket in row["by_context"]]
    tiled = sum(map(mul, spans, _by_context(_cells("books")[position, arm]))) / sum(spans)
    return f"{tiled:.2f} and {math.log(row['perplexity']):.2f}"


def books_worse_than_plain(arm: str) -> int:
    """Return in how many encodings an arm loses more than the text alone in windows of L, with every seed."""
    nats = {key: _nats(cell, "L") for key, cell in _cells("books").items()}
    return len(_encodings_with_more(nats, arm, "plain"))


SWEEPS = ("parity", "memory-parity", "copying", "memory-copying")
TABLES = {
    **{f"length-{task}": partial(length_table, task) for task in SWEEPS},
    "length-books": partial(books_table, "books"),
    "length-memory-books": partial(books_table, "memory-books"),
    "length-reach": partial(length_reach, "parity", "copying"),
}
NAMES = (
    books_added_pooled,
    books_added_range,
    books_arm_minus,
    books_arms_beside_full,
    books_arms_reading_on,
    books_gap_by_context,
    books_longer,
    books_pooled,
    books_reading_on,
    books_tiled_and_sliding,
    books_worse_than_plain,
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
