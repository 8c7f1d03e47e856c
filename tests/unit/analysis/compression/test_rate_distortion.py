"""The bottleneck against known entropies and closed forms, its hulls, and what is recorded of them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from analysis_inputs import records_of, task_inputs, value_of
from metatokens.analysis.compression.bottleneck import gaussian_kl, log_density
from metatokens.analysis.compression.heads import corrected_entropy, label_entropy
from metatokens.analysis.compression.rate_distortion import (
    RateDistortionCurve,
    compare_hulls,
    hull_area,
    lower_hull,
    rate_distortion_curve,
)
from metatokens.analysis.inputs.labelled_states import Samples, states_of
from metatokens.config.analysis import MixturePrior, RateDistortionConfig
from metatokens.errors import UsageError

# eight classes of a skewed prior around means in 16 dimensions: the exact entropies, in nats
NUM_CLASSES, LABEL_ENTROPY, CONDITIONAL_ENTROPY = 8, 1.707, 0.013
# measured, one head a beta and 700 steps: beta -> rate, distortion
SEPARATE_HEADS = {1e-3: (11.61, 0.028), 0.1: (3.504, 0.147), 0.6: (1.139, 0.812), 1.2: (0.024, 1.698)}
SMALL = {"num_seeds": 1, "hidden_size": 64, "code_size": 8, "batch_size": 128, "learning_rate": 2e-3, "max_steps": 700}


def toy(num_states, seed=1):
    """Return states and labels whose entropies are known."""
    prior = torch.softmax(torch.linspace(1.5, -1.5, NUM_CLASSES), 0)
    means = torch.randn(NUM_CLASSES, 16, generator=torch.Generator().manual_seed(0)) * 1.2
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(prior, num_states, True, generator=generator)
    states = means[labels] + torch.randn(num_states, 16, generator=generator)
    return states.numpy(), labels.numpy()


def toy_labels_tested(curve):
    """Return the labels of the states that a curve was tested on."""
    return toy(6_000)[1][curve.document_ids]


@pytest.fixture(scope="module")
def curve():
    states, labels = toy(6_000)
    config = RateDistortionConfig(
        betas=tuple(SEPARATE_HEADS),
        evaluation_interval_steps=50,
        train_share=0.35,
        validation_share=0.15,
        **SMALL | {"max_steps": 1_000},
    )
    return rate_distortion_curve(states, labels, np.arange(6_000), config=config, seed=0)


def test_rate_plus_distortion_is_never_below_the_entropy_of_the_labels(curve):
    entropy = label_entropy(toy_labels_tested(curve))  # of the tested labels: then it holds for them, too
    assert entropy == pytest.approx(LABEL_ENTROPY, abs=0.03)
    # 48,000 sampled codes
    assert (curve.points.sum(axis=1) - entropy).min() > -0.005


def test_distortion_is_never_below_the_conditional_entropy(curve):
    slack = curve.points[:, 1] - CONDITIONAL_ENTROPY
    assert slack.min() > -0.005
    assert slack[0] == pytest.approx(0.01, abs=0.02)


def test_a_large_beta_ends_at_rate_0_and_the_entropy_of_the_labels(curve):
    assert curve.points[-1] == pytest.approx(SEPARATE_HEADS[1.2], abs=0.05)
    assert curve.zero_rate_distortions.mean() == pytest.approx(LABEL_ENTROPY, abs=0.05)


def test_the_middle_of_the_curve_has_the_measured_values(curve):
    assert curve.points[2] == pytest.approx(SEPARATE_HEADS[0.6], abs=0.25)
    slack = curve.points[2].sum() - label_entropy(toy_labels_tested(curve))
    assert slack == pytest.approx(0.244, abs=0.08)


def test_heads_that_start_from_their_neighbour_are_no_worse_than_those_alone(curve):
    for (beta, (rate, distortion)), point in zip(SEPARATE_HEADS.items(), curve.points, strict=True):
        assert point[1] + beta * point[0] <= distortion + beta * rate + 0.04


def test_a_small_beta_has_several_times_the_rate_that_the_labels_have(curve):
    assert curve.points[0, 0] > 2 * LABEL_ENTROPY
    assert np.all(np.diff(curve.points[:, 0]) < 0)
    assert np.all(np.diff(curve.points[:, 1]) > 0)


def test_label_shuffled_states_reach_no_less_than_the_entropy_of_the_labels():
    states, labels = toy(4_000)
    shuffled = np.random.default_rng(0).permutation(labels)
    config = RateDistortionConfig(betas=(1e-3, 0.1), train_share=0.4, validation_share=0.2, **SMALL)
    curve = rate_distortion_curve(states, shuffled, np.arange(4_000), config=config, seed=0)
    entropy = label_entropy(shuffled[curve.document_ids])
    assert curve.points[:, 1].min() == pytest.approx(entropy, abs=0.03)
    assert curve.points[:, 1].min() > entropy - 0.005


def test_a_gaussian_state_has_the_closed_form_of_the_gaussian_bottleneck():
    # Chechik et al. 2005, one dimension: with noise = 1 - correlation^2, I(Z;Y) = R - ln(1 - noise + noise e^2R) / 2,
    # whose slope is beta; a grid of y makes classes of it, whose exact decoder is linear in z
    noise, num_states = 0.3, 6_000
    rng = np.random.default_rng(0)
    states = rng.normal(size=(num_states, 2))
    y = math.sqrt(1 - noise) * states @ np.array([0.6, 0.8]) + math.sqrt(noise) * rng.normal(size=num_states)
    config = RateDistortionConfig(
        betas=(0.1, 0.2),
        train_share=0.4,
        validation_share=0.2,
        **SMALL | {"hidden_size": 16, "code_size": 2, "max_steps": 1_200},
    )
    labels = np.clip(np.round(y / 0.4), -6, 6)
    curve = rate_distortion_curve(states, labels, np.arange(num_states), config=config, seed=0)
    for beta, (rate, distortion) in zip(config.betas, curve.points, strict=True):
        assert rate == pytest.approx(math.log((1 - noise) * (1 - beta) / (noise * beta)) / 2, abs=0.2)
        # against the frequencies of the same labels, which have the same sampling error; the grid costs 0.02
        information = curve.zero_rate_distortions.mean() - distortion
        closed_form = rate - math.log(1 - noise + noise * math.exp(2 * rate)) / 2
        assert closed_form - 0.06 < information < closed_form + 0.01


def test_a_mixture_as_the_prior_keeps_the_invariants():
    states, labels = toy(2_000)
    config = RateDistortionConfig(betas=(0.1,), train_share=0.6, **SMALL | {"max_steps": 400})
    gaussian, mixture = (
        rate_distortion_curve(
            states, labels, np.arange(2_000), config=config.model_copy(update={"prior": prior}), seed=0
        )
        for prior in (config.prior, MixturePrior(num_components=8))
    )
    assert (mixture.points.sum(axis=1) - label_entropy(labels[mixture.document_ids])).min() > -0.01
    # the codes of eight classes are eight clusters, which one Gaussian cannot fit
    assert mixture.rates.mean() < gaussian.rates.mean() - 0.3


def test_a_head_is_the_same_alone_and_in_a_stack_and_for_the_same_seed_alone():
    states, labels = toy(600)
    options = SMALL | {"max_steps": 60, "betas": (0.1, 1.0)}
    one, two, again, other = (
        rate_distortion_curve(
            states,
            labels,
            np.arange(600),
            config=RateDistortionConfig(**options | {"num_seeds": num_seeds}),
            seed=seed,
        )
        for num_seeds, seed in ((1, 0), (2, 0), (2, 0), (1, 1))
    )
    np.testing.assert_allclose(one.rates[:, 0], two.rates[:, 0], rtol=1e-3, atol=1e-4)
    assert not np.allclose(two.rates[:, 0], two.rates[:, 1], rtol=1e-2)
    for name, value in vars(two).items():
        np.testing.assert_array_equal(value, getattr(again, name))
    assert not np.array_equal(one.document_ids, other.document_ids)


def test_a_head_that_runs_out_of_steps_is_flagged():
    states, labels = toy(300)
    config = RateDistortionConfig(betas=(0.1,), **SMALL | {"max_steps": 20})
    curve = rate_distortion_curve(states, labels, np.arange(300), config=config, seed=0)
    assert curve.converged.tolist() == [[False]]
    patient = config.model_copy(update={"max_steps": 200, "min_change": 10.0})
    curve = rate_distortion_curve(states, labels, np.arange(300), config=patient, seed=0)
    assert curve.converged.tolist() == [[True]]


def test_states_of_one_document_are_in_one_part():
    states, labels = toy(400)
    documents = np.arange(400) // 4
    config = RateDistortionConfig(betas=(0.1,), **SMALL | {"max_steps": 10})
    curve = rate_distortion_curve(states, labels, documents, config=config, seed=0)
    tested, counts = np.unique(curve.document_ids, return_counts=True)
    assert len(tested) == 15
    assert (counts == 4).all()


def test_too_few_documents_to_test_on_are_an_error_before_training():
    states, labels = toy(400)
    with pytest.raises(UsageError, match="at least 8, found 6"):
        rate_distortion_curve(states, labels, np.arange(400) // 10, config=RateDistortionConfig(), seed=0)


@pytest.mark.parametrize(
    ("states", "labels", "documents"),
    [
        (np.zeros((5, 2)), np.arange(4), np.arange(5)),
        (np.zeros(5), np.arange(5), np.arange(5)),
        (np.full((5, 2), np.nan), np.arange(5), np.arange(5)),
        (np.zeros((5, 2)), np.zeros(5), np.arange(5)),
    ],
)
def test_states_that_cannot_be_studied_are_refused(states, labels, documents):
    with pytest.raises(ValueError, match="states"):
        rate_distortion_curve(states, labels, documents, config=RateDistortionConfig(), seed=0)


@pytest.mark.parametrize("options", [{"betas": (0.2, 0.1)}, {"train_share": 0.9, "validation_share": 0.1}])
def test_a_config_that_contradicts_itself_is_refused(options):
    with pytest.raises(ValueError, match=r"betas must rise|nothing to test on"):
        RateDistortionConfig(**options)


# Densities ----------------------------------------------------------------------------------------


def test_divergence_and_density_are_those_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, prior_mean, values = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    scale, prior_scale = torch.rand(2, 5, 7, generator=generator, dtype=torch.float64) + 0.05
    code, prior = Independent(Normal(mean, scale), 1), Independent(Normal(prior_mean, prior_scale), 1)
    torch.testing.assert_close(gaussian_kl(mean, scale, prior_mean, prior_scale), kl_divergence(code, prior))
    torch.testing.assert_close(log_density(values, mean, scale), code.log_prob(values))
    assert gaussian_kl(mean, scale, mean, scale).abs().max() == 0


# Hulls -------------------------------------------------------------------------------------------------------


def test_hull_leaves_out_what_shared_time_or_a_lower_rate_reaches():
    points = [[0, 2], [1, 1.8], [2, 0.5], [3, 0.4], [3, 0.3], [4, 0.25], [2, 0.6], [5, 0.1]]
    assert lower_hull(points).tolist() == [[0, 2], [2, 0.5], [3, 0.3], [5, 0.1]]
    assert lower_hull([[1, 1]]).tolist() == [[1, 1]]
    assert lower_hull([[0, 1], [2, 1]]).tolist() == [[0, 1]]


def test_no_point_lies_below_its_hull():
    points = np.random.default_rng(0).random((40, 2))
    hull = lower_hull(points)
    assert (np.interp(points[:, 0], hull[:, 0], hull[:, 1]) <= points[:, 1] + 1e-12).all()
    slopes = np.diff(hull[:, 1]) / np.diff(hull[:, 0])
    assert (slopes < 0).all()
    assert (np.diff(slopes) > 0).all()


def test_area_under_a_hull_is_flat_past_its_end():
    hull = lower_hull([[0, 2], [1, 1], [3, 0.5]])
    assert hull_area(hull, 0.5) == pytest.approx(0.875)
    assert hull_area(hull, 3) == pytest.approx(1.5 + 1.5)
    assert hull_area(hull, 5) == pytest.approx(3 + 2 * 0.5)


def drawn_curve(points, gains, num_seeds=3, per_document=2):
    """Return a curve with the points (betas, 2), the distortion of each document lower by its gain."""
    num_states = len(gains) * per_document
    rates, distortions = (
        np.broadcast_to(np.array(points)[:, column, None, None], (len(points), num_seeds, num_states)).copy()
        for column in (0, 1)
    )
    distortions -= np.repeat(gains, per_document)
    return RateDistortionCurve(
        betas=np.arange(1.0, len(points) + 1),
        rates=rates,
        distortions=distortions,
        converged=np.ones((len(points), num_seeds), dtype=bool),
        zero_rate_distortions=np.full(num_states, 2.0),
        document_ids=np.repeat(np.arange(len(gains)), per_document),
    )


def test_area_between_hulls_is_the_integral_over_the_common_rates():
    first = drawn_curve([[4, 0.5], [1, 1]], np.zeros(10))
    other = drawn_curve([[6, 0.5], [2, 1]], np.zeros(10))
    comparison = compare_hulls(first, other, seed=0, resamples=50)
    # until rate 4: 1.5 + 2.25 under the first; 3 + 2 x (1 + 0.75) / 2 under the other
    assert comparison.area.estimate == pytest.approx(4.75 - 3.75)
    assert comparison.mean_gap.estimate == pytest.approx(0.25)
    assert (comparison.area.low, comparison.area.high) == pytest.approx((1, 1))
    assert comparison.num_documents == 10
    assert compare_hulls(other, first, seed=0, resamples=50).area.estimate == pytest.approx(-1)


def test_interval_of_the_area_is_that_of_documents_and_not_of_states():
    gains = np.random.default_rng(0).normal(0.1, 0.2, 30)
    points, zeros = [[4, 0.5], [1, 1]], np.zeros(30)
    few = compare_hulls(drawn_curve(points, gains), drawn_curve(points, zeros), seed=0, resamples=400)
    many = compare_hulls(
        drawn_curve(points, gains, per_document=20), drawn_curve(points, zeros, per_document=20), seed=0, resamples=400
    )
    # the gain grows to its full size at rate 1 and stays
    assert few.area.estimate == pytest.approx(3.5 * gains.mean())
    assert few.area.low < few.area.estimate < few.area.high
    assert few.area.high - few.area.low == pytest.approx(2 * 1.96 * 3.5 * gains.std() / math.sqrt(30), rel=0.15)
    assert (many.area.low, many.area.high) == pytest.approx((few.area.low, few.area.high))


def test_interval_of_the_area_holds_the_seeds_too():
    points, zeros = [[4, 0.5], [1, 1]], np.zeros(10)
    first, other = drawn_curve(points, zeros), drawn_curve(points, zeros)
    by_seed = first.distortions - np.array([0.0, 0.1, 0.3])[:, None]
    comparison = compare_hulls(dataclasses.replace(first, distortions=by_seed), other, seed=0, resamples=400)
    assert comparison.area.estimate == pytest.approx(3.5 * 0.4 / 3)
    assert comparison.area.low < 3.5 * 0.1
    assert comparison.area.high > 3.5 * 0.2


def test_what_makes_a_document_hard_for_both_states_cancels():
    hard = np.random.default_rng(0).normal(0, 0.3, 20)
    points = [[4, 0.5], [1, 1]]
    comparison = compare_hulls(drawn_curve(points, hard + 0.05), drawn_curve(points, hard), seed=0, resamples=300)
    assert 0.1 < comparison.area.low < comparison.area.estimate < comparison.area.high < 0.25


def test_curves_of_other_documents_are_not_compared():
    points = [[4, 0.5], [1, 1]]
    first = drawn_curve(points, np.zeros(10))
    for other in (
        drawn_curve(points, np.zeros(10), num_seeds=2),
        dataclasses.replace(first, document_ids=first.document_ids + 1),
        dataclasses.replace(first, zero_rate_distortions=first.zero_rate_distortions + 1),
    ):
        with pytest.raises(ValueError, match="same test states"):
            compare_hulls(first, other, seed=0)
    few = drawn_curve(points, np.zeros(7))
    with pytest.raises(UsageError, match="at least 8, found 7"):
        compare_hulls(few, few, seed=0)


def test_corrected_entropy_is_nearer_to_that_of_the_source():
    generator = np.random.Generator(np.random.PCG64(0))
    labels = generator.integers(0, 200, size=(20, 800))
    plain, corrected = (np.mean([entropy(row) for row in labels]) for entropy in (label_entropy, corrected_entropy))
    assert plain < np.log(200) - 0.1
    assert corrected == pytest.approx(np.log(200), abs=0.03)


# What is recorded ----------------------------------------------------------------------------------------------------


def recorded(labels):
    """Return inputs whose last meta-token tells the label, and whose last token is noise."""
    generator = np.random.Generator(np.random.PCG64(0))
    noise = generator.normal(size=(len(labels), 6)).astype(np.float32)
    telling = np.concatenate([np.eye(3, dtype=np.float32)[labels] * 4, noise], axis=1)
    config = RateDistortionConfig(betas=(0.1, 1.0), **SMALL | {"max_steps": 100})
    inputs = task_inputs(rate_distortion=config)
    states = {"last meta-token": telling, "last token": np.concatenate([noise, noise[:, :3]], axis=1)}
    inputs.provide(states_of, Samples(states, {"answer": labels}))
    return inputs


def test_recorded_area_is_that_of_other_states_minus_the_last_meta_token():
    labels = np.arange(240) % 3
    inputs = recorded(labels)
    (area,) = records_of("area", inputs)
    assert area.at == {"against": "last token"}
    assert 0 < area.low < area.value < area.high
    assert value_of("answer_entropy", inputs) == pytest.approx(corrected_entropy(labels))
    rate, distortion = (value_of(name, inputs, state="last meta-token", beta=0.1) for name in ("rate", "distortion"))
    assert rate + distortion > 0.9 * math.log(3)
    assert "rate_distortion: 2 of 2 heads of last meta-token ran out of steps" in inputs.skipped


def test_a_single_answer_leaves_the_bottleneck_out_with_the_reason():
    inputs = recorded(np.zeros(9, dtype=np.int64))
    assert records_of("rate", inputs) == records_of("area", inputs) == []
    assert len(inputs.skipped) == 1
    assert "answers: expected at least 2" in inputs.skipped[0]
