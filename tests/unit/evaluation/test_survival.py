"""Survival statistics: equal to published values, to the tables of the definition, and to all swaps within pairs."""

from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from metatokens.evaluation.significance import sign_flip_test
from metatokens.evaluation.survival import (
    Design,
    TimeRatio,
    Times,
    detectable_ratio,
    equivalence_of_times,
    equivalence_power_of_times,
    log_normal_fit,
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


def test_an_arm_without_an_event_leaves_one_bound_and_no_estimate():
    never = Times.of([HORIZON] * 10, [False] * 10, HORIZON)
    fast = draw(0, 10)
    ratio, inverse = time_ratio(never, fast, seed=0), time_ratio(fast, never, seed=0)
    assert (ratio.estimate, ratio.high) == (None, None)
    # with m seeds that tell, the smallest one-sided p-value is 1 / 2^m: at a tail of 2.5% six must be faster
    assert ratio.low == pytest.approx(HORIZON / np.sort(fast.times)[5], rel=0.01)
    assert (inverse.estimate, inverse.low) == (None, None)
    assert inverse.high == pytest.approx(1 / ratio.low)


def test_neither_a_ratio_nor_a_bound_is_known_of_arms_that_never_have_the_event():
    never = Times.of([HORIZON] * 10, [False] * 10, HORIZON)
    assert time_ratio(never, never, seed=0) == TimeRatio(None, None, None, 0.95)


@pytest.mark.parametrize("power", [0.8, 0.95])
def test_the_detectable_ratio_is_that_of_the_textbook_without_censoring(power):
    # the log-rank test of log-normal times is nearly a t-test of their logs: exp((z_975 + z_power) * sd * sqrt(2 / n))
    expected = np.exp((1.96 + NormalDist().inv_cdf(power)) * 0.5 * np.sqrt(2 / 40))
    found = detectable_ratio(Design(40, 0.5, 0.0, 1e6), level=0.05, power=power, simulations=120)
    assert found == pytest.approx(expected, rel=0.1)


def test_pairs_that_go_together_can_show_a_smaller_ratio():
    # the variance of a difference of logs is 2 * sd ** 2 * (1 - correlation)
    expected = np.exp((1.96 + 0.84) * 0.5 * np.sqrt(2 * (1 - 0.75) / 40))
    found = detectable_ratio(Design(40, 0.5, 0.75, 1e6), level=0.05, simulations=120)
    assert found == pytest.approx(expected, rel=0.1)
    assert found < 0.9 * detectable_ratio(Design(40, 0.5, 0.0, 1e6), level=0.05, simulations=120)


def test_no_ratio_is_detectable_where_too_few_seeds_can_have_the_event():
    assert detectable_ratio(Design(10, 0.56, 0.0, 0.9), level=0.05 / 3, simulations=60) is None


@pytest.mark.parametrize("margin", [1.3, 1.5])
def test_equal_arms_are_found_equivalent_as_often_as_by_two_one_sided_tests_of_the_textbook(margin):
    # both t-like tests pass if the difference of mean logs lies within log(margin) - z_95 * sd * sqrt(2 / n)
    error = 0.4 * np.sqrt(2 / 30)
    expected = 2 * NormalDist().cdf(np.log(margin) / error - 1.645) - 1
    found = equivalence_power_of_times(Design(30, 0.4, 0.0, 1e6), margin, level=0.05, simulations=200)
    assert found == pytest.approx(expected, abs=0.2)  # the log-rank test is a little weaker for these times
    assert (0.6 < expected < 0.7) == (margin == 1.3)


def test_the_fit_of_log_normal_times_finds_what_was_drawn_with_a_third_censored():
    logs = 5 + 0.6 * np.random.default_rng(0).standard_normal(4000)
    horizon = np.exp(5.25)
    sample = Times.of(np.minimum(np.exp(logs), horizon), np.exp(logs) < horizon, horizon)
    assert 0.3 < 1 - sample.observed.mean() < 0.37
    median, deviation = log_normal_fit(sample)
    assert np.log(median) == pytest.approx(5, abs=0.04)
    assert deviation == pytest.approx(0.6, abs=0.04)


def test_the_fit_without_censoring_is_that_of_the_sample():
    sample = draw(0, 10)
    assert sample.observed.all()
    logs = np.log(sample.times)
    assert log_normal_fit(sample) == pytest.approx((np.exp(logs.mean()), logs.std(ddof=1)))
    with pytest.raises(ValueError, match="needs 3 events, not 1"):
        log_normal_fit(Times.of([5.0, HORIZON, HORIZON], [True, False, False], HORIZON))


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
