"""Intervals for ratios of sums: the bootstrap over documents.

Tokens of one document are not independent, documents nearly are; so whole documents are drawn again, with
replacement, and the ratio of the sums (not the mean of the ratios) is taken of every draw. Percentile intervals: Efron
1979. Standard errors over seeds or tests of models trained twice are not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BOOTSTRAP_RESAMPLES = 2_000
CONFIDENCE_LEVEL = 0.95
_DRAWS_AT_A_TIME = 2**22  # bounds the memory of many documents times many resamples
_LARGEST_EXPONENT = math.log(np.finfo(np.float64).max)

Numbers = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval around it."""

    estimate: float
    low: float | None
    """None where a single document leaves nothing to resample; never NaN."""
    high: float | None
    """None where `low` is."""
    level: float = CONFIDENCE_LEVEL

    def exp(self) -> Interval:
        """Return the interval of the exponential: of a mean in nats, the perplexity."""
        low = None if self.low is None else _exp(self.low)
        high = None if self.high is None else _exp(self.high)
        return Interval(_exp(self.estimate), low, high, self.level)


def bootstrap_ratio(
    numerators: Numbers,
    denominators: Numbers,
    *,
    seed: int,
    resamples: int = BOOTSTRAP_RESAMPLES,
    level: float = CONFIDENCE_LEVEL,
) -> Interval:
    """Return sum(numerators) / sum(denominators) with its percentile interval over documents.

    A pure function of its arguments. A draw of documents whose denominators add up to 0 is left out. With one
    document `low` and `high` are None.

    Args:
        numerators: one number a document, such as its nats.
        denominators: one number a document, not negative, such as its text tokens.
        seed: of the generator, PCG64.
        resamples: number of draws.
        level: share of the draws inside of the interval.

    Raises:
        ValueError: no document, unequal lengths, a negative denominator, denominators that add up to 0, or a
            `level` outside (0, 1).
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if above.ndim != 1 or above.shape != below.shape or not len(above):
        raise ValueError(f"one numerator and one denominator a document, not shapes {above.shape} and {below.shape}")
    if below.min() < 0 or below.sum() == 0:
        raise ValueError("denominators must not be negative and must not add up to 0")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must lie in (0, 1) and resamples be at least 1, not {level} and {resamples}")
    estimate = float(above.sum() / below.sum())
    num_documents = len(above)
    if num_documents == 1:
        return Interval(estimate, None, None, level)
    generator = np.random.Generator(np.random.PCG64(seed))
    rows_at_a_time = max(1, _DRAWS_AT_A_TIME // num_documents)
    ratios = []
    for start in range(0, resamples, rows_at_a_time):
        rows = min(rows_at_a_time, resamples - start)
        drawn = generator.integers(num_documents, size=(rows, num_documents))
        sums = below[drawn].sum(axis=1)
        ratios.append(above[drawn].sum(axis=1)[sums > 0] / sums[sums > 0])
    low, high = np.quantile(np.concatenate(ratios), [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), level)


def bootstrap_paired_ratio(
    numerators: Numbers,
    other_numerators: Numbers,
    denominators: Numbers,
    *,
    seed: int,
    resamples: int = BOOTSTRAP_RESAMPLES,
    level: float = CONFIDENCE_LEVEL,
) -> Interval:
    """Return the first model's ratio minus the other's on the same documents, with its interval.

    Every draw takes the same documents for both, so that what makes a document hard for both cancels. The
    denominators (text tokens, or words where the tokenizers differ) are shared. See `bootstrap_ratio`.
    """
    above, other = np.asarray(numerators, dtype=np.float64), np.asarray(other_numerators, dtype=np.float64)
    if above.shape != other.shape:
        raise ValueError(f"both models need a number for every document, not shapes {above.shape} and {other.shape}")
    return bootstrap_ratio(above - other, denominators, seed=seed, resamples=resamples, level=level)


def _exp(value: float) -> float:
    """Return e^value; the largest float where that overflows, so that JSON can hold it."""
    return math.exp(min(value, _LARGEST_EXPONENT))
