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
from metatokens.evaluation.significance import least_units
from metatokens.evaluation.survival import (
    Design,
    Times,
    detectable_ratio,
    equivalence_of_times,
    equivalence_power_of_times,
    log_normal_fit,
    log_rank_test,
    restricted_mean_interval,
    time_ratio,
)
from metatokens.replication.judging import (
    FinishedTask,
    PowerRow,
    correct_p_values,
    power_table,
    seeds_text,
    verdict_of_seeds,
)
from metatokens.report.sweep_results import CellResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from metatokens.report.verdict_figure import Column

FEWEST_SEEDS = 3
_POWER = ("log_deviation", "correlation", "smallest_ratio", "equal_found_equivalent")


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
                "seeds_that_tell": int(np.logical_or(*is_solved).sum()),
                "ratio": asdict(time_ratio(first, second, seed=0)),
                "p": log_rank_test(first, second, seed=0),
                "p_equivalence": equivalence_of_times(first, second, contrasts.margin, seed=0),
            }
        )
    correct_p_values(rows)
    return [{**row, "verdict": _verdict(row, contrasts)} for row in rows]


def _verdict(row: dict[str, Any], contrasts: Contrasts) -> str:
    """Return the verdict; a seed that neither arm has solved lowers no p-value."""
    ratio, num_tests = row["ratio"], len(contrasts.contrasts)
    expected_end = ratio["high"] if ratio["estimate"] is None else ratio["estimate"]
    found = verdict_of_seeds(
        row,
        contrasts,
        num_tests=num_tests,
        num_seeds=row["seeds"],
        is_as_expected=expected_end is not None and expected_end < 1,
    )
    least = least_units(num_tests, contrasts.level) - 1  # of the one-sided tests of equivalence
    return "too few solved" if found == "cannot tell" and row["seeds_that_tell"] < least else found


def _power(contrasts: Contrasts, times: dict[str, Times], planned_seeds: int) -> list[dict[str, Any]]:
    """Return what the planned design can find in each contrast, if its arms spread as they do.

    Times are log-normal with the root mean square of the deviations of both arms, and correlated within a seed as
    theirs are. The faster arm has the geometric mean of their medians. The tests are the strictest of Holm's. Numbers
    are None where fewer than three seeds of an arm have solved the task.
    """
    level = contrasts.level / len(contrasts.contrasts)
    fits = {arm: log_normal_fit(own) for arm, own in times.items() if own.observed.sum() >= FEWEST_SEEDS}
    rows: list[dict[str, Any]] = []
    for contrast in contrasts.contrasts:
        first, second = contrast.first, contrast.second
        row: dict[str, Any] = {"explains": contrast.explains, "first": first, "second": second}
        if first not in fits or second not in fits:
            rows.append({**row, **dict.fromkeys(_POWER)})
            continue
        (median, deviation), (other_median, other_deviation) = fits[first], fits[second]
        both = math.sqrt((deviation**2 + other_deviation**2) / 2)
        design = Design(
            planned_seeds,
            both,
            _correlation(times[first], times[second]),
            times[first].horizon / math.sqrt(median * other_median),
        )
        ratio = detectable_ratio(design, level=level)
        alike = equivalence_power_of_times(design, contrasts.margin, level=level)
        rows.append({**row, **dict(zip(_POWER, (both, design.correlation, ratio, alike), strict=True))})
    return rows


def _correlation(first: Times, second: Times) -> float:
    """Return the correlation of the logs over seeds, censored times as the last step; 0 if an arm has one time."""
    logs = [np.log(times.times) for times in (first, second)]
    return float(np.corrcoef(logs)[0, 1]) if all(one.std() > 0 for one in logs) else 0.0


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
    ratio, (first, second) = row["ratio"], row["solved"]
    is_open = None in (ratio["estimate"], ratio["low"], ratio["high"])
    text = _bound_text(row) if is_open else f"{ratio['estimate']:.2f}"
    return text if first == second in (0, row["seeds"]) else f"{text} ({first} : {second})"


def _title(report: dict[str, Any]) -> str:
    return str(report["task"]).replace("_", " ")


def _mean_text(arm: dict[str, Any], horizon: int) -> str:
    if not arm["solved"]:
        return f"over {horizon:,}"
    mean = arm["restricted_mean"]
    return f"{mean['estimate']:,.0f} ({mean['low']:,.0f} to {mean['high']:,.0f})"


def _power_table(contrasts: Contrasts, report: dict[str, Any]) -> list[str]:
    if all(row["log_deviation"] is None for row in report["power"]):
        return ["No power is stated: each contrast has an arm with fewer than three solved seeds."]
    lines = [
        f"Power at equal steps, {report['planned_seeds']} seeds, 300 experiments simulated for each number: log-normal "
        "times that spread as those of the two arms, and are correlated within a seed as they are. Smallest ratio "
        "found: how many times as long the slower arm must take for the strictest of Holm's tests "
        f"({contrasts.level:g} / {len(contrasts.contrasts)}) to find it in 80%. Equivalence found: how often that test "
        "finds equally fast arms equivalent.",
        "",
    ]
    if any(row["smallest_ratio"] is None for row in report["power"]):
        lines[0] += " -: an arm has fewer than three solved seeds, or no ratio is found in 80%."
    rows = [
        PowerRow(
            [row["explains"], f"{row['first']} : {row['second']}"],
            "" if row["log_deviation"] is None else f"{row['log_deviation']:.2f}",
            "" if row["smallest_ratio"] is None else f"{row['smallest_ratio']:.2f}",
            row["equal_found_equivalent"],
        )
        for row in report["power"]
    ]
    names = ("explanation", "arms")
    return [*lines, *power_table(names, "the log of the steps", "smallest ratio found", rows)]


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
        lines += ["", *_power_table(contrasts, report), ""]
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
        "(in brackets: seeds that solved it, where not all did); equivalent within a factor of "
        f"{contrasts.margin:g}; Holm over {len(contrasts.contrasts)}"
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
