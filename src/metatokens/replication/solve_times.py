"""How many times as long does an arm take to solve a task as another? The endpoint `solve` of contrasts.

The unit is the training seed. Steps at the end of the curriculum are censored, and the same is asked of operations.
"""

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
    log_rank_test,
    restricted_mean_interval,
    time_ratio,
)
from metatokens.replication.judging import FinishedTask, correct_p_values, verdict_of_seeds
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
        "power": _power(contrasts, times, task.planned_seeds),
        "arms": [_arm_report(arm, cell, times[arm]) for arm, cell in task.arms.items()],
        "at_equal_steps": _compare(contrasts, times),
        "at_equal_operations": _compare(contrasts, operations),
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
        ratio = time_ratio(first, second, seed=0)
        rows.append(
            {
                **contrast.model_dump(),
                "seeds": len(first.times),
                "solved": [int(arm.observed.sum()) for arm in (first, second)],
                "ratio": {"estimate": None, "low": None, "high": None} if ratio is None else asdict(ratio),
                "p": log_rank_test(first, second, seed=0),
                "p_equivalence": equivalence_of_times(first, second, contrasts.margin, seed=0),
            }
        )
    correct_p_values(rows)
    return [{**row, "verdict": _verdict(row, contrasts)} for row in rows]


def _verdict(row: dict[str, Any], contrasts: Contrasts) -> str:
    ratio = row["ratio"]["estimate"]
    return verdict_of_seeds(
        row,
        contrasts,
        num_tests=len(contrasts.contrasts),
        num_seeds=row["seeds"],
        is_as_expected=ratio is not None and ratio < 1,
    )


def _power(contrasts: Contrasts, times: dict[str, Times], planned_seeds: int) -> dict[str, Any]:
    """Return the smallest ratio of the planned design that the strictest of Holm's tests finds in 80% of cases.

    Only arms whose seeds have all solved the task count; without any the power is None.
    """
    # of an arm with censored times the spread and the median would be too small
    known = {arm: own.times for arm, own in times.items() if own.observed.all() and len(own.times) >= FEWEST_SEEDS}
    if not known:
        return {"arms": [], "log_deviation": None, "smallest_ratio": None}
    spread = [np.log(solved).var(ddof=1) for solved in known.values()]
    deviation = float(np.sqrt(np.mean(spread)))
    horizon = next(iter(times.values())).horizon
    ratio = detectable_ratio(
        planned_seeds,
        deviation,
        level=contrasts.level / len(contrasts.contrasts),
        horizon_over_median=horizon / float(np.median(np.concatenate(list(known.values())))),
    )
    return {"arms": list(known), "log_deviation": deviation, "smallest_ratio": ratio, "seeds": planned_seeds}


def _effect(row: dict[str, Any]) -> str:
    if row["ratio"]["estimate"] is None:
        return "neither solved it"
    return f"{_bound(row)}{row['ratio']['estimate']:.2f}"


def _bound(row: dict[str, Any]) -> str:
    """Return "at most " or "at least " where one arm never solved the task, as the ratio is a bound then."""
    return "" if all(row["solved"]) else "at most " if row["solved"][0] else "at least "


def _bounds(interval: dict[str, Any], form: str) -> str:
    if interval["estimate"] is None:
        return "neither arm solved it"
    low, high = ("" if interval[key] is None else format(interval[key], form) for key in ("low", "high"))
    return f"{interval['estimate']:{form}} ({low or 'open'} to {high or 'open'})"


def _power_sentence(report: dict[str, Any]) -> str:
    power = report["power"]
    others = [arm["arm"] for arm in report["arms"] if arm["arm"] not in power["arms"]]
    sentence = (
        f"With {report['planned_seeds']} seeds, and a standard deviation of the log of the steps of "
        f"{power['log_deviation']:.2f}, the strictest of Holm's tests finds a ratio of {power['smallest_ratio']:.2f} "
        "in 80% of cases."
    )
    if others:
        names = ", ".join(f"`{arm}`" for arm in others)
        sentence += f" That is the deviation of the arms that every seed has solved; it says nothing of {names}."
    return sentence


def to_markdown(contrasts: Contrasts, reports: Sequence[dict[str, Any]]) -> str:
    """Write the arms and the contrasts of each report as tables."""
    lines = []
    for report in reports:
        spent = f"{report['cpu_hours']:.2f} CPU-hours"
        lines += [f"## {report['task']}: {len(report['seeds'])} of {report['planned_seeds']} seeds, {spent}", ""]
        if report["power"]["smallest_ratio"]:
            lines += [_power_sentence(report), ""]
        lines += [f"| arm | solved | censored at {report['horizon']:,} | restricted mean of the steps |"]
        lines += ["|---|---:|---:|---:|"]
        for arm in report["arms"]:
            mean = _bounds(arm["restricted_mean"], ",.0f")
            lines.append(f"| {arm['arm']} | {arm['solved']} | {arm['censored']} | {mean} |")
        for key in ("at_equal_steps", "at_equal_operations"):
            lines += ["", f"Ratios {key.replace('_', ' ')}; equivalent: within a factor of {contrasts.margin:g}.", ""]
            lines += [
                "| explanation | arms | solved | ratio | p (Holm) | p alike (Holm) | verdict |",
                "|---|---|---:|---:|---:|---:|---|",
            ]
            for row in report[key]:
                solved = " : ".join(f"{number} of {row['seeds']}" for number in row["solved"])
                ratio = _bounds(row["ratio"], ".2f")
                if row["ratio"]["estimate"] is not None:
                    ratio = _bound(row) + ratio
                lines.append(
                    f"| {row['explains']} | {row['first']} : {row['second']} | {solved} | {ratio} | "
                    f"{row['p_holm']:.3f} | {row['p_equivalence_holm']:.3f} | {row['verdict']} |"
                )
        lines.append("")
    return "\n".join(lines)


def draw(contrasts: Contrasts, reports: Sequence[dict[str, Any]]) -> "dict[str, Figure]":
    """Draw the curves, and the ratios of all contrasts."""
    from metatokens.report.solve_figures import draw_curves, draw_ratios  # matplotlib is an extra

    return {"": draw_curves(reports), "-ratios": draw_ratios(reports, contrasts.margin)}


def columns(contrasts: Contrasts, report: dict[str, Any]) -> "dict[str, Column]":
    """Return the verdicts at equal steps, and at equal operations."""
    from metatokens.report.verdict_figure import Column, Verdict  # matplotlib is an extra

    note = (
        f"{report['task']}: ratio of the first arm's steps or operations to the second's, {len(report['seeds'])} "
        f"seeds; equivalent within a factor of {contrasts.margin:g}; Holm over {len(contrasts.contrasts)}"
    )
    return {
        f"{report['task']}, {key.removeprefix('at_equal_')}": Column(
            note,
            {
                (row["explains"], row["first"], row["second"]): Verdict(_effect(row), row["verdict"])
                for row in report[key]
            },
        )
        for key in ("at_equal_steps", "at_equal_operations")
    }
