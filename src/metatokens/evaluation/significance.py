"""Intervals that correct their bias, tests between two conditions, and corrections for many of them.

The unit is the document, or the instance of a task, never the token or the head: tokens of one document are not
independent. Every function takes one number a document, or one row of them, and is a pure function of its arguments.
BCa intervals: Efron 1987. Sign flips: Fisher 1935. Holm 1979; Benjamini and Hochberg 1995. TOST: Schuirmann 1987.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from metatokens.errors import UsageError
from metatokens.evaluation.statistics import BOOTSTRAP_RESAMPLES, CONFIDENCE_LEVEL, Interval

MINIMUM_DOCUMENTS = 8
"""Fewer tell too little of what other documents would be like for any bootstrap."""
EXACT_DOCUMENTS = 14
"""Up to here all 2^n sign flips are tried."""
SIGN_FLIPS = 20_000
_DRAWS_AT_A_TIME = 2**22

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Maps documents drawn again and again, (draws, documents, ...), to one number a draw."""


def mean_statistic(drawn: Array) -> Array:
    """Return the mean over documents of each draw."""
    means: Array = drawn.mean(axis=1)
    return means


def ratio_statistic(drawn: Array) -> Array:
    """Return sum / sum of the two columns (numerator, denominator) of each draw."""
    sums = drawn.sum(axis=1)
    ratios: Array = sums[:, 0] / sums[:, 1]
    return ratios


def bca_interval(
    documents: npt.ArrayLike,
    statistic: Statistic = mean_statistic,
    *,
    seed: int,
    resamples: int = BOOTSTRAP_RESAMPLES,
    level: float = CONFIDENCE_LEVEL,
) -> Interval:
    """Return a statistic of documents with its bias-corrected and accelerated bootstrap interval.

    Where every draw gives the same number, both ends are that number.

    Args:
        documents: (documents,) or (documents, ...) numbers; whole rows are drawn.
        statistic: of the rows of a draw.
        seed: of the generator, PCG64.
        resamples: number of draws.
        level: of the interval.

    Raises:
        UsageError: fewer documents than `MINIMUM_DOCUMENTS`, or a number that is not finite.
    """
    values = np.asarray(documents, dtype=np.float64)
    check_documents(values)
    count = len(values)
    estimate = float(statistic(values[None])[0])
    generator = np.random.Generator(np.random.PCG64(seed))
    at_a_time = max(1, _DRAWS_AT_A_TIME // values.size)
    draws = np.concatenate(
        [
            statistic(values[generator.integers(count, size=(min(at_a_time, resamples - start), count))])
            for start in range(0, resamples, at_a_time)
        ]
    )
    if np.ptp(draws) == 0:
        return Interval(estimate, float(draws[0]), float(draws[0]), level)
    normal = NormalDist()
    share_below = (np.mean(draws < estimate) + np.mean(draws <= estimate)) / 2
    bias = normal.inv_cdf(float(np.clip(share_below, 0.5 / resamples, 1 - 0.5 / resamples)))
    left_out = np.concatenate([statistic(np.delete(values, index, axis=0)[None]) for index in range(count)])
    deviations = left_out.mean() - left_out
    spread = float((deviations**2).sum())
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(draws, ends)
    return Interval(estimate, float(low), float(high), level)


def check_documents(values: Array, minimum: int = MINIMUM_DOCUMENTS) -> None:
    """Raise UsageError for fewer documents than a bootstrap needs, or a number that is not finite."""
    if values.ndim < 1 or len(values) < minimum:
        raise UsageError(
            "documents of a bootstrap",
            expected=f"at least {minimum}",
            found=str(len(values) if values.ndim else 0),
            remedy="give more documents or instances",
        )
    if not np.isfinite(values).all():
        bad = np.unique(np.argwhere(~np.isfinite(values))[:, 0])
        raise UsageError(
            "documents of a bootstrap",
            expected="finite numbers",
            found=f"NaN or infinity in {len(bad)} of {len(values)}",
            remedy="leave out documents without the quantity",
        )


def sign_flip_test(differences: npt.ArrayLike, *, seed: int, flips: int = SIGN_FLIPS) -> float:
    """Return the two-sided p-value of a mean difference of 0, under flips of each document's sign.

    Exact up to 14 documents; above, of random flips, the observed ones counted among them.
    """
    values = np.asarray(differences, dtype=np.float64)
    observed = abs(values.mean())
    tolerance = 1e-12 * max(1.0, float(np.abs(values).max(initial=0)))
    if len(values) <= EXACT_DOCUMENTS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        return float(np.mean(np.abs(signs @ values / len(values)) >= observed - tolerance))
    generator = np.random.Generator(np.random.PCG64(seed))
    hits, done = 1, 1
    at_a_time = max(1, _DRAWS_AT_A_TIME // len(values))
    for start in range(0, flips, at_a_time):
        signs = generator.integers(2, size=(min(at_a_time, flips - start), len(values))) * 2.0 - 1
        hits += int(np.sum(np.abs(signs @ values / len(values)) >= observed - tolerance))
        done += len(signs)
    return hits / done


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the whole family: below alpha wherever Holm's step-down test rejects."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return [float(value) for value in adjusted]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the false discovery rate: at most q wherever the step-up test rejects at q."""
    count = len(p_values)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(count)
    smallest = 1.0
    for rank in range(count - 1, -1, -1):
        smallest = min(smallest, p_values[order[rank]] * count / (rank + 1))
        adjusted[order[rank]] = smallest
    return [float(value) for value in adjusted]


def is_equivalent(interval: Interval, margin: float) -> bool:
    """Tell whether an interval lies within +-margin: two one-sided tests, each at (1 - level) / 2.

    With a 90% interval these are the usual tests at 5%; with a 95% one they are stricter.
    """
    return interval.low is not None and interval.high is not None and -margin < interval.low <= interval.high < margin
