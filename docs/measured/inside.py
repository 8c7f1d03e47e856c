"""experiments/tiny-analysis, and the measures of an analysis."""

from typing import Any, get_args

from measured.source import load, percent, span, table
from metatokens.analysis.run import MEASURES  # with every measure registered
from metatokens.config.analysis import Part

INSIDE = "experiments/tiny-analysis"
PARTS = get_args(Part)
FOLDERS = ("books", "list_recall", "parity")


def record(folder: str, measure: str, **at: Any) -> Any:
    """Return a record of an analysis; `folder` is one of the three, or a run of seeds.json."""
    source = load(f"{INSIDE}/seeds.json")
    records = source[folder]["records"] if folder in source else load(f"{INSIDE}/{folder}/results.json")["records"]
    found = [r for r in records if r["measure"] == measure and r["at"] == at]
    assert len(found) == 1, f"{len(found)} records of {folder} {measure} {at}"
    return found[0]


def value(folder: str, measure: str, **at: Any) -> float:
    return float(record(folder, measure, **at)["value"])


def largest(folder: str, measure: str, **at: Any) -> float:
    return max(_values(folder, measure, at))


def smallest(folder: str, measure: str, **at: Any) -> float:
    return min(_values(folder, measure, at))


def _values(folder: str, measure: str, at: dict[str, Any]) -> list[float]:
    records = load(f"{INSIDE}/{folder}/results.json")["records"]
    return [
        r["value"]
        for r in records
        if r["measure"] == measure and r["value"] is not None and "layer" in r["at"] and at.items() <= r["at"].items()
    ]


def verdict(folder: str, claim: str) -> Any:
    """Return the verdict whose claim begins with these words."""
    verdicts = load(f"{INSIDE}/{folder}/results.json")["verdicts"]
    return next(one for one in verdicts if one["claim"].startswith(claim))


def entropy_falls() -> tuple[int, int]:
    """Return the number of models whose sharpening has an interval above 0, and the number of all models."""
    lows = [record(folder, "sharpening")["low"] for folder in (*FOLDERS, *load(f"{INSIDE}/seeds.json"))]
    return sum(low > 0 for low in lows), len(lows)


def inside_verdicts() -> str:
    found = [load(f"{INSIDE}/{folder}/results.json")["verdicts"] for folder in FOLDERS]
    rows = [[one[0]["claim"], one[0]["paper"], *map(_verdict, one)] for one in zip(*found, strict=True)]
    return table(["claim", "paper", "books", "list recall", "parity"], rows)


def _verdict(verdict: Any) -> str:
    if verdict["verdict"] == "not tested":
        return "-"
    unit = "" if verdict["unit"] == "1" else f" {verdict['unit']}"
    number = f"{verdict['value']:.3g} ({verdict['low']:.3g} to {verdict['high']:.3g}){unit}"
    beside = "" if verdict["share_of_paper"] is None else f", {100 * verdict['share_of_paper']:.0f}% of the paper's"
    note = f" ({verdict['note']})" if verdict["note"] else ""
    return f"{number}{beside}: **{verdict['verdict']}**{note}"


def inside_seeds() -> str:
    models = [
        *(
            ("parity", f"RoPE, seed {seed}", "parity" if not seed else f"parity/meta-rope/seed-{seed}")
            for seed in range(3)
        ),
        ("parity", "learned positions, seed 0", "parity/meta-learned/seed-0"),
        *(
            ("list_recall", f"RoPE, seed {seed}", "list_recall" if not seed else f"list_recall/meta-rope/seed-{seed}")
            for seed in range(3)
        ),
        ("list_recall", "learned positions, seed 0", "list_recall/meta-learned/seed-0"),
    ]
    conditions = ("full", "direct cut", "meta cut", "both cut")
    rows = []
    for task, name, folder in models:
        cut = [f"{value(folder, 'logit_difference', condition=one):.1f}" for one in conditions]
        cut.append(f"{value(folder, 'logit_difference', condition='meta-attention off'):.1f}")
        right = percent(value(folder, "accuracy", intervention="none"))
        drop = span(record(folder, "sharpening"), ".2f")
        rows.append([f"{task}, {name}", right, *cut, drop])
    header = ["model", "right of 64", "whole", *conditions[1:], "meta-attention off", "sharpening, nats"]
    return table(header, rows)


def measures() -> str:
    header = ["measure", "part", "on", "unit", "by", "statistic", "definition"]
    subjects = {None: "both", "task": "tasks", "text": "text", "graft": "grafts"}
    rows = [
        [
            f"`{one.name}`",
            one.part,
            subjects[one.subject],
            one.unit,
            ", ".join(one.axes),
            one.statistic,
            one.definition,
        ]
        for one in sorted(MEASURES.values(), key=lambda one: PARTS.index(one.part))
    ]
    return table(header, rows)


TABLES = {"inside-verdicts": inside_verdicts, "inside-seeds": inside_seeds, "measures": measures}
NAMES = (
    record,
    value,
    largest,
    smallest,
    verdict,
    entropy_falls,
)
