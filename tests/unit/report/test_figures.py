"""Figures of a sweep: what is drawn, and the same bytes for the same results."""

from dataclasses import replace
from pathlib import Path

import pytest

from metatokens.errors import DataError
from metatokens.evaluation.statistics import Interval
from metatokens.report.sweep_results import (
    AccuracyRow,
    CellResult,
    CurvePoint,
    EvaluationResult,
    PerplexityRow,
    SweepResults,
    load_results,
    to_json,
)

pytest.importorskip("matplotlib", reason="the extra `report` is not installed; `pip install -e '.[dev]'` brings it")

from metatokens.report.figures import draw_by_flops, draw_by_length, draw_by_training_length, draw_sweep
from metatokens.report.loss_figures import draw_losses


def cell(task: str, arm: str, trained_to: int, accuracies: list[float | None]) -> CellResult:
    lengths = ["33-64", "65-128"]
    intervals = [a if a is None else Interval(a, max(0, a - 0.1), min(1, a + 0.1)) for a in accuracies]
    rows = tuple(
        AccuracyRow(
            *(length, tuple(map(int, length.split("-"))), (2, 4), 200, (0, 1), accuracy, accuracy, None),
            sequence_by_seed=() if accuracy is None else (accuracy.estimate - 0.05, accuracy.estimate + 0.05),
            chance=1 / int(length.partition("-")[0]),
        )
        for length, accuracy in zip(lengths, intervals, strict=True)
    )
    curve = tuple(CurvePoint(step, 1e10 * step, step / 200, step / 250, step / 190, chance=0.02) for step in (50, 100))
    labels = {"task": task, "length": f"L{trained_to}", "arm": arm}
    evaluation = EvaluationResult("lengths", "task", (), rows)
    return CellResult(
        labels, task, "the same steps as a", (0, 1), (), 10, 100, 1e4, 1e3, 1e12, trained_to, curve, (evaluation,)
    )


def results(*cells: CellResult) -> SweepResults:
    axes: dict[str, dict[str, dict[str, str]]] = {"task": {}, "length": {}, "arm": {}}
    for one in cells:
        for axis, label in one.labels.items():
            axes[axis][label] = {}
    return SweepResults("sweep/1", {"axes": axes, "reference": "a"}, "arm", 4, 4, (), {}, cells)


@pytest.fixture
def two_arms() -> SweepResults:
    return results(
        *(
            cell(task, arm, 64, [0.9, None if arm == "b" else 0.5])
            for task in ("copying", "list_recall")
            for arm in "ab"
        )
    )


def test_equal_results_give_equal_bytes(two_arms: SweepResults, tmp_path: Path):
    first, second = draw_sweep(two_arms, tmp_path / "1"), draw_sweep(two_arms, tmp_path / "2")
    assert [path.name for path in first] == ["accuracy-by-length-lengths.png", "accuracy-by-training-flops.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.read_bytes().startswith(b"\x89PNG")
        assert b"Software" not in one.read_bytes()


def test_two_seeds_are_dots_and_no_band(two_arms: SweepResults):
    figure = draw_by_length(two_arms, "lengths")
    assert figure is not None
    for axes in figure.axes:
        assert not axes.collections  # a band would be one
        dots = [
            line.get_ydata() for line in axes.get_lines() if line.get_label().startswith("_") and len(line.get_ydata())
        ]
        assert [85, 95] in [pytest.approx(list(seeds)) for seeds in dots]


def test_there_is_a_panel_for_each_task_and_a_line_for_each_arm(two_arms: SweepResults):
    figure = draw_by_length(two_arms, "lengths")
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["copying", "list recall"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
        assert list(lines) == ["a", "b", "guessing"]
        assert list(lines["guessing"].get_ydata()) == pytest.approx([100 / 33, 100 / 65])
        assert list(lines["a"].get_ydata()) == [90, 50]
        assert list(lines["b"].get_ydata()) == [90]  # longer is n/a
    caption = " ".join(figure.texts[0].get_text().split())
    assert "n = 2 seeds x 200 prompts" in caption
    assert "mean of the seeds, dot: a seed" in caption
    assert "the same steps as a" in caption
    assert "longer than the model can represent" in caption


def test_accuracy_is_drawn_against_training_length_where_an_axis_varies_it(two_arms: SweepResults):
    assert draw_by_training_length(two_arms, "lengths") is None
    figure = draw_by_training_length(
        results(*(cell("copying", arm, length, [0.9, 0.5]) for length in (64, 128) for arm in "ab")), "lengths"
    )
    assert figure is not None
    (axes,) = figure.axes
    line = next(line for line in axes.get_lines() if line.get_label() == "a")
    assert list(line.get_ydata()) == [90, 50]  # each at the longest prompts that it was trained to


def test_accuracy_is_drawn_against_the_operations_of_training(two_arms: SweepResults):
    figure = draw_by_flops(two_arms)
    assert figure is not None
    line = next(line for line in figure.axes[0].get_lines() if line.get_label() == "a")
    assert list(line.get_xdata()) == [0.5, 1.0]
    guessing = next(line for line in figure.axes[0].get_lines() if line.get_label() == "guessing")
    assert list(guessing.get_xdata()) == [0.5, 1.0]
    assert list(guessing.get_ydata()) == [2, 2]
    assert "Training FLOPs, $10^{12}$" in figure.axes[0].get_xlabel()


def test_results_are_read_as_they_were_written(two_arms: SweepResults, tmp_path: Path):
    (tmp_path / "results.json").write_text(to_json(two_arms))
    assert load_results(tmp_path / "results.json") == two_arms
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other\.json"):
        load_results(tmp_path / "other.json")


def pretrained(arm: str, nats: float, difference: float | None) -> CellResult:
    interval = None if difference is None else Interval(difference, difference - 0.1, difference + 0.1)
    by_seed = () if difference is None else (difference - 0.02, difference + 0.02)
    own = Interval(nats, nats - 1, nats + 1)
    row = PerplexityRow("books", "test", (), 9, (0, 1), 99.0, own, (nats, nats), interval, by_seed, ())
    bare = cell("pre-training", arm, 64, [None, None])
    return replace(bare, evaluations=(), curve=(), perplexities=(row,))


def test_losses_are_drawn_as_differences_from_the_reference(tmp_path: Path):
    swept = results(pretrained("a", 5.0, None), pretrained("b", 4.5, -0.5), pretrained("c", 5.3, 0.3))
    (path,) = draw_sweep(swept, tmp_path)
    assert path.name == "losses-books.png"
    (axes,) = draw_losses(swept, "books").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c"]
    interval, mean, seeds = axes.lines[:3]
    assert list(seeds.get_xdata()) == [-0.52, -0.48]
    assert list(mean.get_xdata()) == [-0.5]
    assert list(interval.get_xdata()) == [-0.6, -0.4]


def test_losses_without_a_reference_are_drawn_as_they_are():
    (axes,) = draw_losses(results(pretrained("a", 5.0, None), pretrained("b", 4.5, None)), "books").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert list(axes.lines[2].get_xdata()) == [5.0, 5.0]
