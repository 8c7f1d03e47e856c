"""Times to an event that not every training reaches: survival curves, tests of two arms, and the ratio of their times.

A training that ends unsolved is censored: its time is longer than the horizon, the same for every training of an arm.
Curves are Kaplan and Meier's (1958), and the restricted mean is the area below a curve up to the horizon.

Two arms are compared by the log-rank test (Mantel 1966). Its statistic, observed minus expected events of one arm, is
a sum of one score for each training (Peto and Peto 1972). Seeds are paired by their data order, so a swap of the two
arms within a seed flips the sign of the difference of their scores, and the test is a sign-flip test. Times of the
second arm are multiplied by a ratio before the test to ask whether the first takes that many times as long: the ratios
that the test does not reject are the interval, and equivalence is two such tests, one for each border of the margin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Self

import numpy as np
import numpy.typing as npt

from metatokens.evaluation.significance import SIGN_FLIP_DRAWS, Array, bca_interval, bisect, sign_flip_test
from metatokens.evaluation.statistics import CONFIDENCE_LEVEL, Interval, Numbers

LARGEST_RATIO = 64.0
"""Bound of the search for a ratio."""
_HALVINGS = 14  # of the search, to a factor of 64 ** (1 / 2**14), less than 1.0003
_FEWEST_SEEDS = 3
_POWER_DRAWS = 1_000
_FIT_STEPS = 200
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Times:
    """Times to the event of one arm, by seed."""

    times: Array
    """(seeds,): time of the event, or `horizon` without one."""
    observed: npt.NDArray[np.bool_]
    """(seeds,): whether the event happened."""
    horizon: float
    """End of the observation."""

    @classmethod
    def of(cls, times: Numbers, observed: npt.ArrayLike, horizon: float) -> Self:
        """Return checked times.

        Raises:
            ValueError: there is no time, one is not in (0, horizon], or one without an event lies before the horizon.
        """
        values, events = np.asarray(times, dtype=np.float64), np.asarray(observed, dtype=np.bool_)
        if values.ndim != 1 or not len(values) or values.shape != events.shape:
            raise ValueError(f"each seed needs one time and one event, not shapes {values.shape} and {events.shape}")
        if not ((values > 0) & (values <= horizon)).all() or (values[~events] < horizon).any():
            raise ValueError(f"times must lie in (0, {horizon:g}], and at {horizon:g} without an event")
        return cls(values, events, float(horizon))

    def scaled(self, ratio: float) -> Times:
        """Return the times multiplied by a ratio."""
        return Times(self.times * ratio, self.observed, self.horizon * ratio)

    def until(self, horizon: float) -> Times:
        """Return the times as they would be seen at an earlier horizon."""
        return Times(np.minimum(self.times, horizon), self.observed & (self.times <= horizon), horizon)

    def of_seeds(self, indices: npt.NDArray[np.int64]) -> Times:
        """Return the times of some seeds."""
        return Times(self.times[indices], self.observed[indices], self.horizon)


@dataclass(frozen=True)
class TimeRatio:
    """How many times as long one arm takes as another."""

    estimate: float | None
    """None if an arm has no event."""
    low: float | None
    """None if no ratio down to 1 / `LARGEST_RATIO` is rejected."""
    high: float | None
    """None if no ratio up to `LARGEST_RATIO` is rejected."""
    level: float


def survival_curve(sample: Times) -> tuple[Array, Array]:
    """Return the steps of the Kaplan-Meier curve: event times, ascending, and the share without the event after each.

    Before the first time the share is 1.
    """
    times, events, at_risk = _risk_table(sample.times, sample.observed)
    return times, np.asarray(np.cumprod(1 - events / at_risk), dtype=np.float64)


def restricted_mean(sample: Times) -> float:
    """Return the mean time up to the horizon: the area below the Kaplan-Meier curve."""
    times, shares = survival_curve(sample)
    widths = np.diff(times, prepend=0.0, append=sample.horizon)
    return float(widths @ np.concatenate([[1.0], shares]))


def restricted_mean_interval(sample: Times, *, seed: int, level: float = CONFIDENCE_LEVEL) -> Interval:
    """Return the restricted mean with its BCa interval over seeds.

    Raises:
        UsageError: there are fewer than three seeds.
    """
    indices = np.arange(len(sample.times))

    def means(resamples: Array) -> Array:
        return np.array([restricted_mean(sample.of_seeds(drawn.astype(np.int64))) for drawn in resamples])

    return bca_interval(
        indices,
        means,
        seed=seed,
        level=level,
        minimum_documents=_FEWEST_SEEDS,
    )


def log_rank_scores(times: Array, observed: npt.NDArray[np.bool_]) -> Array:
    """Return the log-rank score of each member of a pooled sample, (members,).

    The score is the event, 0 or 1, minus the Nelson-Aalen hazard of the pooled sample up to the member's time. Summed
    over an arm it is the number of events of that arm minus the number expected; summed over all it is 0.
    """
    event_times, events, at_risk = _risk_table(times, observed)
    hazard = np.concatenate([[0.0], np.cumsum(events / at_risk)])
    scores: Array = observed - hazard[np.searchsorted(event_times, times, side="right")]
    return scores


def log_rank_test(first: Times, second: Times, *, seed: int) -> float:
    """Return the two-sided p-value of the hypothesis that two arms take equally long, paired by seed.

    Raises:
        ValueError: the arms have different numbers of seeds.
    """
    return sign_flip_test(_score_differences(first, second, 1.0), seed=seed)


def equivalence_of_times(
    first: Times, second: Times, margin: float, *, seed: int, draws: int = SIGN_FLIP_DRAWS
) -> float:
    """Return the p-value of the hypothesis that the ratio of times lies at or beyond 1 / margin or margin (TOST).

    Args:
        first: one arm.
        second: the other arm, with the same seeds in the same order.
        margin: ratio above 1, declared before the run.
        seed: of the draws of the sign flips.
        draws: number of sign flips where there are too many to count all.

    Raises:
        ValueError: the margin is not above 1, or the arms have different numbers of seeds.
    """
    if not 1 < margin < math.inf:
        raise ValueError(f"the margin must be a finite ratio above 1, not {margin}")
    is_longer = partial(sign_flip_test, seed=seed, draws=draws, alternative="greater")
    return max(
        is_longer(_score_differences(first, second, margin)),
        is_longer(-_score_differences(first, second, 1 / margin)),
    )


def time_ratio(first: Times, second: Times, *, seed: int, level: float = CONFIDENCE_LEVEL) -> TimeRatio:
    """Return how many times as long the first arm takes as the second, with the interval that the test does not reject.

    The estimate is the ratio at which the log-rank statistic is 0. If an arm has no event there is no estimate and only
    one bound, as its times may be anything beyond the horizon.

    Raises:
        ValueError: the arms have different numbers of seeds.
    """
    if not second.observed.any():
        if not first.observed.any():
            return TimeRatio(None, None, None, level)
        inverse = time_ratio(second, first, seed=seed, level=level)
        return TimeRatio(None, None, None if inverse.low is None else 1 / inverse.low, level)
    tail = (1 - level) / 2

    def is_rejected(sign: int, log_ratio: float) -> bool:
        differences = sign * _score_differences(first, second, math.exp(log_ratio))
        return sign_flip_test(differences, seed=seed, alternative="greater") <= tail

    def is_below(log_ratio: float) -> bool:
        return float(_score_differences(first, second, math.exp(log_ratio)).sum()) < 0

    reach = math.log(LARGEST_RATIO)
    estimate = bisect(is_below, -reach, reach, halvings=_HALVINGS)
    low = bisect(partial(is_rejected, -1), -reach, estimate, halvings=_HALVINGS)
    high = bisect(partial(is_rejected, 1), reach, estimate, halvings=_HALVINGS)
    return TimeRatio(
        math.exp(estimate) if first.observed.any() else None,
        math.exp(low) if is_rejected(-1, -reach) else None,
        math.exp(high) if is_rejected(1, reach) else None,
        level,
    )


def log_normal_fit(sample: Times) -> tuple[float, float]:
    """Return the median, and the standard deviation of the log, of log-normal times that fit best.

    Maximum likelihood with censored times (the EM algorithm of Dempster, Laird, Rubin 1977). The variance is multiplied
    by n / (n - 1), so that without censoring it is that of the sample.

    Raises:
        ValueError: fewer than three seeds have the event.
    """
    if sample.observed.sum() < _FEWEST_SEEDS:
        raise ValueError(f"a fit needs {_FEWEST_SEEDS} events, not {sample.observed.sum()}")
    logs, censored = np.log(sample.times), ~sample.observed
    border, num_censored = math.log(sample.horizon), int(censored.sum())
    mean, deviation = float(logs.mean()), float(logs.std())
    for _ in range(_FIT_STEPS if num_censored and deviation else 0):
        z = (border - mean) / deviation
        hazard = _NORMAL.pdf(z) / _NORMAL.cdf(-z)
        expected = np.where(censored, mean + deviation * hazard, logs)
        variance = deviation**2 * (1 + z * hazard - hazard**2)  # of a censored log, given that it is above the border
        mean = float(expected.mean())
        deviation = math.sqrt((((expected - mean) ** 2).sum() + num_censored * variance) / len(logs))
    return math.exp(mean), deviation * math.sqrt(len(logs) / (len(logs) - 1))


@dataclass(frozen=True)
class Design:
    """Two arms whose times are log-normal, with one spread."""

    num_seeds: int
    """Of each arm."""
    log_deviation: float
    """Standard deviation of the log of the times of an arm."""
    correlation: float
    """Of the logs of the two times of a seed."""
    horizon_over_median: float
    """Horizon in medians of the faster arm."""

    def draw(self, simulations: int) -> Array:
        """Return times of two arms with median 1, (simulations, 2, seeds); always the same."""
        logs = np.random.Generator(np.random.PCG64(0)).standard_normal((simulations, 2, self.num_seeds))
        logs[:, 1] = self.correlation * logs[:, 0] + math.sqrt(1 - self.correlation**2) * logs[:, 1]
        return np.asarray(np.exp(self.log_deviation * logs))

    def see(self, times: Array) -> Times:
        """Return what is seen of times until the horizon."""
        return Times(times, times < math.inf, math.inf).until(self.horizon_over_median)


def detectable_ratio(design: Design, *, level: float, power: float = 0.8, simulations: int = 300) -> float | None:
    """Return the smallest ratio of times that the paired log-rank test finds with the given power, by simulation.

    Args:
        design: the faster arm has its median, and the other that times the ratio.
        level: of the two-sided test; with Holm's correction for m contrasts, level / m for the least of them.
        power: share of simulated experiments that must reject.
        simulations: number of simulated experiments for each ratio.

    Returns:
        The ratio, or None if not even `LARGEST_RATIO` is found.
    """
    noise = design.draw(simulations)

    def is_missed(log_ratio: float) -> bool:
        found = 0
        for number, (first, second) in enumerate(noise):
            differences = _score_differences(design.see(first), design.see(second * math.exp(log_ratio)), 1.0)
            found += sign_flip_test(differences, seed=number, draws=_POWER_DRAWS) <= level
        return found < power * simulations

    reach = math.log(LARGEST_RATIO)
    return None if is_missed(reach) else math.exp(bisect(is_missed, 0.0, reach, halvings=8))


def equivalence_power_of_times(design: Design, margin: float, *, level: float, simulations: int = 300) -> float:
    """Return how often two equally fast arms are found equivalent, by simulation.

    Args:
        design: of both arms.
        margin: ratio above 1.
        level: of the test; with Holm's correction for m contrasts, level / m for the least of them.
        simulations: number of simulated experiments.
    """
    pairs = (map(design.see, pair) for pair in design.draw(simulations))
    p_values = [
        equivalence_of_times(first, second, margin, seed=number, draws=_POWER_DRAWS)
        for number, (first, second) in enumerate(pairs)
    ]
    return sum(p <= level for p in p_values) / simulations


def _risk_table(times: Array, observed: npt.NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """Return the distinct event times, the events at each, and the members still at risk there."""
    event_times, events = np.unique(times[observed], return_counts=True)
    at_risk = len(times) - np.searchsorted(np.sort(times), event_times, side="left")
    return event_times, events.astype(np.float64), at_risk.astype(np.float64)


def _score_differences(first: Times, second: Times, ratio: float) -> Array:
    """Return the first arm's score minus the second's for each seed, the second's times multiplied by `ratio`.

    Events score high and early ones highest, so differences are positive where the first arm is faster.
    """
    if len(first.times) != len(second.times):
        raise ValueError(f"arms are paired by seed, not with {len(first.times)} and {len(second.times)} seeds")
    second = second.scaled(ratio)
    horizon = min(first.horizon, second.horizon)
    first, second = first.until(horizon), second.until(horizon)
    scores = log_rank_scores(
        np.concatenate([first.times, second.times]), np.concatenate([first.observed, second.observed])
    )
    return scores[: len(first.times)] - scores[len(first.times) :]
