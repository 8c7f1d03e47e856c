"""Survival statistics: equal to published values, to the tables of the definition, and to all swaps within pairs."""

from itertools import product

import numpy as np
import pytest

from metatokens.evaluation.significance import sign_flip_test
from metatokens.evaluation.survival import (
    Times,
    detectable_ratio,
    equivalence_of_times,
    log_rank_scores,
    log_rank_test,
    restricted_mean,
    restricted_mean_interval,
    survival_curve,
    time_ratio,
)

# weeks of remission, Freireich et al. 1963, as in Kleinbaum and Klein, Survival Analysis, chapter 2; + is censored
TREATED = "6 6 6 7 10 13 16 22 23 6+ 9+ 10+ 11+ 17+ 19+ 20+ 25+ 32+ 32+ 34+ 35+"
PLACEBO = "1 1 2 2 3 4 4 5 5 8 8 8 8 11 11 12 12 15 17 22 23"
HORIZON = 100.0


def read(text):
    texts = text.split()
    return np.array([float(text.rstrip("+")) for text in texts]), np.array([not text.endswith("+") for text in texts])


def draw(seed, num_seeds, ratio=1.0, deviation=0.5, horizon=HORIZON):
    generator = np.random.default_rng(seed)
    times = 20 * ratio * np.exp(deviation * generator.standard_normal(num_seeds))
    return Times.of(np.minimum(times, horizon), times <= horizon, horizon)


def observed_minus_expected(times, events, in_arm):
    """Return the numerator of the log-rank test of an arm from the table of each event time."""
    total = 0.0
    for time in sorted(set(times[events])):
        at_risk, died = times >= time, events & (times == time)
        total += (died & in_arm).sum() - died.sum() * (at_risk & in_arm).sum() / at_risk.sum()
    return total


def test_the_curve_of_the_remission_times_is_the_published_one():
    times, events = read(TREATED)
    at, shares = survival_curve(Times(times, events, 35.0))
    assert at.tolist() == [6, 7, 10, 13, 16, 22, 23]
    assert shares.round(3).tolist() == [0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448]


def test_the_log_rank_scores_of_the_remission_times_are_the_published_observed_minus_expected():
    (times, events), (other, died) = read(TREATED), read(PLACEBO)
    scores = log_rank_scores(np.concatenate([times, other]), np.concatenate([events, died]))
    assert scores[:21].sum() == pytest.approx(9 - 19.25, abs=0.005)
    assert scores.sum() == pytest.approx(0, abs=1e-12)


def test_scores_sum_to_the_tables_of_the_definition_with_ties_and_censoring():
    generator = np.random.default_rng(0)
    times, events = generator.integers(1, 9, 40).astype(float), generator.random(40) < 0.7
    in_arm = generator.random(40) < 0.5
    scores = log_rank_scores(times, events)
    assert scores[in_arm].sum() == pytest.approx(observed_minus_expected(times, events, in_arm), abs=1e-12)


def test_the_p_value_is_the_share_of_swaps_within_seeds_that_are_as_far_from_expected():
    first, second = draw(1, 8, ratio=1.6), draw(2, 8, horizon=HORIZON)
    pairs = np.stack([first.times, second.times]), np.stack([first.observed, second.observed])
    totals = []
    for swap in product((0, 1), repeat=8):
        order = np.stack([np.array(swap), 1 - np.array(swap)])
        times, events = (np.take_along_axis(part, order, axis=0).ravel() for part in pairs)
        totals.append(abs(observed_minus_expected(times, events, np.arange(16) < 8)))
    assert log_rank_test(first, second, seed=0) == np.mean(np.array(totals) >= totals[0] - 1e-9)


def test_the_restricted_mean_is_the_mean_of_the_times_cut_at_the_horizon():
    sample = draw(3, 30, deviation=1.0, horizon=30)
    assert not sample.observed.all()
    assert restricted_mean(sample) == pytest.approx(np.minimum(sample.times, 30).mean(), rel=1e-12)
    interval = restricted_mean_interval(sample, seed=0)
    assert interval.low < restricted_mean(sample) == interval.estimate < interval.high


def test_the_restricted_mean_of_early_censoring_is_the_area_below_the_curve():
    times, events = read(TREATED)
    sample, area, share, before = Times(times, events, 35.0), 0.0, 1.0, 0.0
    for at, next_share in zip(*survival_curve(sample), strict=True):
        area, share, before = area + share * (at - before), next_share, at
    assert restricted_mean(sample) == pytest.approx(area + share * (35 - before), rel=1e-12)


def test_a_ratio_of_times_is_found_whichever_arm_is_named_first():
    first, second = draw(4, 24, ratio=2.0, deviation=0.2), draw(5, 24, deviation=0.2)
    ratio, inverse = time_ratio(first, second, seed=0), time_ratio(second, first, seed=0)
    assert ratio.low < 2 < ratio.high
    assert ratio.estimate == pytest.approx(1 / inverse.estimate, rel=0.02)
    assert ratio.low == pytest.approx(1 / inverse.high, rel=0.02)


def test_intervals_of_the_ratio_hold_the_true_one_as_often_as_they_say():
    held = 0
    for number in range(100):
        interval = time_ratio(draw(2 * number, 10, ratio=1.5), draw(2 * number + 1, 10), seed=0, level=0.9)
        held += interval.low <= 1.5 <= interval.high
    assert 80 <= held <= 98  # of 100, within three standard deviations of 90


def test_equivalence_is_shown_exactly_where_the_interval_lies_within_the_margin():
    verdicts = set()
    for number in range(12):
        first, second = draw(number, 12, ratio=1 + number / 12, deviation=0.15), draw(99, 12, deviation=0.15)
        interval = time_ratio(first, second, seed=0, level=0.9)
        within = interval.low > 1 / 1.5 and interval.high < 1.5
        assert (equivalence_of_times(first, second, 1.5, seed=0) <= 0.05) == within
        verdicts.add(within)
    assert verdicts == {True, False}


def test_a_bound_that_the_censored_times_leave_open_is_none():
    slow = Times.of([HORIZON] * 10, [False] * 10, HORIZON)
    ratio = time_ratio(slow, draw(0, 10), seed=0)
    assert ratio.high is None
    assert ratio.low > 2
    assert time_ratio(slow, slow, seed=0) is None
    inverse = time_ratio(draw(0, 10), slow, seed=0)
    assert inverse.low is None
    assert (inverse.estimate, inverse.high) == pytest.approx((1 / ratio.estimate, 1 / ratio.low))


def test_the_detectable_ratio_is_that_of_the_textbook_without_censoring():
    # the log-rank test of log-normal times is nearly a t-test of their logs: exp((z_975 + z_80) * sd * sqrt(2 / n))
    expected = np.exp((1.96 + 0.84) * 0.5 * np.sqrt(2 / 40))
    found = detectable_ratio(40, 0.5, level=0.05, horizon_over_median=1e6, simulations=120)
    assert found == pytest.approx(expected, rel=0.15)


def test_times_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="paired by seed"):
        log_rank_test(draw(0, 4), draw(0, 5), seed=0)
    with pytest.raises(ValueError, match="at 100 without an event"):
        Times.of([50.0], [False], HORIZON)
    with pytest.raises(ValueError, match="above 1"):
        equivalence_of_times(draw(0, 4), draw(1, 4), 1.0, seed=0)


def test_a_one_sided_sign_flip_test_counts_flips_at_least_as_large():
    assert sign_flip_test([1.0, 2.0, 3.0], seed=0, alternative="greater") == 1 / 8
    assert sign_flip_test([-1.0, -2.0, -3.0], seed=0, alternative="greater") == 1
