"""Arms by seeds, one number each: contrasts of arms with the training seed as the unit.

The arms of an experiment share their seeds, so each number is modelled as arm + seed + residual, the residuals normal
with one variance for all arms. It is estimated from all arms together, with (arms - 1) (seeds - 1) degrees of freedom
(the two-way layout without replication; Scheffe 1959, "The Analysis of Variance", chapter 4). So a few seeds of several
arms can decide what a few seeds of two arms cannot; the price is the assumption, which so few cannot check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from metatokens.evaluation.statistics import CONFIDENCE_LEVEL, Interval

_LARGEST_T = 1e6  # bounds the search for a quantile
_SEARCH_STEPS = 100


@dataclass(frozen=True)
class TwoWay:
    """The means of arms over seeds, and how far the residuals spread."""

    means: tuple[float, ...]
    """Of each arm."""
    deviation: float | None
    """Standard deviation of a residual; None without a degree of freedom."""
    degrees: int
    """Of freedom."""
    seeds: int
    arm_deviations: tuple[float, ...] | None
    """Standard deviation of the residuals of each arm, which the model takes to be one; None as `deviation`."""

    @classmethod
    def of(cls, numbers: Sequence[Sequence[float]]) -> Self:
        """Estimate the model.

        Args:
            numbers: (arms, seeds), finite; the seeds in one order for all arms.

        Raises:
            ValueError: there is no number, a row is shorter than another, or a number is not finite.
        """
        table = np.asarray(numbers, dtype=np.float64)
        if table.ndim != 2 or not table.size or not np.isfinite(table).all():
            raise ValueError(f"numbers must be finite, (arms, seeds), not of shape {table.shape}")
        arms, seeds = table.shape
        residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        degrees = (arms - 1) * (seeds - 1)
        means = tuple(table.mean(axis=1).tolist())
        if not degrees:
            return cls(means, None, degrees, seeds, None)
        of_arms = (residuals**2).sum(axis=1)
        arm_deviations = tuple(np.sqrt(of_arms * arms / degrees).tolist())
        return cls(means, math.sqrt(float(of_arms.sum()) / degrees), degrees, seeds, arm_deviations)

    def difference(self, first: int, second: int, *, level: float = CONFIDENCE_LEVEL) -> Interval:
        """Return the mean of the first arm minus the second's, with its interval over seeds."""
        estimate = self.means[first] - self.means[second]
        if self.deviation is None:
            return Interval(estimate, None, None, level)
        reach = t_quantile((1 + level) / 2, self.degrees) * self._error
        return Interval(estimate, estimate - reach, estimate + reach, level)

    def p_value(self, first: int, second: int) -> float:
        """Return the two-sided p-value of the hypothesis that two arms are equal; 1 without a degree of freedom."""
        return 1.0 if self.deviation is None else 2 * self._tail(abs(self.means[first] - self.means[second]))

    def p_equivalence(self, first: int, second: int, margin: float) -> float:
        """Return the p-value of the hypothesis that two arms differ by the margin or more (TOST); 1 as above."""
        return 1.0 if self.deviation is None else self._tail(margin - abs(self.means[first] - self.means[second]))

    def smallest_difference(self, level: float, power: float = 0.8) -> float | None:
        """Return about the smallest true difference that a test at this level finds with this probability."""
        if self.deviation is None:
            return None
        return (t_quantile(1 - level / 2, self.degrees) + t_quantile(power, self.degrees)) * self._error

    def equivalence_power(
        self, margin: float, level: float, *, simulations: int = 2_000, seed: int = 0
    ) -> float | None:
        """Return how often a test at this level finds equal arms to be within the margin, by simulation."""
        if self.deviation is None:
            return None
        draws = np.random.Generator(np.random.PCG64(seed))
        differences = self._error * np.abs(draws.standard_normal(simulations))
        errors = self._error * np.sqrt(draws.chisquare(self.degrees, simulations) / self.degrees)
        return float((differences + t_quantile(1 - level, self.degrees) * errors < margin).mean())

    def with_seeds(self, seeds: int) -> Self:
        """Return the model with the same spread and another number of seeds."""
        return replace(self, seeds=seeds, degrees=(len(self.means) - 1) * (seeds - 1))

    @property
    def _error(self) -> float:
        """The standard error of a difference of two arms."""
        assert self.deviation is not None
        return self.deviation * math.sqrt(2 / self.seeds)

    def _tail(self, distance: float) -> float:
        """Return the share of t above a distance in standard errors."""
        if not self._error:
            return 0.5 if not distance else float(distance < 0)
        return 1 - t_share_below(distance / self._error, self.degrees)


def t_share_below(t: float, degrees: int) -> float:
    """Return the share of Student's t below a number (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).

    Args:
        t: the number.
        degrees: of freedom, at least 1.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine, is_odd = math.cos(angle), degrees % 2
    term = cosine if is_odd else 1.0
    terms = []
    for power in range(2 + is_odd, degrees + 1, 2):
        terms.append(term)
        term *= cosine**2 * (power - 1) / power
    between = math.sin(angle) * math.fsum(terms)  # -t and t
    if is_odd:
        between = 2 / math.pi * (angle + between)
    return (1 + between) / 2


def t_quantile(share: float, degrees: int) -> float:
    """Return the number below which a share of Student's t lies, for a share in (0, 1)."""
    low, high = -_LARGEST_T, _LARGEST_T
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share_below(middle, degrees) < share else (low, middle)
    return (low + high) / 2
