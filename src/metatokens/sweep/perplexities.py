"""The perplexities of a pre-training sweep: nats per word over documents, and differences from the reference.

All arms score the same documents, so a difference is paired by seed and by document. Words and not tokens are counted,
so arms with different tokenizers compare. Intervals are over documents, for the mean of the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from metatokens.evaluation.statistics import bootstrap_paired_ratio, bootstrap_ratio
from metatokens.report.sweep_results import ContextRow, PerplexityRow
from metatokens.sweep.planning import EvaluationRequest

Reports = Mapping[int, Mapping[str, Any]]
"""The report of `metatokens perplexity` of each seed."""


def perplexity_row(request: EvaluationRequest, reports: Reports, others: Reports) -> PerplexityRow:
    """Return what one evaluation says of an arm, and of its difference from the reference if that has reports."""
    shared = sorted(reports.keys() & others.keys())
    words = _column(next(iter(reports.values())), "words")
    comparable = bool(shared) and all(_same_documents(reports[seed], others[seed]) for seed in shared)
    own = _mean_nats([reports[seed] for seed in shared]) if comparable else []
    theirs = _mean_nats([others[seed] for seed in shared]) if comparable else []
    return PerplexityRow(
        name=request.name,
        text=request.config.model_dump()["text"],
        interventions=request.interventions,
        documents=len(words),
        seeds=tuple(reports),
        perplexity=math.exp(float(np.mean([_nats_per_token(report) for report in reports.values()]))),
        nats_per_word=bootstrap_ratio(_mean_nats(list(reports.values())), words, seed=0),
        by_seed=tuple(_nats_per_word(report) for report in reports.values()),
        difference=bootstrap_paired_ratio(own, theirs, words, seed=0) if comparable else None,
        difference_by_seed=tuple(_nats_per_word(reports[seed]) - _nats_per_word(others[seed]) for seed in shared)
        if comparable
        else (),
        by_context=tuple(_by_context(list(reports.values()))),
    )


def _column(report: Mapping[str, Any], key: str) -> list[float]:
    return [document[key] for document in report["documents"]]


def _mean_nats(reports: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the nats of each document, sliding windows, mean of the seeds."""
    means: list[float] = np.mean([_column(report, "sliding_nats") for report in reports], axis=0).tolist()
    return means


def _nats_per_word(report: Mapping[str, Any]) -> float:
    return sum(_column(report, "sliding_nats")) / sum(_column(report, "words"))


def _nats_per_token(report: Mapping[str, Any]) -> float:
    return sum(_column(report, "sliding_nats")) / sum(_column(report, "text_tokens"))


def _same_documents(report: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(
        [document[key] for document in report["documents"]] == [document[key] for document in other["documents"]]
        for key in ("name", "words")
    )


def _by_context(reports: Sequence[Mapping[str, Any]]) -> Iterator[ContextRow]:
    """Yield the mean over seeds of the loss of tokens with about as much context."""
    for buckets in zip(*(report["buckets"] for report in reports), strict=True):
        yield ContextRow(
            lowest=buckets[0]["lowest_context"],
            highest=buckets[0]["highest_context"],
            nats_per_token=sum(bucket["nats_per_token"] for bucket in buckets) / len(buckets),
        )
