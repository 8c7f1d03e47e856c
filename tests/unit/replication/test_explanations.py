"""The summary of all contrasts: every task a column, every contrast a row, whatever their endpoints."""

import json
from pathlib import Path
from typing import Any

from metatokens.replication.contrasts import write_summary
from metatokens.report.verdict_figure import Verdict, draw_verdicts, rows_of


def solved(explains: str, estimate: float | None, solved: tuple[int, int], verdict: str) -> dict[str, Any]:
    interval = {"estimate": estimate, "low": estimate, "high": estimate}
    return {"explains": explains, "first": "a", "second": "b", "ratio": interval, "solved": solved, "verdict": verdict}


def write(folder: Path, name: str, tree: dict[str, Any]) -> Path:
    (folder / name).write_text(json.dumps(tree))
    return folder / name


def test_all_parts_stand_side_by_side(tmp_path: Path) -> None:
    steps = [solved("hint", 0.5, (9, 9), "supported"), solved("channel", 0.2, (9, 0), "supported")]
    operations = [solved("hint", 1.0, (9, 9), "equivalent"), solved("channel", None, (0, 0), "cannot tell")]
    e1 = {"tasks": [{"task": "parity", "at_equal_steps": steps, "at_equal_operations": operations}]}
    differences = [
        {"explains": name, "first": "c", "second": "b", "difference": {"estimate": 0.1234}, "verdict": "opposite"}
        for name in ("parameters", "hint")
    ]
    e4 = {"endpoint": "nats", "tasks": [{"evaluation": "books", "contrasts": differences}]}
    write_summary([write(tmp_path, "e1.json", e1), write(tmp_path, "e4.json", e4)], tmp_path)
    assert (tmp_path / "explanations.md").read_text().splitlines() == [
        "| explanation | arms | parity, steps | parity, operations | books, nats |",
        "|---|---|---|---|---|",
        "| hint | a : b | 0.50, supported | 1.00, equivalent |  |",
        "| hint | c : b |  |  | +0.123, opposite |",
        "| channel | a : b | at most 0.20, supported | neither solved it, cannot tell |  |",
        "| parameters | c : b |  |  | +0.123, opposite |",
    ]
    assert (tmp_path / "explanations.png").stat().st_size > 10_000


def test_without_a_contrast_nothing_is_written(tmp_path: Path) -> None:
    write_summary([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cell_of_the_figure_has_effect_verdict_and_colour() -> None:
    columns = {
        "parity, steps": {("hint", "a", "b"): Verdict("0.80", "supported, within the margin")},
        "books, nats": {("channel", "c", "d"): Verdict("+0.100", "opposite")},
    }
    assert rows_of(columns) == [("hint", "a", "b"), ("channel", "c", "d")]
    (axes,) = draw_verdicts(columns).axes
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert texts["0.80\nsupported*"] == (0.5, 0.5)
    assert texts["+0.100\nopposite"] == (1.5, 1.5)
    supported, opposite = (patch.get_facecolor()[:3] for patch in axes.patches)
    assert supported != opposite
