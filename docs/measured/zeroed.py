"""E3 of experiments/decomposition: something taken from the meta-tokens at inference."""

from typing import Any

from measured.recall import points
from measured.source import load, percent, span, table

FOLDER = "experiments/decomposition"
LENGTHS = {"L": "1-48", "2 L": "49-96", "4 L": "97-192"}
TAKEN = {
    "whole": "nothing",
    "zero-position": "position",
    "no-position-edges": "position edges",
    "zero-embedding": "embedding",
}


def zeroed_difference(arm: str, evaluation: str, length: str) -> str:
    """Return the difference from the whole model in points, with its interval over seeds."""
    found = _contrast(arm, evaluation, length)["difference"]
    return f"{points(found['estimate'])} ({points(found['low'])} to {points(found['high'])})"


def zeroed_loss(arm: str, evaluation: str, length: str) -> str:
    """Return by how many points the whole model is better, with its interval over seeds."""
    found = _contrast(arm, evaluation, length)["difference"]
    lost = {"estimate": -found["estimate"], "low": -found["high"], "high": -found["low"]}
    return span(lost, ".0f", 100)


def zeroed_lowest(arm: str, evaluation: str, length: str) -> str:
    """Return the lowest difference of a seed in points."""
    return points(min(_contrast(arm, evaluation, length)["by_seed"]))


def zeroed() -> str:
    rows = []
    for arm in ("rope", "learned", "rope-pause"):
        for evaluation, taken in TAKEN.items():
            if evaluation == "no-position-edges" and arm != "rope":
                continue
            cells = [_right(arm, evaluation, length) + _verdict(arm, evaluation, length) for length in LENGTHS]
            rows.append([f"`{arm}`" if evaluation == "whole" else "", taken, *cells])
    return table(["arm", "taken from its meta-tokens", "1 to 48 tokens (L)", "49 to 96", "97 to 192 (4 L)"], rows)


def _right(arm: str, evaluation: str, length: str) -> str:
    """Return the share of answers right, mean of the seeds, in percent."""
    (cell,) = [one for one in load(f"{FOLDER}/e3-results.json")["cells"] if one["labels"]["arm"] == arm]
    (asked,) = [one for one in cell["evaluations"] if one["name"] == evaluation]
    (row,) = [one for one in asked["rows"] if one["length"] == LENGTHS[length]]
    return percent(row["sequence_accuracy"]["estimate"])


def _verdict(arm: str, evaluation: str, length: str) -> str:
    return "" if evaluation == "whole" or length == "2 L" else f", {_contrast(arm, evaluation, length)['verdict']}"


def _contrast(arm: str, evaluation: str, length: str) -> dict[str, Any]:
    (task,) = load(f"{FOLDER}/e3.json")["tasks"]
    names = (f"{arm}@{evaluation}", LENGTHS[length])
    (row,) = [row for row in task["contrasts"] if (row["first"], row["length"]) == names]
    return dict(row)


NAMES = (zeroed_difference, zeroed_loss, zeroed_lowest)
TABLES = {"zeroed": zeroed}
