"""Intervals and tests against definitions written out, known numbers and simulation."""

import itertools

import numpy as np
import pytest

from metatokens.errors import UsageError
from metatokens.evaluation.significance import (
    bca_interval,
    benjamini_hochberg,
    holm,
    is_equivalent,
    ratio_statistic,
    sign_flip_test,
)
from metatokens.evaluation.statistics import Interval


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape)


def test_symmetric_data_has_nearly_the_percentile_interval() -> None:
    values = draw(0, 400)
    found = bca_interval(values, seed=1)
    assert found.low is not None
    assert found.high is not None
    assert found.estimate == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.015)
    assert bca_interval(values, seed=1) == found
    assert bca_interval(values, seed=2) != found


def test_skewed_data_moves_the_interval_towards_the_tail() -> None:
    values = np.exp(draw(0, 60) * 1.5)
    found = bca_interval(values, seed=1)
    generator = np.random.Generator(np.random.PCG64(1))
    means = values[generator.integers(60, size=(2000, 60))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low is not None
    assert found.high is not None
    assert found.low > low
    assert found.high > high


def test_formula_of_the_interval_is_efrons() -> None:
    """The endpoints by the published formula, on the same draws."""
    from statistics import NormalDist

    values = np.exp(draw(5, 20))
    generator = np.random.Generator(np.random.PCG64(7))
    draws = values[generator.integers(20, size=(2000, 20))].mean(axis=1)
    normal = NormalDist()
    z0 = normal.inv_cdf(float(np.mean(draws < values.mean())))
    jackknife = np.array([np.delete(values, i).mean() for i in range(20)])
    deviations = jackknife.mean() - jackknife
    a = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    expected = [
        np.quantile(draws, normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))))
        for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975))
    ]
    found = bca_interval(values, seed=7)
    assert [found.low, found.high] == pytest.approx(expected, rel=1e-9)


def test_ratio_is_that_of_the_sums_and_rows_stay_together() -> None:
    denominators = np.arange(1, 31, dtype=float)
    found = bca_interval(np.stack([denominators * 3, denominators], axis=1), ratio_statistic, seed=0)
    assert (found.estimate, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


@pytest.mark.slow
def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(400):
        found = bca_interval(np.exp(draw(seed, 40) * 0.5), seed=seed, resamples=500)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= np.exp(0.125) <= found.high
    assert 0.90 <= hits / 400 <= 0.98


def test_too_few_documents_and_missing_numbers_are_one_line() -> None:
    with pytest.raises(UsageError, match="expected at least 8, found 7; give more documents"):
        bca_interval(np.ones(7), seed=0)
    with pytest.raises(UsageError, match="NaN or infinity in 2 of 9"):
        bca_interval([1, 2, 3, 4, float("nan"), 6, float("inf"), 8, 9], seed=0)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_sign_flips_are_exact_for_few_documents(count: int) -> None:
    values = draw(count, count) + 0.4
    means = [abs(np.mean(values * signs)) for signs in itertools.product((-1, 1), repeat=count)]
    expected = np.mean([mean >= abs(values.mean()) - 1e-12 for mean in means])
    assert sign_flip_test(values, seed=0) == pytest.approx(expected)


def test_sampled_sign_flips_find_an_effect_and_none() -> None:
    assert sign_flip_test(draw(0, 60) + 1, seed=0) == pytest.approx(1 / 20_001)
    uniform = [sign_flip_test(draw(seed, 20), seed=seed, flips=500) for seed in range(200)]
    assert 0.01 <= np.mean(np.array(uniform) <= 0.05) <= 0.10
    assert sign_flip_test(np.zeros(30), seed=0) == 1.0


def test_corrections_for_many_tests_have_their_textbook_values() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg(p_values) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert holm([]) == benjamini_hochberg([]) == []
    assert max(holm([0.9, 0.8])) == 1.0


def test_equivalence_needs_the_whole_interval_within_the_margin() -> None:
    assert is_equivalent(Interval(0.0, -0.005, 0.008), 0.01)
    assert not is_equivalent(Interval(0.0, -0.005, 0.012), 0.01)
    assert not is_equivalent(Interval(0.0, None, None), 0.01)
