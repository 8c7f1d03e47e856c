"""Arms by seeds: known quantiles, a hand-made layout, and how often the tests are wrong."""

from dataclasses import replace

import numpy as np
import pytest

from metatokens.evaluation.two_way import TwoWay, t_quantile, t_share_below


@pytest.mark.parametrize(
    ("share", "degrees", "quantile"),  # of printed tables
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.995, 3, 5.841), (0.975, 8, 2.306), (0.95, 15, 1.753), (0.9, 30, 1.310)],
)
def test_quantiles_of_t_are_those_of_the_tables(share: float, degrees: int, quantile: float) -> None:
    assert t_quantile(share, degrees) == pytest.approx(quantile, abs=6e-4)
    assert t_quantile(1 - share, degrees) == pytest.approx(-quantile, abs=6e-4)
    assert t_share_below(t_quantile(share, degrees), degrees) == pytest.approx(share)


def test_two_arms_are_compared_as_by_a_paired_t_test() -> None:
    first, second = [1.0, 2.0, 4.0], [0.5, 1.9, 3.6]
    layout = TwoWay.of([first, second])
    differences = np.subtract(first, second)
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(3))
    assert layout.degrees == 2
    assert layout.p_value(0, 1) == pytest.approx(2 * (1 - t_share_below(t, 2)))
    interval = layout.difference(0, 1)
    reach = t_quantile(0.975, 2) * differences.std(ddof=1) / np.sqrt(3)
    assert (interval.low, interval.high) == pytest.approx((differences.mean() - reach, differences.mean() + reach))


def test_seeds_that_all_arms_share_change_nothing() -> None:
    rows = np.array([[1.0, 2.0, 3.1], [0.4, 1.7, 2.2], [1.1, 1.9, 3.0]])
    layout, shifted = TwoWay.of(rows.tolist()), TwoWay.of(np.add(rows, [0, 50, -20]).tolist())
    assert shifted.deviation == pytest.approx(layout.deviation)
    assert shifted.p_value(0, 1) == pytest.approx(layout.p_value(0, 1))


def moved_first_arm(draws: np.random.Generator, by: float) -> list[list[float]]:
    numbers = draws.normal(size=(5, 3))
    numbers[0] += by
    return numbers.tolist()


def test_equal_arms_are_found_to_differ_as_often_as_the_level_says() -> None:
    draws = np.random.default_rng(0)
    layouts = [TwoWay.of(draws.normal(size=(5, 3)).tolist()) for _ in range(2000)]
    assert np.mean([layout.p_value(0, 1) <= 0.05 for layout in layouts]) == pytest.approx(0.05, abs=0.015)
    # and arms at the margin are found to be alike as often
    margin = [TwoWay.of(moved_first_arm(draws, 3.0)) for _ in range(2000)]
    assert np.mean([layout.p_equivalence(0, 1, 3.0) <= 0.05 for layout in margin]) == pytest.approx(0.05, abs=0.015)


def test_the_smallest_difference_is_found_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1)
    layouts = [TwoWay.of(draws.normal(size=(5, 3)).tolist()) for _ in range(500)]
    smallest = np.sqrt(np.mean([(layout.smallest_difference(0.05) or 0) ** 2 for layout in layouts]))
    moved = [TwoWay.of(moved_first_arm(draws, smallest)) for _ in range(1000)]
    assert 0.72 < np.mean([layout.p_value(0, 1) <= 0.05 for layout in moved]) < 0.9


def test_what_the_readme_of_the_decomposition_says_of_its_design() -> None:
    draws = np.random.default_rng(2)
    spread = [[3.0], [3.0], [1.0], [1.0], [1.0]]  # of the two arms compared, and of the others
    uneven = [TwoWay.of((draws.normal(size=(5, 3)) * spread).tolist()).p_value(0, 1) for _ in range(2000)]
    assert np.mean(np.array(uneven) <= 0.05) == pytest.approx(1 / 6, abs=0.035)
    assert np.mean(np.array(uneven) <= 0.01) == pytest.approx(1 / 15, abs=0.025)
    for deviation, smallest, equivalent in ((0.03, 0.1, 0.71), (0.05, 0.17, 0.1)):
        layouts = [TwoWay.of((draws.normal(size=(5, 3)) * deviation).tolist()) for _ in range(1500)]
        assert np.mean([one.smallest_difference(0.01) or 0 for one in layouts]) == pytest.approx(smallest, abs=0.006)
        alike = [one.p_equivalence(0, 1, 0.1) <= 0.01 for one in layouts]
        assert np.mean(alike) == pytest.approx(equivalent, abs=0.05)
    # E5: two seeds of eleven arms, ten contrasts
    layouts = [TwoWay.of((draws.normal(size=(11, 2)) * 0.03).tolist()) for _ in range(1500)]
    assert np.mean([one.smallest_difference(0.005) or 0 for one in layouts]) == pytest.approx(0.13, abs=0.006)
    assert np.mean([one.p_equivalence(0, 1, 0.1) <= 0.005 for one in layouts]) == pytest.approx(0.28, abs=0.05)
    spread = [[3.0]] * 2 + [[1.0]] * 9
    uneven = [TwoWay.of((draws.normal(size=(11, 2)) * spread).tolist()).p_value(0, 1) for _ in range(1500)]
    assert np.mean(np.array(uneven) <= 0.05) == pytest.approx(0.3, abs=0.05)
    assert np.mean(np.array(uneven) <= 0.005) == pytest.approx(1 / 8, abs=0.04)
    # the rule before: three seeds with one sign, and an interval over books of this half-width that excludes 0
    differences = draws.normal(size=(20_000, 3)) * 0.03 * np.sqrt(2)
    is_stated = (abs(np.sign(differences).sum(axis=1)) == 3) & (abs(differences.mean(axis=1)) > 0.021)
    assert np.mean(is_stated) == pytest.approx(1 / 5, abs=0.03)


def test_the_power_of_equivalence_is_how_often_equal_arms_pass() -> None:
    draws = np.random.default_rng(3)
    layouts = [TwoWay.of(draws.normal(size=(5, 6)).tolist()) for _ in range(1500)]
    passed = np.mean([layout.p_equivalence(0, 1, 1.6) <= 0.05 for layout in layouts])
    known = replace(layouts[0], deviation=1.0)
    assert 0.5 < passed < 0.95
    assert known.equivalence_power(1.6, 0.05) == pytest.approx(passed, abs=0.04)
    assert known.with_seeds(3).equivalence_power(1.6, 0.05) < passed


def test_the_residuals_of_an_arm_that_spreads_further_show_it() -> None:
    table = np.random.default_rng(4).normal(size=(5, 200))
    table[2] *= 3
    layout = TwoWay.of(table.tolist())
    assert layout.arm_deviations is not None
    assert np.argmax(layout.arm_deviations) == 2
    assert np.mean(np.square(layout.arm_deviations)) == pytest.approx(layout.deviation**2)


def test_one_seed_tells_nothing() -> None:
    layout = TwoWay.of([[1.0], [2.0]])
    assert (layout.p_value(0, 1), layout.p_equivalence(0, 1, 9.0)) == (1.0, 1.0)
    assert layout.difference(0, 1).low is None
    assert layout.smallest_difference(0.05) is None


@pytest.mark.parametrize("numbers", [[], [[1.0, float("nan")]], [1.0, 2.0]])
def test_numbers_that_are_no_layout_are_refused(numbers: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"\(arms, seeds\)"):
        TwoWay.of(numbers)
