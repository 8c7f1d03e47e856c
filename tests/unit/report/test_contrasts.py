"""Every contrast of a sweep is told, with the correction for their number, and a null only as a test of its own."""

from dataclasses import replace

import pytest

from metatokens.evaluation.statistics import Interval
from metatokens.report.contrasts import contrasts
from metatokens.report.sweep_results import AccuracyRow, CellResult, EvaluationResult, SweepResults

TWELVE = tuple(range(12))


def cell(arm: str, differences: tuple[float, ...], lengths: int = 1) -> CellResult:
    seeds = TWELVE[: len(differences)]
    difference = Interval(sum(differences) / len(differences), None, None) if differences else None
    rows = tuple(
        AccuracyRow(f"{n}-{n}", (n, n), (2, 4), 9, seeds, None, None, difference, difference_by_seed=differences)
        for n in range(1, lengths + 1)
    )
    evaluations = (EvaluationResult("length", "task", (), rows), EvaluationResult("zeroed", "task", ("zero",), rows))
    return CellResult({"arm": arm}, "copying", "", seeds, (), 1, 1, 1.0, 1.0, 1.0, 9, (), evaluations)


def sweep(*cells: CellResult) -> SweepResults:
    axes = {"arm": {one.labels["arm"]: None for one in cells}}
    return SweepResults(
        "sweep/1", {"axes": axes, "reference": "pause"}, "arm", 1, 1, (), {}, (cell("pause", ()), *cells)
    )


def test_every_length_of_every_arm_is_a_contrast_and_interventions_are_none() -> None:
    found = contrasts(sweep(cell("meta", (0.1,) * 12, 3), cell("double", (0.2,) * 12, 2)))
    assert [(one.arm, one.length) for one in found] == [
        *(("meta", f"{n}-{n}") for n in (1, 2, 3)),
        *(("double", f"{n}-{n}") for n in (1, 2)),
    ]


def test_p_values_are_corrected_for_the_number_of_contrasts() -> None:
    (alone,) = contrasts(sweep(cell("meta", (0.1,) * 12)))
    of_three = contrasts(sweep(cell("meta", (0.1,) * 12, 3)))
    assert alone.p_value == 2 / 2**12
    assert [one.p_value for one in of_three] == pytest.approx([3 * 2 / 2**12] * 3)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.1,) * 12, "higher"),
        ((-0.1,) * 12, "lower"),
        ((0.01, -0.01) * 6, "alike within 5 points"),
        ((0.2, -0.2) * 6, "cannot tell"),
        ((0.2, 0.3, 0.25), "too few seeds (3, at least 6 needed)"),
        ((0.0, 0.0, 0.0), "too few seeds (3, at least 6 needed)"),
    ],
)
def test_what_seeds_say(differences: tuple[float, ...], verdict: str) -> None:
    (found,) = contrasts(sweep(cell("meta", differences)))
    assert found.verdict == verdict


def test_a_file_without_the_differences_of_seeds_has_no_contrasts() -> None:
    results = sweep(cell("meta", (0.1,) * 12))
    rows = tuple(replace(row, difference_by_seed=()) for row in results.cells[1].evaluations[0].rows)
    bare = replace(results.cells[1], evaluations=(replace(results.cells[1].evaluations[0], rows=rows),))
    assert contrasts(replace(results, cells=(bare,))) == []
