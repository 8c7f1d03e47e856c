"""From numbers of documents to records with intervals, and what the claims are decided by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from metatokens.analysis.results import Record, Section
from metatokens.config.analysis import MINIMUM_DOCUMENTS
from metatokens.evaluation.significance import Statistic, bca_interval, benjamini_hochberg, sign_flip_test
from metatokens.evaluation.statistics import Interval, accuracy_interval

Array = npt.NDArray[np.float64]
At = Mapping[str, str | int | float]
"""What a number belongs to; see the table of `metatokens.analysis.results`."""


@dataclass
class Findings:
    """What has been measured so far."""

    seed: int
    records: list[Record] = field(default_factory=list)
    endpoints: dict[str, Array] = field(default_factory=dict)
    """Numbers of documents that claims are decided by, by endpoint."""
    intervals: dict[str, tuple[Interval, int]] = field(default_factory=dict)
    """The same for what is no mean over documents: its interval, and the number of documents."""
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)

    def add(
        self,
        section: Section,
        metric: str,
        unit: str,
        method: str,
        documents: npt.ArrayLike,
        *,
        at: At | None = None,
        statistic: Statistic | None = None,
        test: bool = False,
    ) -> None:
        """Record a statistic of documents, (documents,) or (documents, columns), those with NaN left out."""
        values = np.asarray(documents, dtype=np.float64)
        values = values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]
        count = len(values)
        note = None
        estimate: float | None = None
        low: float | None = None
        high: float | None = None
        if count >= MINIMUM_DOCUMENTS:
            interval = bca_interval(values, statistic, seed=self.seed)
            estimate, low, high = interval.estimate, interval.low, interval.high
        elif count:
            estimate = float(values.mean() if statistic is None else statistic(values))
            note = f"fewer than {MINIMUM_DOCUMENTS} documents: no interval"
        if estimate is None or not np.isfinite(estimate):
            estimate, low, high, note = None, None, None, "no document has it"
        p_value = sign_flip_test(values, seed=self.seed) if test and count >= MINIMUM_DOCUMENTS else None
        self.records.append(
            Record(
                section=section,
                metric=metric,
                unit=unit,
                method=method,
                at=dict(at or {}),
                value=estimate,
                low=_finite(low),
                high=_finite(high),
                num_documents=count,
                p_value=p_value,
                note=note,
            )
        )

    def add_ratio(
        self,
        section: Section,
        metric: str,
        unit: str,
        method: str,
        numerators: npt.ArrayLike,
        denominators: npt.ArrayLike,
        *,
        at: At | None = None,
    ) -> None:
        """Record a ratio of sums over documents."""
        columns = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
        self.add(section, metric, unit, method, columns, at=at, statistic=_ratio_of_sums)

    def add_accuracy(self, metric: str, method: str, outcomes: npt.ArrayLike, *, at: At | None = None) -> None:
        """Record a share of right answers, with an interval that holds where all or none are right, too."""
        values = np.asarray(outcomes, dtype=np.float64)
        interval = accuracy_interval([values], seed=self.seed)
        enough = len(values) >= MINIMUM_DOCUMENTS
        self.records.append(
            Record(
                section="causal",
                metric=metric,
                unit="1",
                method=method,
                at=dict(at or {}),
                value=interval.estimate,
                low=interval.low if enough else None,
                high=interval.high if enough else None,
                num_documents=len(values),
                note=None if enough else f"fewer than {MINIMUM_DOCUMENTS} documents: no interval",
            )
        )

    def add_interval(
        self,
        section: Section,
        metric: str,
        unit: str,
        method: str,
        interval: Interval,
        *,
        documents: int,
        at: At,
        note: str | None = None,
    ) -> None:
        """Record what has its interval already, or cannot have one, which the note tells."""
        self.records.append(
            Record(
                section=section,
                metric=metric,
                unit=unit,
                method=method,
                at=dict(at),
                value=interval.estimate,
                low=interval.low,
                high=interval.high,
                num_documents=documents,
                note=note,
            )
        )

    def finished_records(self) -> list[Record]:
        """Return the records, p-values corrected within each section and metric (false discovery rate)."""
        families: dict[tuple[str, str], list[int]] = {}
        for index, record in enumerate(self.records):
            if record.p_value is not None and record.at:
                families.setdefault((record.section, record.metric), []).append(index)
        records = list(self.records)
        for indices in families.values():
            adjusted, _ = benjamini_hochberg([_p_of(records[index]) for index in indices])
            for index, value in zip(indices, adjusted.tolist(), strict=True):
                records[index] = records[index].model_copy(update={"adjusted_p": value})
        return records


def over_layers_and_heads(values: Array) -> Array:
    """Return the mean of each document, (documents,), of (documents, layers, heads) with NaN left out."""
    flat = values.reshape(len(values), -1)
    counts = np.isfinite(flat).sum(axis=1)
    sums = np.nansum(np.where(np.isfinite(flat), flat, 0), axis=1)
    means: Array = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means


def r_squared_statistic(documents: Array) -> float:
    """Return 1 - residual / total, of columns (rows, sum y, sum y^2, sum of squared residuals); NaN without spread."""
    rows, total, squares, residuals = documents.sum(axis=0)
    spread = squares - total**2 / rows
    return float(1 - residuals / spread) if spread > 0 else math.nan


def _ratio_of_sums(documents: Array) -> float:
    above, below = documents.sum(axis=0)
    return float(above / below) if below else math.nan


def _p_of(record: Record) -> float:
    assert record.p_value is not None
    return record.p_value


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
