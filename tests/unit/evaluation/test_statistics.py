import math

import numpy as np
import pytest

from metatokens.evaluation.statistics import Interval, bootstrap_paired_ratio, bootstrap_ratio


def test_ratio_is_of_the_sums_and_not_the_mean_of_ratios():
    assert bootstrap_ratio([1, 30], [1, 10], seed=0).estimate == pytest.approx(31 / 11)


def test_interval_is_the_same_for_the_same_seed_alone():
    numerators, denominators = np.arange(1, 30.0), np.linspace(5, 9, 29)
    first = bootstrap_ratio(numerators, denominators, seed=1)
    assert bootstrap_ratio(numerators, denominators, seed=1) == first
    assert bootstrap_ratio(numerators, denominators, seed=2) != first


def test_interval_equals_a_loop_over_resamples():
    numerators, denominators = [3.0, 1.0, 4.0, 1.5], [2.0, 7.0, 1.0, 8.0]
    generator = np.random.Generator(np.random.PCG64(5))
    ratios = [
        sum(numerators[i] for i in drawn) / sum(denominators[i] for i in drawn)
        for drawn in generator.integers(4, size=(400, 4))
    ]
    result = bootstrap_ratio(numerators, denominators, seed=5, resamples=400, level=0.8)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(ratios, [0.1, 0.9])))
    assert result.level == 0.8


def test_interval_covers_the_true_ratio_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        lengths = rng.integers(50, 150, 40)
        interval = bootstrap_ratio(
            lengths * 3.0 + rng.normal(0, 20, 40), lengths.astype(float), seed=seed, resamples=300
        )
        hits += interval.low <= 3.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_has_no_bounds_and_no_nan_with_one_document():
    assert bootstrap_ratio([6.0], [3.0], seed=0) == Interval(2.0, None, None)
    assert bootstrap_ratio([6.0], [3.0], seed=0).exp() == Interval(math.exp(2.0), None, None)


def test_draws_without_a_denominator_are_left_out():
    interval = bootstrap_ratio([1.0, 2.0], [0.0, 1.0], seed=0)
    assert (interval.estimate, interval.low) == (3.0, 2.0)
    assert math.isfinite(interval.high)


def test_many_documents_are_drawn_in_pieces(monkeypatch):
    numerators, denominators = np.arange(1, 51.0), np.ones(50)
    whole = bootstrap_ratio(numerators, denominators, seed=3, resamples=100)
    monkeypatch.setattr("metatokens.evaluation.statistics._DRAWS_AT_A_TIME", 70)
    assert bootstrap_ratio(numerators, denominators, seed=3, resamples=100) == whole


def test_paired_difference_is_tight_where_documents_differ_more_than_models():
    rng = np.random.default_rng(0)
    hard = rng.normal(300, 80, 60)
    first, second, tokens = hard + rng.normal(5, 1, 60), hard, np.full(60, 100.0)
    paired = bootstrap_paired_ratio(first, second, tokens, seed=0)
    alone = bootstrap_ratio(first, tokens, seed=0)
    assert paired.estimate == pytest.approx((first - second).sum() / tokens.sum())
    assert 0.04 < paired.low < paired.high < 0.06
    assert alone.high - alone.low > 10 * (paired.high - paired.low)


def test_exp_of_a_huge_mean_stays_a_number_that_json_can_hold():
    assert math.isfinite(Interval(1e6, 1e6, 1e7).exp().high)


@pytest.mark.parametrize(
    ("numerators", "denominators", "options"),
    [
        ([], [], {}),
        ([1.0], [1.0, 2.0], {}),
        ([1.0, 1.0], [0.0, 0.0], {}),
        ([1.0, 1.0], [3.0, -1.0], {}),
        ([1.0, 1.0], [1.0, 1.0], {"level": 1.0}),
        ([1.0, 1.0], [1.0, 1.0], {"resamples": 0}),
    ],
)
def test_ratio_of_what_has_none_is_refused(numerators, denominators, options):
    with pytest.raises(ValueError, match=r"denominator|level"):
        bootstrap_ratio(numerators, denominators, seed=0, **options)


def test_paired_difference_needs_both_models_on_every_document():
    with pytest.raises(ValueError, match="both models"):
        bootstrap_paired_ratio([1.0, 2.0], [1.0], [1.0, 1.0], seed=0)
