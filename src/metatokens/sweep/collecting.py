"""From run folders to the results of a sweep: accuracies over seeds and instances, and differences from the reference.

Every arm answers the same test instances, so a difference is paired by seed and by instance. With one seed finished,
the interval is about that training alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import transformers

from metatokens.config.finetuning import EvaluateConfig, FinetuneConfig
from metatokens.config.sweep import PerplexityConfig, SweepConfig
from metatokens.errors import redact_values
from metatokens.evaluation.statistics import (
    Interval,
    accuracy_interval,
    bootstrap_paired_seeds_and_instances,
)
from metatokens.report.sweep_results import (
    RESULTS_FORMAT,
    AccuracyRow,
    CellResult,
    CurvePoint,
    EvaluationResult,
    FailedRun,
    SweepResults,
    TrainingOutcome,
)
from metatokens.sweep.perplexities import perplexity_row
from metatokens.sweep.planning import SweepRun, matching_text
from metatokens.sweep.progress import flops_after
from metatokens.sweep.running import is_done, read_answers, read_cpu_seconds

if TYPE_CHECKING:
    from pathlib import Path

Outcomes = tuple[tuple[float, ...], ...]
"""For each seed and each instance, the share of the answers that is right."""
Labels = tuple[str, ...]


def collect(sweep: SweepConfig, runs: Sequence[SweepRun], out: Path, failed: Sequence[FailedRun] = ()) -> SweepResults:
    """Return the results of the runs that are finished so far."""
    finished: dict[Labels, list[SweepRun]] = {}
    done = [run for run in runs if is_done(run)]
    for run in runs:
        finished.setdefault(tuple(run.labels.values()), [])
    for run in done:
        finished[tuple(run.labels.values())].append(run)
    answers = {run.name: read_answers(run) for run in done}
    results = [
        _combination(sweep, own, finished.get(_reference_labels(sweep, own[0]), []), answers, out)
        for own in finished.values()
        if own
    ]
    return SweepResults(
        format=RESULTS_FORMAT,
        sweep=redact_values(sweep.model_dump(mode="json")),
        arm_axis=sweep.arm_axis,
        runs=len(runs),
        done=len(done),
        failed=tuple(failed),
        versions={
            "metatokens": version("metatokens"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        cells=tuple(results),
    )


def _reference_labels(sweep: SweepConfig, run: SweepRun) -> Labels:
    """Return the labels of the reference of a run's combination; no labels if it is the reference itself."""
    axis = sweep.arm_axis
    if sweep.reference is None or axis is None or run.labels[axis] == sweep.reference:
        return ("",)
    return tuple({**run.labels, axis: sweep.reference}.values())


Answers = Mapping[str, Mapping[str, dict[str, Any]]]


def _combination(
    sweep: SweepConfig, runs: Sequence[SweepRun], references: Sequence[SweepRun], answers: Answers, out: Path
) -> CellResult:
    first, config = runs[0], runs[0].config
    measured = [run.folder.read_result() for run in runs]

    def mean(key: str) -> float:
        return float(sum(result[key] for result in measured) / len(measured))

    return CellResult(
        labels=first.labels,
        task=config.task.kind if isinstance(config, FinetuneConfig) else "pre-training",
        matching=matching_text(sweep),
        seeds=tuple(run.seed for run in runs),
        models=tuple(str(run.folder.model_path.relative_to(out)) for run in runs),
        parameters=measured[0]["num_parameters"],
        steps=round(mean("steps")),
        text_tokens=mean("text_tokens"),
        meta_tokens=mean("meta_tokens"),
        training_flops=mean("training_flops"),
        trained_to=config.curriculum[-1].prompt_tokens[1]
        if isinstance(config, FinetuneConfig)
        else config.text_tokens_per_block,
        window=first.windows.own,
        original_window=first.windows.original,
        curve=tuple(_curve(runs, mean("training_flops"))),
        evaluations=tuple(
            EvaluationResult(
                name=evaluation.name,
                meta_places=evaluation.config.task.meta_places.kind,
                interventions=evaluation.interventions,
                rows=tuple(_rows(evaluation.name, runs, references, answers)),
            )
            for evaluation in first.evaluations
            if isinstance(evaluation.config, EvaluateConfig)
        ),
        perplexities=tuple(
            perplexity_row(
                evaluation, _reports(evaluation.name, runs, answers), _reports(evaluation.name, references, answers)
            )
            for evaluation in first.evaluations
            if isinstance(evaluation.config, PerplexityConfig)
        ),
        trainings=tuple(
            TrainingOutcome(
                seed=run.seed,
                steps=result["steps"],
                solved=result.get("solved"),
                training_flops=result["training_flops"],
                cpu_seconds=read_cpu_seconds(run),
            )
            for run, result in zip(runs, measured, strict=True)
        ),
    )


def _rows(
    name: str, runs: Sequence[SweepRun], references: Sequence[SweepRun], answers: Answers
) -> Iterator[AccuracyRow]:
    reports, others = _reports(name, runs, answers), _reports(name, references, answers)
    for index, row in enumerate(next(iter(reports.values()))["rows"]):
        rows = [report["rows"][index] for report in reports.values()]
        known = all(row["sequence_accuracy"] is not None for row in rows)
        difference, by_seed = _difference(reports, others, row["length"]) if known else (None, ())
        yield AccuracyRow(
            length=row["length"],
            prompt_tokens=tuple(row["prompt_tokens"]),
            size=tuple(row["size"]),
            instances=row["instances"],
            seeds=tuple(reports),
            token_accuracy=_pooled(rows, "token") if known else None,
            sequence_accuracy=_pooled(rows, "sequence") if known else None,
            difference=difference,
            sequence_by_seed=_means(_outcomes(rows, "sequence")) if known else (),
            difference_by_seed=by_seed,
            chance=row.get("chance"),
        )


def _reports(name: str, runs: Sequence[SweepRun], answers: Answers) -> dict[int, dict[str, Any]]:
    """Return the report of each seed that has one."""
    return {run.seed: answers[run.name][name] for run in runs if name in answers[run.name]}


def _pooled(rows: Sequence[dict[str, Any]], kind: str) -> Interval:
    """Return the accuracy over several models; for a single one, the accuracy in its report."""
    if len(rows) == 1:
        return Interval(**rows[0][f"{kind}_accuracy"])
    return _accuracy(_outcomes(rows, kind), seed=0)


def _outcomes(rows: Sequence[dict[str, Any]], kind: str) -> Outcomes:
    return tuple(tuple(row[f"{kind}_outcomes"][0]) for row in rows)


def _means(outcomes: Outcomes) -> tuple[float, ...]:
    return tuple(sum(of_seed) / len(of_seed) for of_seed in outcomes)


def _difference(
    reports: Mapping[int, dict[str, Any]], others: Mapping[int, dict[str, Any]], length: str
) -> tuple[Interval | None, tuple[float, ...]]:
    """Return the sequence accuracy minus the reference's: over the seeds that both have, and for each seed."""
    own, theirs = [], []
    for seed in sorted(reports.keys() & others.keys()):
        pair = _row_of(reports[seed], length), _row_of(others[seed], length)
        if pair[0] is None or pair[1] is None or not _same_instances(reports[seed], others[seed]):
            return None, ()
        own.append(pair[0])
        theirs.append(pair[1])
    if not own:
        return None, ()
    first, second = _outcomes(own, "sequence"), _outcomes(theirs, "sequence")
    by_seed = tuple(a - b for a, b in zip(_means(first), _means(second), strict=True))
    return _bootstrap_paired(first, second, seed=0), by_seed


def _row_of(report: dict[str, Any], length: str) -> dict[str, Any] | None:
    """Return the row of a length; None if there is none or it reads n/a."""
    rows = [row for row in report["rows"] if row["length"] == length and row["sequence_accuracy"] is not None]
    return rows[0] if rows else None


def _same_instances(report: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether two models answered questions on the same texts, wherever meta-tokens stood in them."""

    def texts(config: dict[str, Any]) -> Any:
        task = {key: value for key, value in config["task"].items() if key not in {"meta_places", "marks", "loss"}}
        return task, config["size"], config["seed"], config["instances"]

    return bool(texts(report["config"]) == texts(other["config"]))


# the intervals of finished runs do not change while others run
@cache
def _accuracy(outcomes: Outcomes, seed: int) -> Interval:
    return accuracy_interval(outcomes, seed=seed)


@cache
def _bootstrap_paired(outcomes: Outcomes, other: Outcomes, seed: int) -> Interval:
    return bootstrap_paired_seeds_and_instances(outcomes, other, seed=seed)


def _curve(runs: Sequence[SweepRun], total_flops: float) -> Iterator[CurvePoint]:
    """Yield the accuracies that the trainings logged, at the steps that all of them logged."""
    curves = [_logged(run) for run in runs]
    estimated = runs[0].budget.training_flops
    for step in sorted(set.intersection(*(set(curve) for curve in curves))):
        accuracies = [curve[step]["sequence_accuracy"] for curve in curves]
        yield CurvePoint(
            step=step,
            training_flops=total_flops * flops_after(runs[0], step) / estimated,
            sequence_accuracy=sum(accuracies) / len(accuracies),
            lowest=min(accuracies),
            highest=max(accuracies),
            chance=curves[0][step].get("chance"),
        )


def _logged(run: SweepRun) -> dict[int, dict[str, float]]:
    """Return the figures of the evaluations during training, by step."""
    lines = run.folder.read_metrics()
    return {line["step"]: line for line in lines if "sequence_accuracy" in line}
