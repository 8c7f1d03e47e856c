import itertools
import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest

from metatokens.errors import UsageError
from metatokens.evaluation.significance import (
    bca_from_draws,
    bca_interval,
    benjamini_hochberg,
    detectable_difference,
    equivalence_power,
    equivalence_test,
    holm,
    least_units,
    sign_flip_test,
)

# spatial test, Efron and Tibshirani 1993, table 14.1
SPATIAL = [48, 36, 20, 29, 42, 42, 20, 42, 22, 41, 45, 14, 6, 0, 33, 28, 34, 4, 32, 24, 47, 41, 24, 26, 30, 41]


def bca_by_hand(estimate, draws, left_out, level):
    """The definition, number by number."""
    normal, ordered = NormalDist(), sorted(draws)
    bias = normal.inv_cdf(sum(draw < estimate for draw in draws) / len(draws))
    middle = sum(left_out) / len(left_out)
    cubes = sum((middle - value) ** 3 for value in left_out)
    squares = sum((middle - value) ** 2 for value in left_out)
    acceleration = cubes / (6 * squares**1.5)
    bounds = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(tail)
        share = normal.cdf(bias + z / (1 - acceleration * z)) * (len(ordered) - 1)
        whole = int(share)
        bounds.append(ordered[whole] + (share - whole) * (ordered[whole + 1] - ordered[whole]))
    return tuple(bounds)


def test_bca_of_a_variance_has_the_published_bounds():
    # Efron and Tibshirani 1993, table 14.2: 171.5 with (115.8, 259.6) against (100.8, 233.9) by percentiles
    interval = bca_interval(SPATIAL, lambda draws: draws.var(axis=1), seed=0, resamples=20_000, level=0.9)
    assert interval.estimate == pytest.approx(171.5, abs=0.05)
    assert (interval.low, interval.high) == pytest.approx((115.8, 259.6), abs=4)


def test_bca_equals_its_definition_number_by_number():
    values = np.random.default_rng(3).lognormal(size=23)
    generator = np.random.Generator(np.random.PCG64(5))
    draws = [float(values[generator.integers(23, size=23)].mean()) for _ in range(500)]
    left_out = [float(np.delete(values, i).mean()) for i in range(23)]
    interval = bca_interval(values, seed=5, resamples=500, level=0.9)
    assert (interval.low, interval.high) == pytest.approx(bca_by_hand(values.mean(), draws, left_out, 0.9), rel=1e-9)
    assert interval.level == 0.9
    percentiles = np.quantile(draws, [0.05, 0.95])
    assert interval.high > percentiles[1]
    assert interval.low > percentiles[0]


def test_documents_that_are_alike_give_a_point():
    interval = bca_interval(np.full(9, 0.1), seed=0, resamples=50)
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1))


def test_an_estimate_beyond_all_draws_has_finite_bounds_among_them():
    draws = np.arange(1000.0)
    above, below = bca_from_draws(2000.0, draws, [[0.0, 1.0]]), bca_from_draws(-1.0, draws, [[0.0, 1.0]])
    assert 990 < above.low < above.high <= 999
    assert 0 <= below.low < below.high < 9


def test_a_level_and_skew_beyond_the_formula_give_the_end_of_the_draws():
    # 1 - a (z0 + z) < 0, where the formula would turn around
    interval = bca_from_draws(5.0, np.arange(10.0), [[0.0] * 9 + [-1e6]], level=1 - 1e-12)
    assert interval.high == 9.0


def test_a_factor_of_one_unit_changes_no_bound():
    draws, left_out = np.random.default_rng(0).gamma(2.0, size=200), [1.0, 2.0, 6.0]
    assert bca_from_draws(2.0, draws, [left_out, [4.0]]) == bca_from_draws(2.0, draws, [left_out])
    assert bca_from_draws(2.0, draws, [left_out, left_out]) != bca_from_draws(2.0, draws, [left_out])


def test_too_few_documents_are_one_clear_error():
    with pytest.raises(UsageError, match="documents for an interval: expected at least 8, found 7; pass more"):
        bca_interval(np.arange(7.0), seed=0)
    assert bca_interval(np.arange(7.0), seed=0, resamples=10, minimum_documents=7).estimate == 3


@pytest.mark.parametrize(
    ("values", "options"),
    [([math.nan] * 9, {}), (3.0, {}), (np.arange(9.0), {"level": 1.0}), (np.arange(9.0), {"resamples": 0})],
)
def test_an_interval_of_what_has_none_is_refused(values, options):
    with pytest.raises(ValueError, match=r"finite|level"):
        bca_interval(values, seed=0, **options)


@pytest.mark.slow
def test_bca_misses_a_skewed_mean_more_evenly_than_percentiles():
    rng, truth, trials = np.random.default_rng(0), 1.0, 400
    too_low = too_high = percentile_too_low = percentile_too_high = 0
    for seed in range(trials):
        values = rng.exponential(size=25)
        interval = bca_interval(values, seed=seed, resamples=600)
        too_low, too_high = too_low + (interval.high < truth), too_high + (interval.low > truth)
        generator = np.random.Generator(np.random.PCG64(seed))
        low, high = np.quantile(values[generator.integers(25, size=(600, 25))].mean(axis=1), [0.025, 0.975])
        percentile_too_low, percentile_too_high = (
            percentile_too_low + (high < truth),
            percentile_too_high + (low > truth),
        )
    assert 0.89 <= 1 - (too_low + too_high) / trials <= 0.97
    assert too_low < percentile_too_low
    assert too_low - too_high < percentile_too_low - percentile_too_high


@pytest.mark.slow
def test_bca_covers_a_normal_mean_as_often_as_it_says():
    rng, trials = np.random.default_rng(1), 400
    intervals = [bca_interval(rng.normal(2.0, 1.0, 30), seed=seed, resamples=600) for seed in range(trials)]
    assert 0.90 <= np.mean([one.low <= 2.0 <= one.high for one in intervals]) <= 0.97


@pytest.mark.parametrize("num_documents", range(1, 11))
def test_sign_flip_test_counts_every_flip(num_documents):
    # whole numbers, so that ties are exact
    differences = np.random.default_rng(num_documents).integers(-3, 6, num_documents)
    observed = abs(int(differences.sum()))
    flips = itertools.product((-1, 1), repeat=num_documents)
    extreme = sum(abs(int(np.dot(signs, differences))) >= observed for signs in flips)
    p_value = sign_flip_test(differences.astype(float), seed=0)
    assert Fraction(p_value) == Fraction(extreme, 2**num_documents)
    assert p_value == sign_flip_test(differences.astype(float), seed=1)


def test_sign_flip_test_is_not_misled_by_rounding():
    # every flip of the third and fourth that keeps 0.3 ties with the observed sum, but not to the last bit
    assert sign_flip_test([0.1, 0.2, -0.3], seed=0) == 1
    assert sign_flip_test([0.3, 0.1, 0.2, 0.1 + 0.2], seed=0) == 2 / 16


def test_sampled_sign_flips_agree_with_the_exact_ones():
    differences = np.random.default_rng(4).normal(0.6, 1, 15)
    signs = np.array(list(itertools.product((-1, 1), repeat=15)))
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9)
    sampled = sign_flip_test(differences, seed=0)
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))
    assert sampled == sign_flip_test(differences, seed=0)
    assert sampled != sign_flip_test(differences, seed=1)


def test_sampled_sign_flips_never_give_0():
    assert sign_flip_test(np.full(40, 1.0), seed=0, draws=99) == 1 / 100


def test_sampled_sign_flips_are_drawn_in_pieces(monkeypatch):
    differences = np.random.default_rng(4).normal(0.3, 1, 20)
    whole = sign_flip_test(differences, seed=3, draws=100)
    monkeypatch.setattr("metatokens.evaluation.significance._NUMBERS_AT_A_TIME", 70)
    assert sign_flip_test(differences, seed=3, draws=100) == whole


def test_sign_flip_test_rejects_as_often_as_its_level_without_a_difference():
    rng = np.random.default_rng(0)
    p_values = np.array([sign_flip_test(rng.normal(size=9), seed=0) for _ in range(600)])
    assert np.mean(p_values <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(p_values <= 0.5) == pytest.approx(0.5, abs=0.08)


def test_equivalence_is_shown_inside_the_margin_alone():
    rng = np.random.default_rng(0)
    small = rng.normal(0, 0.01, 30)
    assert equivalence_test(small, 0.02, seed=0) < 0.001
    assert equivalence_test(small, 0.001, seed=0) > 0.05
    assert equivalence_test(small + 0.05, 0.02, seed=0) > 0.5
    assert equivalence_test(small - 0.05, 0.02, seed=0) > 0.5


def test_equivalence_counts_every_flip_of_both_sides():
    differences, margin = np.array([1.0, -2.0, 2.0, 0.0, 1.0]), 3.0
    flips = np.array(list(itertools.product((-1, 1), repeat=5)))
    lower = np.mean(flips @ (differences + margin) >= (differences + margin).sum())
    upper = np.mean(flips @ (margin - differences) >= (margin - differences).sum())
    assert equivalence_test(differences, margin, seed=0) == max(lower, upper)


def test_equivalence_at_the_margin_is_claimed_as_often_as_its_level():
    rng = np.random.default_rng(2)
    p_values = np.array([equivalence_test(rng.normal(1.0, 0.5, 9), 1.0, seed=0) for _ in range(600)])
    assert np.mean(p_values <= 0.05) == pytest.approx(0.05, abs=0.03)


@pytest.mark.parametrize("differences", [[], [math.nan], [[1.0]]])
def test_a_test_of_no_differences_is_refused(differences):
    with pytest.raises(ValueError, match="one finite difference"):
        sign_flip_test(differences, seed=0)
    with pytest.raises(ValueError, match="one finite difference"):
        equivalence_test(differences, 1.0, seed=0)


def test_a_margin_of_nothing_is_refused():
    with pytest.raises(ValueError, match="margin"):
        equivalence_test([1.0], 0.0, seed=0)


@pytest.mark.parametrize(("num_tests", "least"), [(0, 6), (1, 6), (8, 9), (47, 11)])
def test_fewer_units_than_the_least_pass_no_corrected_test_and_as_many_can(num_tests: int, least: int):
    assert least_units(num_tests, 0.05) == least
    p_values = {n: sign_flip_test(np.ones(n), seed=0) for n in (least - 1, least)}
    assert holm([p_values[least - 1]] * max(num_tests, 1)).min() > 0.05
    assert holm([p_values[least]] * max(num_tests, 1)).max() <= 0.05


def test_holm_has_the_values_of_r():
    # as p.adjust of R has it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([[0.6, 0.9]]).tolist() == [[1.0, 1.0]]
    assert holm([]).tolist() == []


def test_benjamini_hochberg_has_the_published_rejections():
    # Benjamini and Hochberg 1995, section 3.2: of 15 tests the first four are rejected at 0.05, by Bonferroni three
    p_values = [
        0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344,
        0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0000,
    ]  # fmt: skip
    order = np.random.default_rng(0).permutation(15)
    adjusted = benjamini_hochberg(np.array(p_values)[order].reshape(3, 5))
    assert adjusted.shape == (3, 5)
    assert sorted(order[adjusted.ravel() <= 0.05]) == [0, 1, 2, 3]
    # as p.adjust of R has it
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert adjusted.max() == 1
    assert (holm(p_values) <= 0.05).sum() == 3


def test_what_sign_flips_can_find_is_nearly_what_the_z_test_can():
    normal = NormalDist()
    expected = (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) / math.sqrt(20)
    assert detectable_difference(20, level=0.05) == pytest.approx(expected, rel=0.15)
    passes = 2 * normal.cdf(0.6 * math.sqrt(20) - normal.inv_cdf(0.95)) - 1
    assert 0.65 < passes < 0.75
    assert equivalence_power(20, 0.6, level=0.05) == pytest.approx(passes, abs=0.12)


def test_what_the_readme_of_the_decomposition_says_of_ten_seeds():
    assert detectable_difference(10, level=0.05 / 4) == pytest.approx(1.4, abs=0.1)
    assert detectable_difference(10, level=0.05 / 14) == pytest.approx(2.0, abs=0.15)


def test_so_few_units_that_no_flip_is_rare_find_no_difference_at_all():
    assert detectable_difference(least_units(8, 0.05) - 1, level=0.05 / 8) is None
    assert detectable_difference(least_units(8, 0.05), level=0.05 / 8) < 8


@pytest.mark.parametrize("p_values", [[-0.1], [1.1], [math.nan]])
def test_p_values_outside_of_0_to_1_are_refused(p_values):
    with pytest.raises(ValueError, match="p-values"):
        holm(p_values)
    with pytest.raises(ValueError, match="p-values"):
        benjamini_hochberg(p_values)
