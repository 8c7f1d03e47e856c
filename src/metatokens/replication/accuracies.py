"""How many more answers does an arm have right than another? The endpoint `accuracy` of contrasts.

Each task is a sweep over fine-tunings, and `evaluation` the one whose answers are compared, at each of `lengths`. More
is better. A side may be asked in another evaluation, such as one that takes something from its meta-tokens. The unit is
the training seed: differences are tested by sign flips, and corrected after Holm over all contrasts and lengths of a
task. The models of all seeds answer the same prompts, so the tests say nothing of other prompts. Sides that both have
everything right, or no more than a guess, are equivalent too, so every difference stands beside what the sides have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from metatokens.config.contrasts import Contrasts, Side
from metatokens.errors import DataError
from metatokens.evaluation.significance import (
    bca_interval,
    detectable_difference,
    equivalence_power,
    equivalence_test,
    sign_flip_test,
)
from metatokens.evaluation.statistics import MINIMUM_SEEDS, Interval
from metatokens.replication.judging import (
    FinishedTask,
    PowerRow,
    correct_p_values,
    power_table,
    seeds_text,
    verdict_of_seeds,
)
from metatokens.report.numbers import format_share
from metatokens.report.sweep_results import AccuracyRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from metatokens.report.verdict_figure import Column

FEWEST_SEEDS = 3
_SMALLEST_SPREAD = 1e-9  # above the rounding of differences of shares


def judge(contrasts: Contrasts, task: FinishedTask) -> dict[str, Any]:
    """Return the report of a task: what each side has right at each length, and the contrasts.

    Raises:
        DataError: a side was not asked at a length, or cannot represent it.
    """
    rows = {(side, length): _row(task, side, length) for side in contrasts.sides for length in contrasts.lengths}
    right = {key: _by_seed(row, task.seeds) for key, row in rows.items()}
    return {
        "task": task.name,
        "seeds": task.seeds,
        "planned_seeds": task.planned_seeds,
        "cpu_hours": task.cpu_hours,
        "unsolved": _unsolved(task),
        "sides": [
            {**side._asdict(), "length": length, "chance": rows[side, length].chance, "by_seed": right[side, length]}
            for side, length in rows
        ],
        "contrasts": _compare(contrasts, right, task.planned_seeds),
        "versions": task.results.versions,
    }


def to_markdown(contrasts: Contrasts, reports: Sequence[dict[str, Any]]) -> str:
    """Write what each side has right, and the contrasts, as tables."""
    lines = []
    for report in reports:
        spent = f"{report['cpu_hours']:.2f} CPU-hours"
        lines += [f"## {report['task']}: {len(report['seeds'])} of {report['planned_seeds']} seeds, {spent}", ""]
        if report["unsolved"]:
            lines += [f"Trainings that ended without solving the task: {_counts(report['unsolved'])}.", ""]
        lines += [
            "| arm | evaluation | prompt tokens | right, mean (seed by seed) | guesses |",
            "|---|---|---|---:|---:|",
        ]
        for side in report["sides"]:
            mean = sum(side["by_seed"]) / len(side["by_seed"])
            shares = f"{100 * mean:.1f}% ({', '.join(f'{100 * share:.1f}' for share in side['by_seed'])})"
            guesses = "" if side["chance"] is None else format_share(side["chance"])
            lines.append(f"| {side['arm']} | {side['evaluation']} | {side['length']} | {shares} | {guesses} |")
        lines += [
            "",
            f"Differences in points, intervals over seeds; equivalent: within {100 * contrasts.margin:g}.",
            "",
        ]
        lines += [
            "| explanation | sides | prompt tokens | right | difference | seed by seed | p (Holm) | p alike (Holm) | "
            "verdict |",
            "|---|---|---|---:|---:|---|---:|---:|---|",
        ]
        for row in report["contrasts"]:
            cells = [*_names(row), _levels(row, ".1f"), _difference(row), ", ".join(map(_points, row["by_seed"]))]
            cells += [f"{row['p_holm']:.3f}", f"{row['p_equivalence_holm']:.3f}", row["verdict"]]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *_power_table(contrasts, report), ""]
    return "\n".join(lines)


def draw(contrasts: Contrasts, reports: Sequence[dict[str, Any]]) -> "dict[str, Figure]":
    """Draw the contrasts by length."""
    from metatokens.report.accuracy_figures import draw_accuracies  # matplotlib is an extra

    return {"": draw_accuracies(reports, contrasts.margin)}


def columns(contrasts: Contrasts, report: dict[str, Any]) -> "dict[str, Column]":
    """Return the verdicts at each length."""
    from metatokens.report.verdict_figure import Column, Verdict  # matplotlib is an extra

    note = (
        f"{report['task']}, tokens: difference in points of answers right (in brackets: both sides, in percent), "
        f"{seeds_text(report)}; equivalent within {100 * contrasts.margin:g}; Holm over "
        f"{len(report['contrasts'])}"
    )
    if any(report["unsolved"].values()):
        note += f"; not solved: {_counts(report['unsolved'])}"
    return {
        f"{report['task']}, {length} tokens": Column(
            note,
            {
                (row["explains"], row["first"], row["second"]): Verdict(
                    f"{_points(row['difference']['estimate'])} ({_levels(row, '.0f')})", row["verdict"]
                )
                for row in report["contrasts"]
                if row["length"] == length
            },
        )
        for length in contrasts.lengths
    }


def _unsolved(task: FinishedTask) -> dict[str, int]:
    """Return how many trainings of each arm have not solved the task; nothing if they do not stop for that."""
    stopping = {
        arm: [one.solved for one in cell.trainings if one.seed in task.seeds and one.solved is not None]
        for arm, cell in task.arms.items()
    }
    return {arm: solved.count(False) for arm, solved in stopping.items() if solved}


def _row(task: FinishedTask, side: Side, length: str) -> AccuracyRow:
    for evaluation in task.arms[side.arm].evaluations:
        for row in evaluation.rows:
            if (evaluation.name, row.length) == (side.evaluation, length) and row.sequence_by_seed:
                return row
    raise DataError(
        f"contrasts of {task.name}",
        expected=f"{side.arm} asked in {side.evaluation} at {length} tokens",
        found="no such row, or one that the model cannot represent",
        remedy="name lengths that every side was asked at",
    )


def _by_seed(row: AccuracyRow, seeds: Sequence[int]) -> list[float]:
    shares = dict(zip(row.seeds, row.sequence_by_seed, strict=True))
    return [shares[seed] for seed in seeds]


def _compare(
    contrasts: Contrasts, right: dict[tuple[Side, str], list[float]], planned_seeds: int
) -> list[dict[str, Any]]:
    """Return all contrasts at all lengths, with Holm's correction over them, and what the planned seeds can find."""
    rows = list(_differences(contrasts, right))
    correct_p_values(rows)
    level = contrasts.level / len(rows)
    in_deviations = detectable_difference(planned_seeds, level=level)
    for row in rows:
        deviation = 0.0 if _is_constant(row) else stdev(row["by_seed"])
        row |= {
            "deviation": deviation,
            "smallest_difference": deviation * in_deviations if deviation and in_deviations else None,
            "equal_found_equivalent": equivalence_power(planned_seeds, contrasts.margin / deviation, level=level)
            if deviation
            else None,
            "verdict": _verdict(row, contrasts, len(rows)),
        }
    return rows


def _differences(contrasts: Contrasts, right: dict[tuple[Side, str], list[float]]) -> Iterator[dict[str, Any]]:
    for contrast in contrasts.contrasts:
        for length in contrasts.lengths:
            own, other = (right[contrasts.side(name), length] for name in (contrast.first, contrast.second))
            by_seed = [first - second for first, second in zip(own, other, strict=True)]
            yield {
                **contrast.model_dump(),
                "length": length,
                "right": [fmean(own), fmean(other)],
                "difference": asdict(_over_seeds(by_seed)),
                "by_seed": by_seed,
                "p": sign_flip_test(by_seed, seed=0),
                "p_equivalence": equivalence_test(by_seed, contrasts.margin, seed=0),
            }


def _over_seeds(by_seed: list[float]) -> Interval:
    """Return the mean with its interval; without one where seeds are listed one by one, as in other reports."""
    if len(by_seed) < MINIMUM_SEEDS:
        return Interval(fmean(by_seed), None, None)
    return bca_interval(by_seed, seed=0, minimum_documents=MINIMUM_SEEDS)


def _verdict(row: dict[str, Any], contrasts: Contrasts, num_tests: int) -> str:
    is_more = row["difference"]["estimate"] > 0
    return verdict_of_seeds(
        row,
        contrasts,
        num_tests=num_tests,
        num_seeds=len(row["by_seed"]),
        is_as_expected=is_more == (row["expected"] == "higher"),
    )


def _is_constant(row: dict[str, Any]) -> bool:
    return bool(max(row["by_seed"]) - min(row["by_seed"]) < _SMALLEST_SPREAD)


def _names(row: dict[str, Any]) -> list[str]:
    return [row["explains"], f"{row['first']} - {row['second']}", row["length"]]


def _levels(row: dict[str, Any], form: str) -> str:
    first, second = (format(100 * share, form) for share in row["right"])
    return f"{first} : {second}"


def _difference(row: dict[str, Any]) -> str:
    """Return the difference with its interval; "every seed" if all have the same, as nothing can be resampled then."""
    if _is_constant(row):
        return f"{_points(row['difference']['estimate'])}, every seed"
    return Interval(**row["difference"]).to_text("+.1f", 100)


def _counts(unsolved: dict[str, int]) -> str:
    return ", ".join(f"{count} of {arm}" for arm, count in unsolved.items())


def _power_table(contrasts: Contrasts, report: dict[str, Any]) -> list[str]:
    lines = [
        f"Power, {report['planned_seeds']} seeds, 300 experiments simulated for each number: normal differences that "
        "spread as these. Smallest difference found: by the strictest of Holm's tests "
        f"({contrasts.level:g} / {len(report['contrasts'])}) in 80%. Equivalence found: how often that test finds "
        "equal sides equivalent. -: every seed has the same difference, or none is found in 80%.",
        "",
    ]
    rows = [
        PowerRow(
            _names(row),
            f"{100 * row['deviation']:.1f}",
            "" if row["smallest_difference"] is None else f"{100 * row['smallest_difference']:.1f}",
            row["equal_found_equivalent"],
        )
        for row in report["contrasts"]
    ]
    names = ("explanation", "sides", "prompt tokens")
    return [*lines, *power_table(names, "a difference, points", "smallest difference found, points", rows)]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
