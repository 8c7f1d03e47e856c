"""The summary of all contrasts: every task a column, every contrast a row, whatever their endpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from metatokens.replication.contrasts import write_summary
from metatokens.report.verdict_figure import Column, Verdict, draw_verdicts, rows_of


def named(expected: str, **fields: Any) -> dict[str, Any]:
    contrast = {"explains": "hint", "first": "a", "second": "b", "expected": expected}
    return {"margin": 0.05, "tasks": {"parity": 2}, "contrasts": [contrast], **fields}


def solved(explains: str, estimate: float | None, solved: tuple[int, int], verdict: str) -> dict[str, Any]:
    interval = {
        "estimate": estimate if all(solved) else None,
        "low": estimate if all(solved) else None,
        "high": estimate,
    }
    arms = {"explains": explains, "first": "a", "second": "b", "seeds": 9, "solved": solved}
    return {**arms, "ratio": interval, "verdict": verdict}


def write(folder: Path, name: str, tree: dict[str, Any]) -> Path:
    (folder / name).write_text(json.dumps(tree))
    return folder / name


def test_all_parts_stand_side_by_side(tmp_path: Path) -> None:
    steps = [solved("hint", 0.5, (9, 9), "supported"), solved("channel", 0.2, (9, 0), "supported")]
    operations = [solved("hint", 1.0, (9, 9), "equivalent"), solved("channel", None, (0, 0), "cannot tell")]
    parity = {
        "task": "parity",
        "seeds": [0, 1],
        "planned_seeds": 24,
        "at_equal_steps": steps,
        "at_equal_operations": operations,
    }
    e1 = {"contrasts": named("faster", margin=1.5), "tasks": [parity]}
    differences = [
        {"explains": name, "first": "c", "second": "b", "difference": {"estimate": 0.1234}, "verdict": "opposite"}
        for name in ("parameters", "hint")
    ]
    books = {"task": "e4", "evaluation": "books", "seeds": [0, 1, 2], "planned_seeds": 3, "contrasts": differences}
    e4 = {"contrasts": named("lower", endpoint="nats", evaluation="books"), "tasks": [books]}
    points = [
        {**one, "length": length, "right": [0.5, 0.38]}
        for one, length in zip(differences, ("1-8", "9-16"), strict=True)
    ]
    asked = {"endpoint": "accuracy", "evaluation": "length", "lengths": ["1-8", "9-16"]}
    length = {"task": "x", "seeds": [0], "planned_seeds": 1, "unsolved": {"a": 0, "b": 3}}
    e2 = {"contrasts": named("higher", **asked), "tasks": [{**length, "contrasts": points}]}
    e3 = {"contrasts": named("higher", **asked, in_summary=False), "tasks": [{"task": "e3"}]}
    parts = {"e1.json": e1, "e4.json": e4, "e2.json": e2, "e3.json": e3}
    write_summary([write(tmp_path, name, part) for name, part in parts.items()], tmp_path)
    steps_table, steps_notes, nats_table, nats_notes, points_table, points_notes = (
        (tmp_path / "explanations.md").read_text().split("\n\n")
    )
    assert steps_table.splitlines() == [
        "| explanation | arms | parity, steps | parity, operations |",
        "|---|---|---|---|",
        "| hint | a : b | 0.50, supported | 1.00, equivalent |",
        "| channel | a : b | at most 0.20 (9 : 0), supported | neither arm solved it, cannot tell |",
    ]
    assert nats_table.splitlines()[::3] == [
        "| explanation | arms | e4 books, nats |",
        "| hint | c : b | +0.123, opposite |",
    ]
    assert points_table.splitlines()[::2] == [
        "| explanation | arms | x, 1-8 tokens | x, 9-16 tokens |",
        "| parameters | c : b | +12.3 (50 : 38), opposite |  |",
    ]
    assert "2 of 24 seeds so far (in brackets: seeds that solved it, where not all did); equivalent" in steps_notes
    assert "nats per word minus the second's, 3 seeds; equivalent within 0.05; Holm over 1." in nats_notes
    assert "percent), 1 seeds; equivalent within 5; Holm over 2; not solved: 0 of a, 3 of b" in points_notes
    assert (tmp_path / "explanations.png").stat().st_size > 10_000


def test_an_open_end_is_a_bound_and_seeds_stand_beside_it_unless_all_solved(tmp_path: Path) -> None:
    interval = {"estimate": 1.7, "low": 1.25, "high": None}
    channel = {**solved("channel", 1.7, (3, 8), "opposite"), "ratio": interval}
    rows = [channel, solved("hint", 0.85, (8, 8), "cannot tell")]
    task = {"task": "parity", "seeds": [0], "planned_seeds": 1, "at_equal_steps": rows, "at_equal_operations": []}
    write_summary([write(tmp_path, "e1.json", {"contrasts": named("faster", margin=1.5), "tasks": [task]})], tmp_path)
    table = (tmp_path / "explanations.md").read_text()
    assert "at least 1.25 (3 : 8), opposite" in table
    assert "0.85 (8 : 8), cannot tell" in table


def test_words_fit_into_their_cells_and_notes_into_the_figure() -> None:
    effects = ("at most 0.60 (10 : 0)", "neither arm solved it", "+12.3 (100 : 100)", "-0.123")
    explanation = "all tokens in place of meta-tokens"
    cells = {
        (explanation, "second-attention", str(n)): Verdict(effect, "too few solved") for n, effect in enumerate(effects)
    }
    note = "what an effect is, how many seeds there are, and how it was tested, in more words than a line has; " * 3
    figure = draw_verdicts([{"list recall, operations": Column(note, cells), "x": Column(note, cells)}])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    widths = [text.get_window_extent(canvas.get_renderer()).width for text in axes.texts if "solved" in text.get_text()]
    name = next(text for text in axes.texts if text.get_text().startswith("all tokens")).get_window_extent()
    arms = next(text for text in axes.texts if text.get_text() == "second-attention : 0").get_window_extent()
    assert name.x1 < arms.x0
    cell = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
    assert len(widths) == 2 * len(effects)
    assert max(widths) < cell
    notes = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().startswith("what an effect"))
    assert notes[0].get_window_extent(canvas.get_renderer()).x1 <= canvas.get_width_height()[0]


def test_without_a_contrast_nothing_is_written(tmp_path: Path) -> None:
    write_summary([], tmp_path)
    assert not list(tmp_path.iterdir())


def test_panels_stand_below_one_another_with_rows_of_one_height() -> None:
    few = {"x, 1-8 tokens": Column("note", {("hint", "a", "b"): Verdict("+1.0 (9 : 8)", "equivalent")})}
    many = {
        f"task, {unit}": Column("note", {("hint", "a", str(n)): Verdict("0.80", "supported") for n in range(5)})
        for unit in ("steps", "operations")
    }
    figure = draw_verdicts([many, few])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    above, below = figure.axes
    assert above.get_position().y0 > below.get_position().y1
    assert below.get_position().height == pytest.approx(above.get_position().height / 5, rel=0.05)
    assert above.get_xlim() == below.get_xlim()


def test_a_cell_of_the_figure_has_effect_verdict_and_colour() -> None:
    columns = {
        "parity, steps": Column("note", {("hint", "a", "b"): Verdict("0.80", "supported, within the margin")}),
        "books, nats": Column("note", {("channel", "c", "d"): Verdict("+0.100", "opposite")}),
    }
    assert rows_of(columns) == [("hint", "a", "b"), ("channel", "c", "d")]
    (axes,) = draw_verdicts([columns]).axes
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert texts["0.80\nsupported*"] == (0.5, 0.5)
    assert texts["+0.100\nopposite"] == (1.5, 1.5)
    supported, opposite = (patch.get_facecolor()[:3] for patch in axes.patches)
    assert supported != opposite
