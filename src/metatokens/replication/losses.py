"""How many nats per word does an arm lose more than another on the same text? The endpoint `nats` of contrasts.

Each task is a sweep over pre-training, and `evaluation` the perplexity that is compared; less is better. The whole is
compared in sliding windows, and by context length in windows that do not overlap, where the same text tokens have the
same context in every arm.

Two things vary, the seeds of the training and the documents. The test has the seed as its unit (`TwoWay`, corrected
after Holm over the contrasts), on these documents; the interval over documents is for the mean of these seeds, paired
by document. A difference is stated only if the test finds it and the interval over documents excludes 0, and arms are
equivalent only if the equivalence test finds it and that interval lies within the margin. Buckets of context length are
not corrected for their number.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from metatokens.config.contrasts import Contrasts
from metatokens.errors import DataError
from metatokens.evaluation.statistics import Interval, bootstrap_paired_ratio
from metatokens.evaluation.two_way import TwoWay
from metatokens.replication.judging import FinishedTask, correct_p_values, seeds_text, verdict
from metatokens.sweep.running import read_reports

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from metatokens.report.verdict_figure import Column

FEWEST_SEEDS = 1

_Numbers = npt.NDArray[np.float64]


class _Text(NamedTuple):
    """What all arms have read."""

    documents: list[str]
    words: _Numbers
    """(documents,)"""
    context_words: _Numbers
    """(documents, buckets): as many words as the text tokens of each bucket are on average."""
    buckets: list[tuple[int, int]]
    """Fewest and most text tokens of context."""


class _Losses(NamedTuple):
    """What an arm loses, in nats."""

    whole: _Numbers
    """(seeds, documents)"""
    by_context: _Numbers
    """(seeds, documents, buckets)"""


def judge(contrasts: Contrasts, task: FinishedTask) -> dict[str, Any]:
    """Return the report of a task: its arms, and the contrasts as a whole and by context length.

    Raises:
        DataError: arms did not read the same text in equal windows, or an older version has scored them.
    """
    reports = {arm: _read(task, arm, contrasts.evaluation) for arm in task.arms}
    text = _shared_text([report for of_arm in reports.values() for report in of_arm])
    losses = {arm: _losses_of(of_arm) for arm, of_arm in reports.items()}
    whole = {arm: own.whole for arm, own in losses.items()}
    layout = _layout(whole, text.words)
    planned, level = layout.with_seeds(task.planned_seeds), contrasts.level / len(contrasts.contrasts)
    return {
        "task": task.name,
        "evaluation": contrasts.evaluation,
        "documents": len(text.documents),
        "seeds": task.seeds,
        "planned_seeds": task.planned_seeds,
        "cpu_hours": task.cpu_hours,
        "residual_deviation": layout.deviation,
        "smallest_difference": planned.smallest_difference(level),
        "equal_found_equivalent": planned.equivalence_power(contrasts.margin, level),
        "arms": [
            {
                "arm": arm,
                "parameters": cell.parameters,
                "training_flops": cell.training_flops,
                "by_seed": (whole[arm].sum(axis=1) / text.words.sum()).tolist(),
                "residual_deviation": None if layout.arm_deviations is None else layout.arm_deviations[place],
            }
            for place, (arm, cell) in enumerate(task.arms.items())
        ],
        "contrasts": _compare(contrasts, whole, text.words),
        "by_context": [
            {
                "lowest": lowest,
                "highest": highest,
                "contrasts": _compare(
                    contrasts,
                    {arm: own.by_context[..., bucket] for arm, own in losses.items()},
                    text.context_words[:, bucket],
                ),
            }
            for bucket, (lowest, highest) in enumerate(text.buckets)
        ],
        "versions": task.results.versions,
    }


def to_markdown(contrasts: Contrasts, reports: Sequence[dict[str, Any]]) -> str:
    """Write the arms, and the contrasts as a whole and by context length, as tables."""
    lines = []
    for report in reports:
        seeds = f"{len(report['seeds'])} of {report['planned_seeds']} seeds"
        spent = f"{report['cpu_hours']:.2f} CPU-hours"
        title = f"{report['task']}, {report['evaluation']}: {report['documents']} documents, {seeds}, {spent}"
        lines += [f"## {title}", ""]
        if report["smallest_difference"] is not None:
            lines += [_power_sentence(report), ""]
        lines += [
            "| arm | nats per word, seed by seed | standard deviation of its residuals | parameters | "
            "operations of training |",
            "|---|---|---:|---:|---:|",
        ]
        for arm in report["arms"]:
            deviation = "" if arm["residual_deviation"] is None else f"{arm['residual_deviation']:.3f}"
            cells = [arm["arm"], _one_by_one(arm["by_seed"], ".3f"), deviation, f"{arm['parameters']:,}"]
            cells.append(f"{arm['training_flops']:.3g}")
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"Differences in nats per word, less being better; equivalent: within {contrasts.margin:g}.", ""]
        lines += [
            "| explanation | arms | difference, interval over seeds | over documents | seed by seed | p (Holm) | "
            "p alike (Holm) | verdict |",
            "|---|---|---:|---:|---:|---:|---:|---|",
        ]
        for row in report["contrasts"]:
            documents = row["over_documents"]
            cells = [
                row["explains"],
                f"{row['first']} - {row['second']}",
                Interval(**row["difference"]).to_text("+.3f"),
            ]
            cells += ["" if documents["low"] is None else f"{documents['low']:+.3f} to {documents['high']:+.3f}"]
            cells += [_one_by_one(row["by_seed"], "+.3f"), f"{row['p_holm']:.3f}", f"{row['p_equivalence_holm']:.3f}"]
            lines.append(f"| {' | '.join([*cells, row['verdict']])} |")
        lines += ["", *_context_table(report["by_context"]), ""]
    return "\n".join(lines)


def draw(contrasts: Contrasts, reports: Sequence[dict[str, Any]]) -> "dict[str, Figure]":
    """Draw the differences by context length."""
    from metatokens.report.loss_figures import draw_by_context  # matplotlib is an extra

    return {"": draw_by_context(reports, contrasts.margin)}


def columns(contrasts: Contrasts, report: dict[str, Any]) -> "dict[str, Column]":
    """Return the verdicts as a whole."""
    from metatokens.report.verdict_figure import Column, Verdict  # matplotlib is an extra

    name = f"{report['task']} {report['evaluation']}, nats"
    note = (
        f"{name}: the first arm's nats per word minus the second's, {seeds_text(report)}; equivalent within "
        f"{contrasts.margin:g}; Holm over {len(contrasts.contrasts)}"
    )
    verdicts = {
        (row["explains"], row["first"], row["second"]): Verdict(f"{row['difference']['estimate']:+.3f}", row["verdict"])
        for row in report["contrasts"]
    }
    return {name: Column(note, verdicts)}


def _read(task: FinishedTask, arm: str, evaluation: str) -> list[dict[str, Any]]:
    """Return what `metatokens perplexity` reported of each seed of an arm."""
    models = dict(zip(task.arms[arm].seeds, task.arms[arm].models, strict=True))
    return [_report_of((task.folder / models[seed]).parent, evaluation) for seed in task.seeds]


def _report_of(run: Path, evaluation: str) -> dict[str, Any]:
    report = read_reports(run).get(evaluation, {})
    if any("context_nats" not in document for document in report.get("documents", [{}])):
        raise DataError(
            str(run / "evaluation.json"),
            expected=f"the losses of the evaluation {evaluation} by context length",
            found="none, as in those of older versions",
            remedy="remove it, and the sweep measures it again",
        )
    return report


def _shared_text(reports: Sequence[dict[str, Any]]) -> _Text:
    keys = ("name", "words", "context_tokens")
    texts = [[[document[key] for key in keys] for document in report["documents"]] for report in reports]
    if any(text != texts[0] for text in texts):
        raise DataError(
            "contrasts of nats",
            expected="arms that read the same text in equal windows",
            found="other documents or windows",
            remedy="give all arms the same evaluation",
        )
    names, words, tokens = zip(*texts[0], strict=True)
    context_tokens = np.array(tokens, dtype=np.float64)
    return _Text(
        list(names),
        np.array(words, dtype=np.float64),
        context_tokens * sum(words) / context_tokens.sum(),
        [(bucket["lowest_context"], bucket["highest_context"]) for bucket in reports[0]["buckets"]],
    )


def _losses_of(reports: Sequence[dict[str, Any]]) -> _Losses:
    whole, by_context = (
        np.array([[document[key] for document in report["documents"]] for report in reports])
        for key in ("sliding_nats", "context_nats")
    )
    return _Losses(whole, by_context)


def _layout(nats: dict[str, _Numbers], words: _Numbers) -> TwoWay:
    return TwoWay.of([(own.sum(axis=1) / words.sum()).tolist() for own in nats.values()])


def _compare(contrasts: Contrasts, nats: dict[str, _Numbers], words: _Numbers) -> list[dict[str, Any]]:
    """Return all contrasts of arms on one text, or on one bucket of it.

    Args:
        contrasts: the file that names them.
        nats: of each arm, (seeds, documents).
        words: (documents,)
    """
    layout = _layout(nats, words)
    has_text = words > 0  # a bucket may be beyond the end of a document
    places = {arm: place for place, arm in enumerate(nats)}
    rows = []
    for contrast in contrasts.contrasts:
        own, other = nats[contrast.first], nats[contrast.second]
        pair = places[contrast.first], places[contrast.second]
        mean, other_mean = (arm.mean(axis=0)[has_text] for arm in (own, other))
        over_documents = bootstrap_paired_ratio(mean, other_mean, words[has_text], seed=0)
        rows.append(
            {
                **contrast.model_dump(),
                "difference": asdict(layout.difference(*pair)),
                "over_documents": asdict(over_documents),
                "by_seed": ((own - other).sum(axis=1) / words.sum()).tolist(),
                "p": layout.p_value(*pair),
                "p_equivalence": layout.p_equivalence(*pair, contrasts.margin),
            }
        )
    correct_p_values(rows)
    return [{**row, "verdict": _verdict(row, contrasts)} for row in rows]


def _verdict(row: dict[str, Any], contrasts: Contrasts) -> str:
    documents, difference = row["over_documents"], row["difference"]
    if difference["low"] is None:
        return "too few seeds"
    if documents["low"] is None:
        return "too few documents"
    return verdict(
        differs=row["p_holm"] <= contrasts.level and documents["low"] * documents["high"] > 0,
        is_as_expected=difference["estimate"] < 0,
        is_alike=row["p_equivalence_holm"] <= contrasts.level
        and -contrasts.margin < documents["low"] <= documents["high"] < contrasts.margin,
        expected=row["expected"],
    )


def _power_sentence(report: dict[str, Any]) -> str:
    return (
        f"A residual (of arm and seed) has a standard deviation of {report['residual_deviation']:.3f}. If it is the "
        f"same in all arms, the strictest of Holm's tests over {report['planned_seeds']} seeds finds a difference of "
        f"about {report['smallest_difference']:.3f} in 80% of cases, and equal arms equivalent in "
        f"{report['equal_found_equivalent']:.0%}. A verdict needs the interval over documents too."
    )


def _context_table(buckets: Sequence[dict[str, Any]]) -> list[str]:
    """Write the contrasts by context length; bold where a difference is stated."""
    names = [f"{row['first']} - {row['second']}" for row in buckets[0]["contrasts"]]
    lines = [
        f"By context length, in windows that do not overlap, with intervals over seeds: {len(buckets)} x {len(names)} "
        "tests, corrected after Holm within a row alone. Bold: a difference is stated, by the same rule as above.",
        "",
    ]
    lines += [f"| text tokens before, in its window | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for bucket in buckets:
        lowest, highest = bucket["lowest"], bucket["highest"]
        cells = [str(lowest) if lowest == highest else f"{lowest} to {highest}"]
        for row in bucket["contrasts"]:
            text = Interval(**row["difference"]).to_text("+.3f")
            cells.append(f"**{text}**" if row["verdict"].startswith(("supported", "opposite", "differs")) else text)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _one_by_one(values: Sequence[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)
