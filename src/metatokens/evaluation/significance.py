"""Bias-corrected intervals over documents, tests by sign flips, what these can find, and corrections for many tests.

The unit of all of them is a document, or a training seed where a caller says so. Intervals are BCa (Efron 1987, "Better
Bootstrap Confidence Intervals"), which fit a skewed statistic better than percentiles. Two paired conditions are
compared by flipping the signs of their differences. Several primary endpoints are corrected after Holm 1979, maps of
layers and heads after Benjamini and Hochberg 1995. To show that two conditions are alike, use the equivalence test
(TOST, Schuirmann 1987): a large p-value of a difference does not show it. Percentile intervals and Wilson's are in
`statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from metatokens.config.analysis import MINIMUM_DOCUMENTS
from metatokens.errors import UsageError
from metatokens.evaluation.statistics import BOOTSTRAP_RESAMPLES, CONFIDENCE_LEVEL, Interval, Numbers

MAX_EXACT_DOCUMENTS = 14
"""Up to this number of documents n, all 2^n sign flips are counted: at most 16,384."""
SIGN_FLIP_DRAWS = 10_000
LARGEST_MEAN = 8.0
"""Bound of the search for a detectable difference, in standard deviations."""
_POWER_DRAWS = 1_000

_NUMBERS_AT_A_TIME = 2**22  # bounds the memory of many documents times many draws
_RELATIVE_TIE = 1e-12  # sums that differ by rounding alone count as equal

Array = npt.NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Maps resamples (draws, documents, ...) to one number each, (draws,), whatever the order of the documents."""


def bca_interval(
    values_by_document: npt.ArrayLike,
    statistic: Statistic | None = None,
    *,
    seed: int,
    resamples: int = BOOTSTRAP_RESAMPLES,
    level: float = CONFIDENCE_LEVEL,
    minimum_documents: int = MINIMUM_DOCUMENTS,
) -> Interval:
    """Return a statistic of documents, by default the mean, with its BCa interval.

    A pure function of its arguments. If all documents are alike, the interval is a point.

    Args:
        values_by_document: (documents, ...) finite numbers.
        statistic: of resampled documents, as many or one fewer.
        seed: of the generator, PCG64.
        resamples: number of draws.
        level: share of intervals that hold the true value.
        minimum_documents: the fewest documents that are accepted.

    Raises:
        UsageError: there are fewer documents than `minimum_documents`.
        ValueError: a number is not finite, or `level` is outside (0, 1).
    """
    values = np.asarray(values_by_document, dtype=np.float64)
    if values.ndim < 1 or not np.isfinite(values).all():
        raise ValueError(f"values must be finite, with documents along the first axis, not of shape {values.shape}")
    check_documents(len(values), minimum_documents)
    measure = means_of if statistic is None else statistic
    generator = np.random.Generator(np.random.PCG64(seed))
    num_documents = len(values)
    draws = np.empty(resamples)
    draws_at_a_time = max(1, _NUMBERS_AT_A_TIME // values.size)
    for part in np.split(draws, range(draws_at_a_time, resamples, draws_at_a_time)):
        part[:] = measure(values[generator.integers(num_documents, size=(len(part), num_documents))])
    left_out = [measure(np.delete(values, document, axis=0)[None])[0] for document in range(num_documents)]
    return bca_from_draws(float(measure(values[None])[0]), draws, [left_out], level=level)


def means_of(resamples: Array) -> Array:
    """Return the mean of all numbers of each resample (draws, documents, ...), (draws,)."""
    means: Array = resamples.reshape(len(resamples), math.prod(resamples.shape[1:])).mean(axis=1)
    return means


def bca_from_draws(
    estimate: float,
    draws: Numbers,
    leave_one_out: Sequence[Numbers],
    *,
    level: float = CONFIDENCE_LEVEL,
) -> Interval:
    """Return the BCa interval of a statistic from draws that the caller has made.

    With z0 = Phi^-1(share of draws below the estimate) and the acceleration a, the bounds are the quantiles
    Phi(z0 + (z0 + z) / (1 - a (z0 + z))) of the draws, for z the normal quantiles of the level. Where several factors
    are resampled (documents and seeds), the empirical influences of all enter a, each over the number of its units.

    Args:
        estimate: the statistic of all units.
        draws: the statistic of each resample.
        leave_one_out: for each resampled factor, the statistic without each of its units in turn; a factor with a
            single unit adds nothing.
        level: share of intervals that hold the true value.

    Raises:
        ValueError: there is no draw, or `level` is outside (0, 1).
    """
    drawn = np.sort(np.asarray(draws, dtype=np.float64))
    if not len(drawn) or not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1) and there must be a draw, not {level} and {len(drawn)} draws")
    if drawn[0] == drawn[-1]:
        return Interval(estimate, float(drawn[0]), float(drawn[-1]), level)
    normal = NormalDist()
    # an estimate beyond all draws would have an infinite bias
    below = (np.count_nonzero(drawn < estimate) + np.count_nonzero(drawn <= estimate)) / (2 * len(drawn))
    bias = normal.inv_cdf(min(max(below, 0.5 / len(drawn)), 1 - 0.5 / len(drawn)))
    acceleration = _acceleration(leave_one_out)
    shares = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + normal.inv_cdf(tail)
        slope = 1 - acceleration * shifted
        shares.append(normal.cdf(bias + shifted / slope) if slope > 0 else float(shifted > 0))
    low, high = np.quantile(drawn, shares)
    return Interval(estimate, float(low), float(high), level)


def check_documents(num_documents: int, minimum_documents: int = MINIMUM_DOCUMENTS) -> None:
    """Refuse too few documents for an interval.

    Raises:
        UsageError: there are fewer than `minimum_documents`.
    """
    if num_documents < minimum_documents:
        raise UsageError(
            "documents for an interval",
            expected=f"at least {minimum_documents}",
            found=str(num_documents),
            remedy="pass more documents, or shorter ones",
        )


def sign_flip_test(
    differences: Numbers,
    *,
    seed: int,
    draws: int = SIGN_FLIP_DRAWS,
    alternative: Literal["two-sided", "greater"] = "two-sided",
) -> float:
    """Return the p-value of the hypothesis that paired differences are symmetric around 0.

    It is the share of sign flips whose mean is at least as far from 0 as the observed one, or at least as large if the
    alternative is greater. For up to `MAX_EXACT_DOCUMENTS` documents all flips are counted, and the seed does not
    matter. For more, `draws` random flips are counted together with the observed one, so p is never 0.

    Args:
        differences: one finite number per document.
        seed: of the generator, PCG64.
        draws: number of random flips.
        alternative: two-sided, or greater for the one-sided test against a mean above 0.

    Raises:
        ValueError: there is no difference, or one is not finite.
    """
    values = _check_differences(differences)
    size: Callable[[Array], Array] = np.abs if alternative == "two-sided" else np.positive
    observed = size(values.sum()) - _RELATIVE_TIE * np.abs(values).sum()
    return _share_of_flips(values, lambda sums: size(sums) >= observed, seed=seed, draws=draws)


def least_units(num_tests: int, level: float) -> int:
    """Return the fewest documents (or seeds) with which a sign-flip test can pass among `num_tests` tests.

    The exact two-sided p-value of n units is at least 2 / 2^n, and the smallest of m p-values is multiplied by m
    (Holm), so n must be at least log2(2 m / level): 9 for eight tests at 5%.

    Args:
        num_tests: m; 0 counts as 1.
        level: of the corrected p-values, in (0, 1).
    """
    if num_tests < 0 or not 0 < level < 1:
        raise ValueError(f"num_tests must not be negative and level lie in (0, 1), not {num_tests} and {level}")
    return math.ceil(math.log2(2 * max(num_tests, 1) / level))


def equivalence_test(differences: Numbers, margin: float, *, seed: int, draws: int = SIGN_FLIP_DRAWS) -> float:
    """Return the p-value of the hypothesis that paired differences have a mean at or beyond +-margin (TOST).

    A small p-value shows that the two conditions are alike. It is the larger p-value of two one-sided sign-flip tests
    of the differences shifted by the margin to either side; at the border of the hypothesis these are symmetric
    around 0.

    Args:
        differences: one finite number per document.
        margin: positive; declared before the run, in the unit of the differences.
        seed: of the generator, PCG64.
        draws: number of random flips if there are more than `MAX_EXACT_DOCUMENTS` documents.

    Raises:
        ValueError: there is no difference, one is not finite, or the margin is not positive.
    """
    values = _check_differences(differences)
    if not 0 < margin < math.inf:
        raise ValueError(f"the margin must be positive and finite, not {margin}")
    shifted = values + margin, margin - values
    return max(sign_flip_test(moved, seed=seed, draws=draws, alternative="greater") for moved in shifted)


def detectable_difference(num_units: int, *, level: float, power: float = 0.8, simulations: int = 300) -> float | None:
    """Return the smallest mean of paired differences that sign flips find with the given power, by simulation.

    In standard deviations of a difference; differences are normal.

    Args:
        num_units: documents, or seeds.
        level: of the two-sided test; with Holm's correction for m tests, level / m for the least of them.
        power: share of simulated experiments that must reject.
        simulations: number of simulated experiments for each mean.

    Returns:
        The mean, or None if not even `LARGEST_MEAN` is found.
    """
    noise = _simulated_differences(num_units, simulations)

    def is_missed(mean: float) -> bool:
        found = sum(sign_flip_test(one + mean, seed=0, draws=_POWER_DRAWS) <= level for one in noise)
        return found < power * simulations

    return None if is_missed(LARGEST_MEAN) else bisect(is_missed, 0.0, LARGEST_MEAN, halvings=9)


def equivalence_power(num_units: int, margin: float, *, level: float, simulations: int = 300) -> float:
    """Return how often paired differences with mean 0 are found to lie within a margin, by simulation.

    Args:
        num_units: documents, or seeds.
        margin: in standard deviations of a difference; differences are normal.
        level: of the test; with Holm's correction for m tests, level / m for the least of them.
        simulations: number of simulated experiments.
    """
    noise = _simulated_differences(num_units, simulations)
    p_values = [equivalence_test(one, margin, seed=0, draws=_POWER_DRAWS) for one in noise]
    return sum(p <= level for p in p_values) / simulations


def bisect(holds: Callable[[float], bool], start: float, stop: float, *, halvings: int) -> float:
    """Return where a condition that holds at `start` and not at `stop` ends to hold."""
    for _ in range(halvings):
        middle = (start + stop) / 2
        if holds(middle):
            start = middle
        else:
            stop = middle
    return (start + stop) / 2


def holm(p_values: npt.ArrayLike) -> Array:
    """Return p-values adjusted to bound the probability of any false rejection by the level (Holm 1979).

    Args:
        p_values: of any shape, in [0, 1]; the result has the same shape.
    """
    p = _check_p_values(p_values)
    order = np.argsort(p, axis=None, kind="stable")
    factors = p.size - np.arange(p.size)
    return _put(np.minimum(np.maximum.accumulate(p.ravel()[order] * factors), 1), order, p.shape)


def benjamini_hochberg(p_values: npt.ArrayLike) -> Array:
    """Return p-values adjusted to bound the share of false rejections by the level (Benjamini and Hochberg 1995).

    Args:
        p_values: of any shape, such as (layers, heads), in [0, 1]; the result has the same shape.
    """
    p = _check_p_values(p_values)
    order = np.argsort(p, axis=None, kind="stable")
    scaled = p.ravel()[order] * p.size / np.arange(1, p.size + 1)
    return _put(np.minimum.accumulate(scaled[::-1])[::-1], order, p.shape)


def _acceleration(leave_one_out: Sequence[Numbers]) -> float:
    """Return a = sum(l^3 / n^3) / (6 sum(l^2 / n^2)^1.5) over the influences l of all factors.

    This is the acceleration for several samples (Davison and Hinkley 1997, chapter 5); for one sample it is Efron's.
    """
    cubes = squares = 0.0
    for values in leave_one_out:
        without = np.asarray(values, dtype=np.float64)
        influence = (len(without) - 1) / len(without) * (without.mean() - without)
        cubes += float((influence**3).sum())
        squares += float((influence**2).sum())
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _simulated_differences(num_units: int, simulations: int) -> Array:
    return np.random.Generator(np.random.PCG64(0)).standard_normal((simulations, num_units))


def _check_differences(differences: Numbers) -> Array:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"each document needs one finite difference, not an array of shape {values.shape}")
    return values


def _check_p_values(p_values: npt.ArrayLike) -> Array:
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must lie in [0, 1]")
    return p


def _share_of_flips(
    values: Array, is_extreme: Callable[[Array], npt.NDArray[np.bool_]], *, seed: int, draws: int
) -> float:
    """Return the share of sign flips whose sum is extreme; the observed sum must be extreme itself."""
    num_documents = len(values)
    if num_documents <= MAX_EXACT_DOCUMENTS:
        bits = np.arange(2**num_documents)[:, None] >> np.arange(num_documents) & 1
        return float(is_extreme((1.0 - 2.0 * bits) @ values).mean())
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    generator = np.random.Generator(np.random.PCG64(seed))
    rows_at_a_time = max(1, _NUMBERS_AT_A_TIME // num_documents)
    extreme = 0
    for start in range(0, draws, rows_at_a_time):
        rows = min(rows_at_a_time, draws - start)
        signs = 1.0 - 2.0 * generator.integers(2, size=(rows, num_documents))
        extreme += int(np.count_nonzero(is_extreme(signs @ values)))
    return (1 + extreme) / (1 + draws)


def _put(values: Array, order: npt.NDArray[np.intp], shape: tuple[int, ...]) -> Array:
    """Return sorted values in their original order and shape."""
    result = np.empty(len(order))
    result[order] = values
    return result.reshape(shape)
