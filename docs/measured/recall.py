"""experiments/tiny-recall."""

from typing import Any

from measured.source import load, span, table

RECALL = "experiments/tiny-recall"
ARMS = ("pause", "parameter-matched", "double-attention", "meta-rope", "meta-learned")
TASKS = ("list_recall", "parity", "copying", "segment_counting")
LENGTHS = {"L": "33-64", "2 L": "65-128", "4 L": "129-256"}


def cell(task: str, arm: str) -> Any:
    return next(c for c in load(f"{RECALL}/results.json")["cells"] if c["labels"] == {"task": task, "arm": arm})


def recall(task: str, arm: str, length: str = "L", evaluation: str = "length") -> Any:
    """Return the mean accuracy over seeds; None if it was not measured or the model cannot represent the length."""
    for one in cell(task, arm)["evaluations"]:
        for row in one["rows"]:
            if one["name"] == evaluation and row["length"] == LENGTHS[length] and row["sequence_accuracy"]:
                return row["sequence_accuracy"]["estimate"]
    return None


def trained(task: str, arm: str) -> list[float]:
    """Return the accuracy of the three seeds at the end of training, on 100 prompts of up to L, from the lowest.

    results.json has the mean, the lowest and the highest of them.
    """
    last = cell(task, arm)["curve"][-1]
    assert len(cell(task, arm)["seeds"]) == 3
    low, high = last["lowest"], last["highest"]
    return [low, 3 * last["sequence_accuracy"] - low - high, high]


def seeds(task: str, arm: str) -> str:
    return " / ".join(f"{100 * one:.0f}" for one in trained(task, arm))


def contrast(task: str, arm: str, length: str, key: str = "difference", evaluation: str = "length") -> float:
    where = {"task": task, "arm": arm, "length": LENGTHS[length], "evaluation": evaluation}
    return next(
        float(row[key]) for row in load(f"{RECALL}/contrasts.json")["rows"] if {k: row[k] for k in where} == where
    )


def contrasts(key: str) -> int:
    return int(load(f"{RECALL}/contrasts.json")[key])


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def hint(key: str) -> float:
    return float(load(f"{RECALL}/hint.json")["accuracy"][key])


def extended(window: str, length: int) -> Any:
    """Return the accuracy of an extended model at prompts of up to this multiple of L."""
    cells = load(f"{RECALL}/extension-results.json")["cells"]
    (found,) = [c for c in cells if c["labels"]["window"] == window]
    rows = {row["prompt_tokens"][1] // 64: row["sequence_accuracy"] for row in found["evaluations"][0]["rows"]}
    return rows[length]


def tried(name: str) -> float:
    (found,) = [one for one in load(f"{RECALL}/tried.json")["tries"] if one["name"] == name]
    return float(max(found["accuracy_by_step"].values()))


def _accuracy(number: float | None) -> str:
    return "n/a" if number is None else f"{100 * number:.0f}"


def recall_accuracy() -> str:
    rows = [
        [task, arm, *(_accuracy(recall(task, arm, length)) for length in LENGTHS), seeds(task, arm)]
        for task in TASKS
        for arm in ARMS
    ]
    return table(["task", "arm", *(f"at {length}" for length in LENGTHS), "seeds, end of training"], rows)


def recall_interventions() -> str:
    names = ("length", "zero-embedding", "zero-position", "no-position-edges", "no-meta-attention")
    rows = []
    for task in TASKS:
        for arm in ARMS:
            for length in ("L", "2 L"):
                found = [recall(task, arm, length, name) for name in names]
                if any(number is not None for number in found[1:]):
                    rows.append([task, arm, length, *("" if one is None else _accuracy(one) for one in found)])
    columns = ["full", "embedding zeroed", "position zeroed", "no position edges", "meta-attention off"]
    return table(["task", "arm", "at", *columns], rows)


def recall_contrasts() -> str:
    rows = [
        [
            f"{one['task']}: {one['evaluation']}",
            one["arm"],
            one["length"],
            f"{points(one['difference'])} ({points(one['bootstrap_low'])} to {points(one['bootstrap_high'])})",
            f"{one['approximate_p_holm']:.3f}",
            f"{one['approximate_p_alike_holm']:.3f}",
            one["verdict"],
        ]
        for one in load(f"{RECALL}/contrasts.json")["rows"]
    ]
    header = ["task", "arm", "prompt", "minus pause, points", "p, Holm", "p alike, Holm", "verdict"]
    return table(header, rows)


def recall_extension() -> str:
    rows = []
    for own in load(f"{RECALL}/extension-results.json")["cells"]:
        for length in (2, 4, 6, 8, 10):
            accuracy = span(extended(own["labels"]["window"], length), ".0f", 100)
            windows = str(own["original_window"]), str(own["window"])
            rows.append([*windows, f"{own['trained_to'] // 64} L", str(own["steps"]), f"{length} L", accuracy])
    header = ["original window", "scaled window", "trained to", "steps", "evaluated at", "right, %"]
    return table(header, rows)


TABLES = {
    "recall-accuracy": recall_accuracy,
    "recall-interventions": recall_interventions,
    "recall-contrasts": recall_contrasts,
    "recall-extension": recall_extension,
}
NAMES = (
    recall,
    trained,
    seeds,
    contrast,
    contrasts,
    points,
    hint,
    extended,
    tried,
)
