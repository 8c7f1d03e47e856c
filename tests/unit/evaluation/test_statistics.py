import math

import numpy as np
import pytest

from metatokens.evaluation.statistics import (
    Interval,
    accuracy_interval,
    bootstrap_paired_ratio,
    bootstrap_paired_seeds_and_instances,
    bootstrap_ratio,
    bootstrap_seeds_and_instances,
    paired_shares_interval,
    wilson_interval,
)


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


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # R: binom::binom.wilson(8, 10)
        (8, 10, 0.4902, 0.9433),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_interval_has_the_published_bounds(successes, trials, low, high):
    interval = wilson_interval(successes, trials)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
    assert interval.estimate == successes / trials


def test_wilson_bounds_solve_the_score_equation():
    interval = wilson_interval(37, 250, level=0.9)
    for bound in (interval.low, interval.high):
        assert abs(37 / 250 - bound) / math.sqrt(bound * (1 - bound) / 250) == pytest.approx(1.6448536, abs=1e-6)


@pytest.mark.parametrize("trials", [1, 7, 10_000, 10**9])
def test_wilson_interval_is_closed_at_0_and_at_1_exactly(trials):
    nothing, everything = wilson_interval(0, trials), wilson_interval(trials, trials)
    assert (nothing.estimate, nothing.low) == (0.0, 0.0)
    assert (everything.estimate, everything.high) == (1.0, 1.0)
    assert everything.low == pytest.approx(1 - nothing.high)
    assert 0 < nothing.high < 1


def test_wilson_interval_covers_the_true_share_as_often_as_it_says():
    # exact, by the binomial distribution; the average over shares is what the interval promises
    trials, shares = 40, np.linspace(0.02, 0.98, 97)
    intervals = [wilson_interval(successes, trials) for successes in range(trials + 1)]
    cover = [
        sum(
            math.comb(trials, k) * share**k * (1 - share) ** (trials - k)
            for k, interval in enumerate(intervals)
            if interval.low <= share <= interval.high
        )
        for share in shares
    ]
    assert 0.945 < np.mean(cover) < 0.96
    assert min(cover) > 0.83


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_of_impossible_counts_is_refused(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


def test_wilson_interval_of_an_impossible_level_is_refused():
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 2, level=1.0)


@pytest.mark.parametrize(
    ("differs", "shared_instances", "documented"),
    [
        ("seeds", True, (0.75, 0.84, 0.90)),
        ("seeds", False, (0.75, 0.84, 0.90)),
        ("noise", True, (0.99, 1.0, 1.0)),
        ("noise", False, (0.96, 0.98, 0.99)),
        ("difficulty", True, (0.95, 0.94, 0.95)),
        ("difficulty", False, (0.80, 0.68, 0.52)),
    ],
)
def test_interval_over_seeds_and_instances_covers_as_often_as_its_documentation_says(
    differs, shared_instances, documented
):
    for num_seeds, expected in zip((3, 5, 10), documented, strict=True):
        rng = np.random.default_rng(num_seeds)
        hits = 0
        for trial in range(150):
            seeds, difficulty = rng.normal(0, 1, (num_seeds, 1)), rng.normal(0, 1, (1, 50))
            noise = rng.normal(0, 1, (num_seeds, 50))
            outcomes = {"seeds": seeds + 0.01 * noise, "noise": noise, "difficulty": difficulty + 0.5 * noise}[differs]
            interval = bootstrap_seeds_and_instances(
                list(outcomes), seed=trial, shared_instances=shared_instances, resamples=200
            )
            hits += interval.low <= 0 <= interval.high
        assert hits / 150 == pytest.approx(expected, abs=0.08 if expected < 0.9 else 0.04)


def test_interval_over_seeds_and_instances_covers_where_both_differ():
    hits = 0
    for trial in range(200):
        rng = np.random.default_rng(trial)
        outcomes = rng.normal(0, 0.15, (5, 1)) + rng.normal(0, 1, (1, 50)) + rng.normal(0, 0.5, (5, 50))
        interval = bootstrap_seeds_and_instances(list(outcomes), seed=trial, resamples=300)
        hits += interval.low <= 0 <= interval.high
    assert 0.89 <= hits / 200 <= 0.98


def test_interval_over_the_instances_of_one_seed_covers():
    hits = 0
    for trial in range(200):
        interval = bootstrap_seeds_and_instances(
            [np.random.default_rng(trial).normal(0, 1, 50)], seed=trial, resamples=300
        )
        hits += interval.low <= 0 <= interval.high
    assert 0.89 <= hits / 200 <= 0.98


def test_mean_counts_every_seed_alike():
    interval = bootstrap_seeds_and_instances([[1, 1, 1, 1], [0]], seed=0, shared_instances=False)
    assert interval.estimate == 0.5
    assert (interval.low, interval.high) == (0, 1)


def test_interval_over_instances_within_each_seed_equals_a_loop():
    values = [np.array([1.0, 2.0, 4.0]), np.array([0.0, 3.0])]
    generator = np.random.Generator(np.random.PCG64(5))
    seeds = generator.integers(2, size=(400, 2))
    drawn = [iter(generator.integers(n, size=(int((seeds == s).sum()), n))) for s, n in ((0, 3), (1, 2))]
    # numpy fills the places of a seed row by row, which is the order of this loop
    means = [np.mean([values[s][next(drawn[s])].mean() for s in row]) for row in seeds]
    interval = bootstrap_seeds_and_instances(values, seed=5, shared_instances=False, resamples=400, level=0.8)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))
    assert (interval.estimate, interval.level) == (pytest.approx((7 / 3 + 1.5) / 2), 0.8)


def test_interval_over_instances_shared_by_all_seeds_equals_a_loop():
    values = np.array([[1.0, 2.0, 4.0], [0.0, 3.0, 1.0]])
    generator = np.random.Generator(np.random.PCG64(5))
    seeds, drawn = generator.integers(2, size=(400, 2)), generator.integers(3, size=(400, 3))
    means = [values[np.ix_(row, columns)].mean() for row, columns in zip(seeds, drawn, strict=True)]
    interval = bootstrap_seeds_and_instances(list(values), seed=5, resamples=400, level=0.8)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.1, 0.9])))


@pytest.mark.parametrize("shared_instances", [False, True])
def test_interval_over_seeds_and_instances_is_the_same_for_the_same_seed_alone(shared_instances):
    values = np.random.default_rng(0).normal(0, 1, (3, 40))
    before, state = values.copy(), np.random.get_state()[1].copy()  # noqa: NPY002 the state that must not change
    first, again, other = (
        bootstrap_seeds_and_instances(list(values), seed=seed, shared_instances=shared_instances) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert (values == before).all()
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_interval_of_one_seed_and_one_instance_has_no_bounds():
    assert bootstrap_seeds_and_instances([[0.25]], seed=0) == Interval(0.25, None, None)


def test_right_and_wrong_answers_are_outcomes():
    interval = bootstrap_seeds_and_instances([np.array([True, False, True, True])], seed=0)
    assert interval.estimate == 0.75
    assert 0 <= interval.low < 0.75 < interval.high <= 1


@pytest.mark.parametrize("shared_instances", [False, True])
def test_paired_difference_of_arms_is_tight_where_instances_and_seeds_differ_more_than_arms(shared_instances):
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, (4, 60)) + rng.normal(0, 1, (4, 1))
    better = hard + rng.normal(0.2, 0.1, (4, 60))
    options = {"seed": 0, "shared_instances": shared_instances}
    paired = bootstrap_paired_seeds_and_instances(list(better), list(hard), **options)
    alone = bootstrap_seeds_and_instances(list(better), **options)
    assert paired.estimate == pytest.approx((better - hard).mean())
    assert 0.15 < paired.low < paired.estimate < paired.high < 0.25
    assert alone.high - alone.low > 10 * (paired.high - paired.low)


@pytest.mark.parametrize(
    ("outcomes", "options"),
    [
        ([], {}),
        ([[]], {}),
        ([[1.0], []], {"shared_instances": False}),
        ([[[1.0]]], {}),
        ([[1.0, math.nan]], {}),
        ([[1.0], [1.0, 0.0]], {}),
        ([[1.0, 0.0]], {"level": 0.0}),
        ([[1.0, 0.0]], {"resamples": 0}),
    ],
)
def test_seeds_without_outcomes_are_refused(outcomes, options):
    with pytest.raises(ValueError, match=r"finite outcomes|shared_instances=False|level"):
        bootstrap_seeds_and_instances(outcomes, seed=0, **options)


@pytest.mark.parametrize("other", [[[1.0, 0.0]], [[1.0], [0.0]]])
def test_paired_arms_need_the_same_seeds_and_instances(other):
    with pytest.raises(ValueError, match="both arms"):
        bootstrap_paired_seeds_and_instances([[1.0, 0.0], [1.0, 1.0]], other, seed=0)


def test_accuracy_has_an_interval_where_all_or_none_is_right_and_a_bootstrap_elsewhere():
    none, every = (accuracy_interval([[share] * 10, [share] * 10], seed=0) for share in (0.0, 1.0))
    assert (none, every) == (wilson_interval(0, 10), wilson_interval(10, 10))
    mixed = [[0.0, 1.0, 0.5], [1.0, 1.0, 0.0]]
    assert accuracy_interval(mixed, seed=3) == bootstrap_seeds_and_instances(mixed, seed=3)
    halves = [[0.5, 0.5], [0.5, 0.5]]
    assert accuracy_interval(halves, seed=0).estimate == 0.5


def test_an_interval_is_written_as_its_estimate_and_its_bounds():
    assert str(Interval(161.2901, 152.4622, 169.7087)) == "161.3 (152.5 to 169.7)"
    assert str(Interval(2.0, None, None)) == "2"


def test_paired_interval_of_shares_covers_the_truth_for_every_table():
    trials = 12
    tables = [
        (both, one, other, trials - both - one - other)
        for both in range(trials + 1)
        for one in range(trials + 1 - both)
        for other in range(trials + 1 - both - one)
    ]
    intervals = []
    for both, one, other, neither in tables:
        first = [True] * both + [True] * one + [False] * other + [False] * neither
        second = [True] * both + [False] * one + [True] * other + [False] * neither
        intervals.append(paired_shares_interval(first, second))
        assert intervals[-1].low < intervals[-1].estimate < intervals[-1].high or abs(intervals[-1].estimate) == 1
    for chances in ((0.4, 0.2, 0.2, 0.2), (0.7, 0.2, 0.05, 0.05), (0.05, 0.05, 0.05, 0.85), (0.1, 0.6, 0.1, 0.2)):
        truth = chances[1] - chances[2]
        covered = 0.0
        for table, interval in zip(tables, intervals, strict=True):
            probability = math.factorial(trials)
            for count, chance in zip(table, chances, strict=True):
                probability *= chance**count / math.factorial(count)
            covered += probability * (interval.low <= truth <= interval.high)
        assert 0.93 < covered <= 1, chances


def test_paired_interval_of_shares_turns_with_its_arguments_and_is_no_point_where_both_agree():
    first, second = [True] * 9 + [False] * 6, [True] * 5 + [False] * 4 + [True] * 2 + [False] * 4
    forth, back = paired_shares_interval(first, second), paired_shares_interval(second, first)
    assert (forth.estimate, forth.low, forth.high) == pytest.approx((-back.estimate, -back.high, -back.low))
    agreeing = paired_shares_interval([True] * 20, [True] * 20)
    assert agreeing.estimate == 0
    assert agreeing.low < -0.05
    assert agreeing.high > 0.05
    with pytest.raises(ValueError, match="every trial"):
        paired_shares_interval([True], [True, False])
