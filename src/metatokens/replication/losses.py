"""How many nats per word does an arm lose more than another on the same text? The endpoint `nats` of contrasts.

Each of its tasks is a sweep over pre-training, and `evaluation` the perplexity that is compared. Negative favours the
first arm. The whole is compared in sliding windows, and by context length in windows that do not overlap, where the
same text tokens have the same context in every arm. Intervals are over documents, for the mean of the seeds that both
arms have, and paired in both. They are not corrected for the number of contrasts, and know nothing of other seeds. So a
difference is stated only if the interval excludes 0 and each seed has its sign, and arms are equivalent only if the
interval and each seed lie within the margin.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metatokens.errors import DataError
from metatokens.evaluation.statistics import bootstrap_paired_ratio
from metatokens.report.sweep_results import CellResult, load_results
from metatokens.sweep.running import read_reports
from metatokens.training.costs import SECONDS_PER_HOUR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from metatokens.report.verdict_figure import Column

FEWEST_SEEDS = 3

Reports = Mapping[int, Mapping[str, Any]]
"""What `metatokens perplexity` reports of each seed of an arm."""


@dataclass(frozen=True)
class _Sums:
    """What an arm loses on each document, in nats; one row for each seed."""

    nats: list[list[float]]
    words: list[float]
    """Of the scored text of each document."""


def judge(plan: dict[str, Any], _files: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Yield the report of each sweep whose arms have all finished a seed.

    Args:
        plan: what the file of contrasts holds.
        out: folder with the sweeps.

    Raises:
        DataError: arms did not read the same text in equal windows.
    """
    for task, planned_seeds in plan["tasks"].items():
        if not (out / task / "results.json").is_file():
            continue
        results = load_results(out / task / "results.json")
        cells = {cell.labels["arm"]: cell for cell in results.cells}
        names = {name for contrast in plan["contrasts"] for name in (contrast["first"], contrast["second"])}
        if names - cells.keys():
            continue
        arms = {name: _read(cells[name], out / task, plan["evaluation"]) for name in cells if name in names}
        documents = next(iter(next(iter(arms.values())).values()))["documents"]
        yield {
            "task": task,
            "evaluation": plan["evaluation"],
            "documents": len(documents),
            "planned_seeds": planned_seeds,
            "cpu_hours": sum(one.cpu_seconds for cell in results.cells for one in cell.trainings) / SECONDS_PER_HOUR,
            "arms": [_arm_report(cells[name], plan["evaluation"]) for name in arms],
            "contrasts": [
                {**contrast, **_compare(arms[contrast["first"]], arms[contrast["second"]], plan["margin"])}
                for contrast in plan["contrasts"]
            ],
            "versions": results.versions,
        }


def to_markdown(plan: dict[str, Any], reports: Sequence[dict[str, Any]]) -> str:
    """Write the arms, and the contrasts as a whole and by context length, as tables."""
    lines = []
    for report in reports:
        spent = f"{report['cpu_hours']:.2f} CPU-hours"
        lines += [f"## {report['task']}, {report['evaluation']}: {report['documents']} documents, {spent}", ""]
        lines += ["| arm | seeds | nats per word | seed by seed | parameters | operations of training |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for arm in report["arms"]:
            seeds = f"{len(arm['by_seed'])} of {report['planned_seeds']}"
            nats = f"{_span(arm['nats_per_word'], '.3f')} | {_one_by_one(arm['by_seed'], '.3f')}"
            lines.append(f"| {arm['arm']} | {seeds} | {nats} | {arm['parameters']:,} | {arm['training_flops']:.3g} |")
        lines += ["", f"Differences in nats per word, less being better; equivalent: within {plan['margin']:g}.", ""]
        lines += ["| explanation | arms | difference | seed by seed | verdict |", "|---|---|---:|---:|---|"]
        for row in report["contrasts"]:
            nats = f"{_span(row['difference'], '+.3f')} | {_one_by_one(row['by_seed'], '+.3f')}"
            lines.append(f"| {row['explains']} | {row['first']} - {row['second']} | {nats} | {row['verdict']} |")
        lines += ["", *_context_table(report["contrasts"]), ""]
    return "\n".join(lines)


def columns(report: dict[str, Any]) -> "dict[str, Column]":
    """Return the verdicts of a report."""
    from metatokens.report.verdict_figure import Verdict  # matplotlib is an extra

    return {
        f"{report['evaluation']}, nats": {
            (row["explains"], row["first"], row["second"]): Verdict(
                f"{row['difference']['estimate']:+.3f}", row["verdict"]
            )
            for row in report["contrasts"]
        }
    }


def draw(plan: dict[str, Any], reports: Sequence[dict[str, Any]]) -> "dict[str, Figure]":
    """Draw the differences by context length, by the end of the file's name."""
    from metatokens.report.loss_figures import draw_by_context  # matplotlib is an extra

    return {"": draw_by_context(reports[0], plan["margin"])}


def _read(cell: CellResult, sweep: Path, evaluation: str) -> Reports:
    """Return the reports of an arm, seed by seed."""
    models = zip(cell.seeds, cell.models, strict=True)
    return {seed: read_reports((sweep / model).parent)[evaluation] for seed, model in models}


def _arm_report(cell: CellResult, evaluation: str) -> dict[str, Any]:
    (row,) = [row for row in cell.perplexities if row.name == evaluation]
    return {
        "arm": cell.labels["arm"],
        "parameters": cell.parameters,
        "training_flops": cell.training_flops,
        "nats_per_word": asdict(row.nats_per_word),
        "by_seed": list(row.by_seed),
    }


def _compare(first: Reports, second: Reports, margin: float) -> dict[str, Any]:
    """Return one contrast: as a whole, and in each bucket of context length."""
    seeds = sorted(first.keys() & second.keys())
    own, other = ([reports[seed] for seed in seeds] for reports in (first, second))
    if _text_of(own[0]) != _text_of(other[0]):
        raise DataError(
            "contrasts of nats",
            expected="arms that read the same text in equal windows",
            found="other documents or windows",
            remedy="give both arms the same evaluation",
        )
    return {
        "seeds": seeds,
        **_difference(_whole(own), _whole(other), margin),
        "by_context": [
            {
                "lowest": bucket["lowest_context"],
                "highest": bucket["highest_context"],
                **_difference(_in_bucket(own, number), _in_bucket(other, number), margin),
            }
            for number, bucket in enumerate(own[0]["buckets"])
        ],
    }


def _text_of(report: Mapping[str, Any]) -> list[Any]:
    return [[document[key] for key in ("name", "words", "context_tokens")] for document in report["documents"]]


def _whole(reports: Sequence[Mapping[str, Any]]) -> _Sums:
    nats = [[document["sliding_nats"] for document in report["documents"]] for report in reports]
    return _Sums(nats, [document["words"] for document in reports[0]["documents"]])


def _in_bucket(reports: Sequence[Mapping[str, Any]], bucket: int) -> _Sums:
    documents = reports[0]["documents"]
    nats = [[document["context_nats"][bucket] for document in report["documents"]] for report in reports]
    # as many words as this share of the text has on average, so that the unit is that of the whole
    words_per_token = sum(one["words"] for one in documents) / sum(one["text_tokens"] for one in documents)
    return _Sums(nats, [one["context_tokens"][bucket] * words_per_token for one in documents])


def _difference(first: _Sums, second: _Sums, margin: float) -> dict[str, Any]:
    means = [np.mean(sums.nats, axis=0).tolist() for sums in (first, second)]
    interval = asdict(bootstrap_paired_ratio(means[0], means[1], first.words, seed=0))
    by_seed = [(sum(own) - sum(other)) / sum(first.words) for own, other in zip(first.nats, second.nats, strict=True)]
    return {"difference": interval, "by_seed": by_seed, "verdict": _verdict(interval, by_seed, margin)}


def _verdict(interval: dict[str, Any], by_seed: list[float], margin: float) -> str:
    if len(by_seed) < FEWEST_SEEDS or interval["low"] is None:
        return "too few seeds"
    is_lower = interval["high"] < 0 and max(by_seed) < 0
    is_higher = interval["low"] > 0 and min(by_seed) > 0
    is_alike = max(map(abs, (interval["low"], interval["high"], *by_seed))) < margin
    if is_lower or is_higher:
        found = "supported" if is_lower else "opposite"
        return f"{found}, within the margin" if is_alike else found
    return "equivalent" if is_alike else "cannot tell"


def _context_table(contrasts: Sequence[dict[str, Any]]) -> list[str]:
    """Write the contrasts by context length; bold where a difference is stated."""
    names = [f"{row['first']} - {row['second']}" for row in contrasts]
    lines = [f"| text tokens before | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for buckets in zip(*(row["by_context"] for row in contrasts), strict=True):
        spans = [_span(one["difference"], "+.3f") for one in buckets]
        cells = [
            f"**{text}**" if one["verdict"].startswith(("supported", "opposite")) else text
            for one, text in zip(buckets, spans, strict=True)
        ]
        lowest, highest = buckets[0]["lowest"], buckets[0]["highest"]
        lines.append(f"| {lowest if lowest == highest else f'{lowest} to {highest}'} | {' | '.join(cells)} |")
    return lines


def _one_by_one(values: Sequence[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def _span(interval: dict[str, Any], form: str) -> str:
    if interval["low"] is None:
        return format(interval["estimate"], form)
    return f"{interval['estimate']:{form}} ({interval['low']:{form}} to {interval['high']:{form}})"
