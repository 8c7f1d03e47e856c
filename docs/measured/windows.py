"""E2 of experiments/decomposition: list recall in longer prompts and windows, the paper's Table 1."""

from statistics import fmean
from typing import Any

from measured.recall import points
from measured.source import load, percent, span, table

FOLDER = "experiments/decomposition"
LENGTHS = {"L": "1-48", "2 L": "49-96", "4 L": "97-192", "6 L": "193-288", "8 L": "289-384", "10 L": "385-480"}
ARMS = ("mark", "pause", "meta")
ROWS = {
    "e2-trained": ("L", "L"),
    "e2-x1-to-4L": ("4 L", "4 L"),
    "x4": ("4 L, YaRN", "L"),
    "e2-x4-to-2L": ("4 L, YaRN", "2 L"),
    "e2-x4-to-4L": ("4 L, YaRN", "4 L"),
    "x8": ("8 L, YaRN", "L"),
    "e2-x8-to-4L": ("8 L, YaRN", "4 L"),
    "e2-x8-to-8L": ("8 L, YaRN", "8 L"),
}
"""Sweeps, and models asked without a training (x4, x8): their window, and the longest prompts of their training."""
JUDGED = ("e2-trained", "e2-x4-to-4L", "e2-x8-to-8L")


def window_right(row: str, arm: str, length: str, seeds: int | None = None) -> str:
    """Return the share of answers right in percent, mean of the seeds, or of the first of them."""
    return percent(fmean(_by_seed(row, arm, length)[:seeds]))


def window_arms(row: str, length: str) -> str:
    """Return the shares of answers right of all arms in percent."""
    return ", ".join(window_right(row, arm, length) for arm in ARMS)


def window_seeds_below(row: str, arm: str, length: str, share: float) -> int:
    """Return how many seeds have no more than a share of the answers right."""
    return sum(one <= share for one in _by_seed(row, arm, length))


def window_guess(length: str) -> str:
    """Return how often a guess among the items of the prompt is right."""
    return percent(_asked("e2-trained", "pause", length)["chance"])


def window_solved(arm: str) -> int:
    """Return how many of the first trainings of an arm have solved the task."""
    return sum(one["solved"] for one in _cell("e2-trained", arm)["trainings"])


def window_steps(arm: str) -> str:
    """Return the mean number of steps of the first trainings of an arm."""
    return f"{fmean(_steps(arm).values()):,.0f}"


def window_fewer_steps(row: str, length: str) -> str:
    """Return what `meta` has more right than `pause` in the seeds in which its first training was the shorter one."""
    own, other = _steps("meta"), _steps("pause")
    sides = (_by_seed(row, arm, length) for arm in ("meta", "pause"))
    differences = [first - second for first, second in zip(*sides, strict=True)]
    return ", ".join(points(differences[seed]) for seed in own if own[seed] < other[seed])


def window_difference(row: str, first: str, second: str, length: str) -> str:
    """Return the difference of two arms in points, with its interval over seeds if it was judged."""
    judged = row in JUDGED and length in ("4 L", "8 L") and (first, second) in (("meta", "pause"), ("pause", "mark"))
    if judged:
        found = _contrast(row, first, second, length)["difference"]
        return f"{points(found['estimate'])} ({points(found['low'])} to {points(found['high'])})"
    own, other = (fmean(_by_seed(row, arm, length)) for arm in (first, second))
    return points(own - other)


def window_gain(row: str, length: str, form: str = ".1f") -> str:
    """Return by how many points `meta` is better than `pause`, with its interval over seeds."""
    return span(_contrast(row, "meta", "pause", length)["difference"], form, 100)


def window_ahead(row: str, first: str, second: str, length: str) -> int:
    """Return in how many seeds the first arm has more right."""
    sides = (_by_seed(row, arm, length) for arm in (first, second))
    return sum(one > other for one, other in zip(*sides, strict=True))


def window_p(row: str, first: str, second: str, length: str) -> str:
    """Return the p-value of a contrast after Holm's correction."""
    return f"{_contrast(row, first, second, length)['p_holm']:.3f}"


def window_finds(row: str, first: str, second: str, length: str) -> str:
    """Return the smallest difference that the design finds in 80% of cases, with the spread of two arms, in points."""
    return f"{100 * _contrast(row, first, second, length)['smallest_difference']:.0f}"


def windows() -> str:
    """Write every row of Table 1 and those added to it, with three shares in a cell: those of `ARMS`."""
    rows = []
    for row, (window, trained) in ROWS.items():
        shares = [", ".join(window_right(row, arm, length).rstrip("%") for arm in ARMS) for length in LENGTHS]
        rows.append([window, trained, str(len(_by_seed(row, "pause", "L"))), *shares])
    return table(["window", "trained to", "seeds", *LENGTHS], rows)


def window_contrasts() -> str:
    rows = []
    for row in JUDGED:
        for first, second in (("meta", "pause"), ("pause", "mark")):
            cells = [
                f"{window_difference(row, first, second, length)}, {_contrast(row, first, second, length)['verdict']}"
                for length in ("4 L", "8 L")
            ]
            rows.append([*ROWS[row], f"`{first}` - `{second}`", *cells])
    return table(["window", "trained to", "arms", "at 4 L", "at 8 L"], rows)


def _steps(arm: str) -> dict[int, int]:
    """Return the steps of the first trainings of an arm by seed."""
    return {one["seed"]: one["steps"] for one in _cell("e2-trained", arm)["trainings"]}


def _cell(sweep: str, arm: str) -> Any:
    (cell,) = [one for one in load(f"{FOLDER}/e2/{sweep}.json")["cells"] if one["labels"]["arm"] == arm]
    return cell


def _asked(row: str, arm: str, length: str) -> Any:
    """Return what an arm has right at a length."""
    if row in ("x4", "x8"):
        rows = load(f"{FOLDER}/e2/zero-shot.json")[f"{row}-{arm}"]["rows"]
    else:
        rows = _cell(row, arm)["evaluations"][0]["rows"]
    (found,) = [one for one in rows if one["length"] == LENGTHS[length]]
    return found


def _by_seed(row: str, arm: str, length: str) -> list[float]:
    asked = _asked(row, arm, length)
    return list(asked["sequence_by_model"] if row in ("x4", "x8") else asked["sequence_by_seed"])


def _contrast(sweep: str, first: str, second: str, length: str) -> dict[str, Any]:
    (task,) = [one for one in load(f"{FOLDER}/e2.json")["tasks"] if one["task"] == sweep]
    names = (first, second, LENGTHS[length])
    (row,) = [row for row in task["contrasts"] if (row["first"], row["second"], row["length"]) == names]
    return dict(row)


NAMES = (
    window_ahead,
    window_arms,
    window_difference,
    window_fewer_steps,
    window_finds,
    window_gain,
    window_guess,
    window_p,
    window_right,
    window_seeds_below,
    window_solved,
    window_steps,
)
TABLES = {"windows": windows, "window-contrasts": window_contrasts}
