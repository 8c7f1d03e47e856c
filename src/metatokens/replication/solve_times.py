"""How many times as long does an arm take to solve a task as another? The endpoint `solve` of contrasts.

The unit is the training seed. Steps at the end of the curriculum are censored, and the same is asked of operations.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from metatokens.config.contrasts import Contrasts
from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.loading import load_preset
from metatokens.config.sweep import load_sweep
from metatokens.evaluation.survival import (
    Times,
    detectable_ratio,
    equivalence_of_times,
    equivalence_power,
    log_normal_fit,
    log_rank_test,
    restricted_mean_interval,
    time_ratio,
)
from metatokens.replication.judging import FinishedTask, correct_p_values, seeds_text, verdict_of_seeds
from metatokens.report.sweep_results import CellResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from metatokens.report.verdict_figure import Column

FEWEST_SEEDS = 3


def judge(contrasts: Contrasts, task: FinishedTask) -> dict[str, Any]:
    """Return the report of a task: its arms, and the contrasts at equal steps and at equal operations."""
    horizon = load_preset(load_sweep(task.sweep_file).preset, schema=FinetuneConfig).total_steps
    times = {arm: _times_of(cell, task.seeds, horizon) for arm, cell in task.arms.items()}
    operations = {arm: times[arm].scaled(_operations_of_a_step(cell)) for arm, cell in task.arms.items()}
    return {
        "task": task.name,
        "seeds": task.seeds,
        "planned_seeds": task.planned_seeds,
        "horizon": horizon,
        "cpu_hours": task.cpu_hours,
        "arms": [_arm_report(arm, cell, times[arm]) for arm, cell in task.arms.items()],
        "at_equal_steps": _compare(contrasts, times),
        "at_equal_operations": _compare(contrasts, operations),
        "power": _power(contrasts, times, task.planned_seeds),
        "versions": task.results.versions,
    }


def _times_of(cell: CellResult, seeds: list[int], horizon: int) -> Times:
    """Return the steps to solve of some seeds."""
    trainings = {one.seed: one for one in cell.trainings}
    steps = [trainings[seed].steps for seed in seeds]
    return Times.of(steps, [bool(trainings[seed].solved) for seed in seeds], horizon)


def _operations_of_a_step(cell: CellResult) -> float:
    return sum(one.training_flops for one in cell.trainings) / sum(one.steps for one in cell.trainings)


def _arm_report(arm: str, cell: CellResult, times: Times) -> dict[str, Any]:
    return {
        "arm": arm,
        "parameters": cell.parameters,
        "operations_of_a_step": _operations_of_a_step(cell),
        "solved": int(times.observed.sum()),
        "censored": int((~times.observed).sum()),
        "steps": times.times.tolist(),
        "is_solved": times.observed.tolist(),
        "restricted_mean": asdict(restricted_mean_interval(times, seed=0)),
    }


def _compare(contrasts: Contrasts, times: dict[str, Times]) -> list[dict[str, Any]]:
    """Return the contrasts of one task, with Holm's correction over them."""
    rows = []
    for contrast in contrasts.contrasts:
        first, second = times[contrast.first], times[contrast.second]
        horizon = min(first.horizon, second.horizon)
        is_solved = [arm.until(horizon).observed for arm in (first, second)]
        rows.append(
            {
                **contrast.model_dump(),
                "seeds": len(first.times),
                "solved": [int(arm.observed.sum()) for arm in (first, second)],
                "seeds_that_differ": int(np.logical_or(*is_solved).sum()),
                "ratio": asdict(time_ratio(first, second, seed=0)),
                "p": log_rank_test(first, second, seed=0),
                "p_equivalence": equivalence_of_times(first, second, contrasts.margin, seed=0),
            }
        )
    correct_p_values(rows)
    return [{**row, "verdict": _verdict(row, contrasts)} for row in rows]


def _verdict(row: dict[str, Any], contrasts: Contrasts) -> str:
    ratio = row["ratio"]
    expected_end = ratio["high"] if ratio["estimate"] is None else ratio["estimate"]
    return verdict_of_seeds(
        row,
        contrasts,
        num_tests=len(contrasts.contrasts),
        num_seeds=row["seeds"],
        is_as_expected=expected_end is not None and expected_end < 1,
    )


def _power(contrasts: Contrasts, times: dict[str, Times], planned_seeds: int) -> list[dict[str, Any]]:
    """Return what the planned design can find in each contrast, if its arms spread as they do.

    Log-normal times of both arms have the root mean square of their deviations and the geometric mean of their
    medians. The tests are the strictest of Holm's. Numbers are None where fewer than three seeds of an arm have solved
    the task.
    """
    level = contrasts.level / len(contrasts.contrasts)
    fits = {arm: log_normal_fit(own) for arm, own in times.items() if own.observed.sum() >= FEWEST_SEEDS}
    rows: list[dict[str, Any]] = []
    for contrast in contrasts.contrasts:
        arms = (contrast.first, contrast.second)
        row: dict[str, Any] = {"explains": contrast.explains, "first": contrast.first, "second": contrast.second}
        if not all(arm in fits for arm in arms):
            rows.append({**row, "log_deviation": None, "smallest_ratio": None, "equal_found_equivalent": None})
            continue
        (median, deviation), (other_median, other_deviation) = (fits[arm] for arm in arms)
        both = math.sqrt((deviation**2 + other_deviation**2) / 2)
        horizon = times[contrast.first].horizon / math.sqrt(median * other_median)
        ratio = detectable_ratio(planned_seeds, both, level=level, horizon_over_median=horizon)
        alike = equivalence_power(planned_seeds, both, contrasts.margin, level=level, horizon_over_median=horizon)
        rows.append({**row, "log_deviation": both, "smallest_ratio": ratio, "equal_found_equivalent": alike})
    return rows


def ratio_text(row: dict[str, Any]) -> str:
    """Return the ratio of a contrast with its interval; where one arm never solved the task, the bound."""
    if row["ratio"]["estimate"] is None:
        return _bound_text(row)
    ends = ("open" if end is None else f"{end:.2f}" for end in (row["ratio"]["low"], row["ratio"]["high"]))
    return f"{row['ratio']['estimate']:.2f} ({' to '.join(ends)})"


def _bound_text(row: dict[str, Any]) -> str:
    """Return the one known end of an interval: the test rejects every ratio beyond it."""
    low, high = row["ratio"]["low"], row["ratio"]["high"]
    if low is None and high is None:
        return "no bound" if any(row["solved"]) else "neither arm solved it"
    return f"at most {high:.2f}" if low is None else f"at least {low:.2f}"


def _effect(row: dict[str, Any]) -> str:
    """Return the ratio as the summary has it: a bound where an end is open, and the seeds solved if not all are."""
    ratio = row["ratio"]
    is_open = None in (ratio["estimate"], ratio["low"], ratio["high"])
    text = _bound_text(row) if is_open else f"{ratio['estimate']:.2f}"
    first, second = row["solved"]
    return text if first == second == row["seeds"] else f"{text} ({first} : {second})"


def _title(report: dict[str, Any]) -> str:
    return str(report["task"]).replace("_", " ")


def _mean_text(arm: dict[str, Any], horizon: int) -> str:
    if not arm["solved"]:
        return f"over {horizon:,}"
    mean = arm["restricted_mean"]
    return f"{mean['estimate']:,.0f} ({mean['low']:,.0f} to {mean['high']:,.0f})"


def _power_table(report: dict[str, Any]) -> list[str]:
    lines = [
        f"What {report['planned_seeds']} seeds can find, simulated with log-normal times that spread as those of the "
        "two arms: the smallest ratio that the strictest of Holm's tests finds in 80% of cases, and how often it finds "
        "equal arms equivalent. -: fewer than three seeds of an arm have solved the task, or no ratio is found as "
        "often.",
        "",
        "| explanation | arms | standard deviation of the log | ratio found | equal arms found equivalent |",
        "|---|---|---:|---:|---:|",
    ]
    for row in report["power"]:
        deviation, ratio = (
            "-" if row[key] is None else f"{row[key]:.2f}" for key in ("log_deviation", "smallest_ratio")
        )
        alike = "-" if row["equal_found_equivalent"] is None else f"{row['equal_found_equivalent']:.0%}"
        lines.append(f"| {row['explains']} | {row['first']} : {row['second']} | {deviation} | {ratio} | {alike} |")
    return lines


def to_markdown(contrasts: Contrasts, reports: Sequence[dict[str, Any]]) -> str:
    """Write the arms and the contrasts of each report as tables."""
    lines = []
    for report in reports:
        spent = f"{report['cpu_hours']:.2f} CPU-hours"
        lines += [f"## {_title(report)}: {len(report['seeds'])} of {report['planned_seeds']} seeds, {spent}", ""]
        lines += [f"| arm | solved | censored at {report['horizon']:,} | restricted mean of the steps |"]
        lines += ["|---|---:|---:|---:|"]
        for arm in report["arms"]:
            mean = _mean_text(arm, report["horizon"])
            lines.append(f"| {arm['arm']} | {arm['solved']} | {arm['censored']} | {mean} |")
        for key in ("at_equal_steps", "at_equal_operations"):
            lines += ["", f"Ratios {key.replace('_', ' ')}; equivalent: within a factor of {contrasts.margin:g}.", ""]
            lines += [
                "| explanation | arms | solved | ratio | p (Holm) | p alike (Holm) | verdict |",
                "|---|---|---:|---:|---:|---:|---|",
            ]
            for row in report[key]:
                solved = " : ".join(f"{number} of {row['seeds']}" for number in row["solved"])
                lines.append(
                    f"| {row['explains']} | {row['first']} : {row['second']} | {solved} | {ratio_text(row)} | "
                    f"{row['p_holm']:.3f} | {row['p_equivalence_holm']:.3f} | {row['verdict']} |"
                )
        lines += ["", *_power_table(report), ""]
    return "\n".join(lines)


def draw(contrasts: Contrasts, reports: Sequence[dict[str, Any]]) -> "dict[str, Figure]":
    """Draw the curves, and the ratios of all contrasts."""
    from metatokens.report.solve_figures import draw_curves, draw_ratios  # matplotlib is an extra

    return {"": draw_curves(reports), "-ratios": draw_ratios(reports, contrasts.margin)}


def columns(contrasts: Contrasts, report: dict[str, Any]) -> "dict[str, Column]":
    """Return the verdicts at equal steps, and at equal operations."""
    from metatokens.report.verdict_figure import Column, Verdict  # matplotlib is an extra

    task = _title(report)
    note = (
        f"{task}: ratio of the first arm's steps or operations to the second's, {seeds_text(report)} "
        f"(in brackets: that solved it, if not all); equivalent within a factor of {contrasts.margin:g}; Holm over "
        f"{len(contrasts.contrasts)}"
    )
    return {
        f"{task}, {key.removeprefix('at_equal_')}": Column(
            note,
            {
                (row["explains"], row["first"], row["second"]): Verdict(_effect(row), row["verdict"])
                for row in report[key]
            },
        )
        for key in ("at_equal_steps", "at_equal_operations")
    }
