import math

import numpy as np
import pytest

from metatokens.analysis.compression.heads import frequency_code, label_entropy
from metatokens.analysis.compression.probes import fit_eraser, online_code, v_information
from metatokens.config.analysis import MlpProbe, ProbeConfig
from metatokens.errors import UsageError

FAST = {"num_seeds": 2, "learning_rate": 0.02, "max_steps": 400}
LINEAR, MLP = ProbeConfig(**FAST), ProbeConfig(probe=MlpProbe(hidden_size=32), **FAST)


def classes_and_states(num_states, seed=0):
    """Return labels of four classes, and states that tell them with certainty."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, num_states, p=[0.4, 0.3, 0.2, 0.1])
    return labels, 3 * np.eye(4)[labels] @ rng.normal(size=(4, 6)) + 0.05 * rng.normal(size=(num_states, 6))


@pytest.mark.parametrize("config", [LINEAR, MLP], ids=["linear", "mlp"])
def test_states_that_tell_the_label_have_all_of_its_entropy(config):
    labels, states = classes_and_states(1_200)
    result = v_information(states, labels, np.arange(1_200), config=config, seed=0)
    assert result.information == pytest.approx(result.null_entropy, abs=0.03)
    assert result.null_entropy == pytest.approx(label_entropy(labels), abs=0.06)
    assert result.accuracies.tolist() == [1, 1]
    assert result.selectivity > 0.9 * result.null_entropy
    assert result.pointwise.shape == (2, 180)


@pytest.mark.parametrize("config", [LINEAR, MLP], ids=["linear", "mlp"])
def test_states_that_do_not_depend_on_the_label_have_no_information(config):
    labels, _ = classes_and_states(1_200)
    states = np.random.default_rng(1).normal(size=(1_200, 6))
    result = v_information(states, labels, np.arange(1_200), config=config, seed=0)
    assert -0.1 < result.information < 0.02
    assert abs(result.selectivity) < 0.05


def test_shuffled_labels_of_telling_states_have_no_information():
    labels, states = classes_and_states(1_200)
    result = v_information(states, labels, np.arange(1_200), config=LINEAR, seed=0)
    assert -0.1 < result.shuffled_pointwise.mean() < 0.02


def test_a_linear_probe_cannot_use_what_a_hidden_layer_can():
    rng = np.random.default_rng(0)
    states = rng.choice([-1.0, 1.0], (1_200, 2)) + 0.1 * rng.normal(size=(1_200, 2))
    labels = states[:, 0] * states[:, 1] > 0
    linear, mlp = (
        v_information(states, labels, np.arange(1_200), config=config, seed=0).information for config in (LINEAR, MLP)
    )
    assert linear < 0.03
    assert mlp == pytest.approx(math.log(2), abs=0.05)


def test_information_of_a_noisy_state_is_the_known_one():
    # a binary label through a Gaussian channel, whose posterior is logistic in the state: I(X;Y) by quadrature
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=6_000)
    states = (2.0 * labels - 1)[:, None] + rng.normal(size=(6_000, 1))
    grid = np.linspace(-8, 8, 4_001)
    density = np.exp(-((grid - 1) ** 2) / 2) / math.sqrt(2 * math.pi)
    truth = math.log(2) - float((density * np.log1p(np.exp(-2 * grid))).sum() * (grid[1] - grid[0]))
    result = v_information(states, labels, np.arange(6_000), config=LINEAR, seed=0)
    standard_error = result.pointwise[0].std() / math.sqrt(900)
    assert result.information == pytest.approx(truth, abs=3 * standard_error)
    assert truth == pytest.approx(0.3369, abs=1e-3)
    assert result.pointwise.min() < 0 < result.pointwise.max() < math.log(2) + 0.05


def test_pointwise_information_adds_up_from_the_probe_and_the_frequencies():
    labels, states = classes_and_states(400)
    documents = np.arange(400) // 4
    result = v_information(states, labels, documents, config=LINEAR, seed=3)
    again = v_information(states, labels, documents, config=LINEAR, seed=3)
    np.testing.assert_array_equal(result.pointwise, again.pointwise)
    assert result.information == result.pointwise.mean()
    _, counts = np.unique(result.document_ids, return_counts=True)
    assert (counts == 4).all()
    # other states of the same documents are tested on the same ones
    other = v_information(states[:, :3], labels, documents, config=MLP, seed=3)
    np.testing.assert_array_equal(other.document_ids, result.document_ids)


def test_too_few_documents_are_an_error():
    labels, states = classes_and_states(40)
    with pytest.raises(UsageError, match="at least 8, found 6"):
        v_information(states, labels, np.arange(40), config=LINEAR, seed=0)
    with pytest.raises(UsageError, match="at least 8, found 5"):
        online_code(states, labels, np.arange(40) // 8, config=LINEAR, seed=0)


def test_frequencies_have_the_code_of_krichevsky_and_trofimov():
    code = frequency_code(np.array([0, 1, 2]), np.array([0, 0, 0, 2]), 3)
    assert code == pytest.approx(-np.log(np.array([3.5, 0.5, 1.5]) / 5.5))


# Online code -------------------------------------------------------------------------------------------------


def test_the_code_of_a_single_block_is_exactly_the_uniform_one():
    labels, states = classes_and_states(60)
    config = ProbeConfig(code_shares=(1.0,), **FAST)
    result = online_code(states, labels, np.arange(60), config=config, seed=0)
    assert result.lengths.tolist() == [60 * math.log(4)] * 2
    assert result.uniform_length == result.prior_length == 60 * math.log(4)
    assert (result.compression, result.compression_of_prior, result.block_ends) == (1, 1, (60,))


def test_the_first_block_is_uniform_and_the_rest_nearly_free_where_states_tell_the_label():
    labels, states = classes_and_states(1_000)
    config = ProbeConfig(code_shares=(0.1, 0.4, 1.0), **FAST | {"num_seeds": 1})
    result = online_code(states, labels, np.arange(1_000), config=config, seed=0)
    assert result.block_ends == (100, 400, 1_000)
    assert 100 * math.log(4) < result.lengths[0] < 100 * math.log(4) + 40
    assert result.compression > 5
    assert result.shuffled_lengths[0] > 0.98 * result.prior_length


def test_states_that_do_not_depend_on_the_label_cost_no_less_than_its_frequencies():
    labels, _ = classes_and_states(600)
    states = np.random.default_rng(1).normal(size=(600, 6))
    result = online_code(states, labels, np.arange(600), config=LINEAR, seed=0)
    assert 0.9 < result.compression_of_prior < 1.005
    # the labels' skew alone makes the code shorter than uniform
    assert 1 < result.compression < math.log(4) / label_entropy(labels) + 0.02


def test_prior_length_is_that_of_the_frequencies_block_by_block():
    labels, states = np.array([0, 1] * 20), np.zeros((40, 2))
    config = ProbeConfig(code_shares=(0.5, 1.0), **FAST | {"num_seeds": 1, "max_steps": 1})
    result = online_code(states, labels, np.arange(40), config=config, seed=0)
    # which 20 come first is drawn; both sums are of the same split of 20 zeros and 20 ones
    lengths = [
        20 * math.log(2) - (20 - k) * math.log((k + 0.5) / 21) - k * math.log((20.5 - k) / 21) for k in range(21)
    ]
    assert min(abs(result.prior_length - length) for length in lengths) < 1e-9


def test_blocks_end_with_a_document_and_short_ones_merge():
    labels, states = classes_and_states(100)
    result = online_code(states, labels, np.arange(100) // 5, config=LINEAR, seed=0)
    # 20 documents: shares up to 0.1 would end within the first two
    assert result.block_ends == (10, 15, 25, 50, 100)


@pytest.mark.parametrize("shares", [(0.5, 0.2, 1.0), (0.5,)])
def test_blocks_that_do_not_end_with_all_documents_are_refused(shares):
    with pytest.raises(ValueError, match="code_shares"):
        ProbeConfig(code_shares=shares)


# Erasure -----------------------------------------------------------------------------------------------------


def test_erasure_leaves_every_label_the_same_mean_and_the_rest_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=500)
    states = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + np.eye(3, 6)[labels] * 4
    eraser = fit_eraser(states, labels)
    erased = eraser.erase(states)
    means = np.stack([erased[labels == label].mean(axis=0) for label in range(3)])
    assert np.abs(means - states.mean(axis=0)).max() < 1e-10
    # two directions for three labels, and a second erasure changes nothing
    assert np.linalg.matrix_rank(states - erased, tol=1e-8) == 2
    np.testing.assert_allclose(eraser.erase(erased), erased, atol=1e-10)


def test_erasure_changes_the_states_less_than_the_orthogonal_projection_does():
    # states whose classes differ along (1, 0), with noise that is correlated between both dimensions
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=2_000)
    states = rng.normal(size=(2_000, 2)) @ np.array([[2.0, 1.8], [0.0, 0.3]])
    states[:, 0] += labels - labels.mean()
    centered = states - states.mean(axis=0)
    direction = centered.T @ (labels - labels.mean())
    direction /= np.linalg.norm(direction)
    projected = centered - np.outer(centered @ direction, direction)
    leace = ((fit_eraser(states, labels).erase(states) - states) ** 2).sum()
    assert leace <= ((projected - centered) ** 2).sum() * (1 + 1e-9)


def test_a_linear_probe_finds_nothing_after_erasure_and_a_hidden_layer_still_may():
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=1_500)
    # the mean and the spread tell the label
    states = rng.normal(size=(1_500, 3)) * np.where(labels, 0.2, 1.0)[:, None] + labels[:, None]
    erased = fit_eraser(states, labels).erase(states)
    before, after, hidden = (
        v_information(x, labels, np.arange(1_500), config=config, seed=0).information
        for x, config in ((states, LINEAR), (erased, LINEAR), (erased, MLP))
    )
    assert before > 0.25
    assert after < 0.01
    assert hidden > 0.2


def test_states_that_never_move_in_a_direction_are_erased_without_dividing_by_0():
    labels, states = classes_and_states(200)
    wide = np.concatenate([states, np.zeros((200, 2)), states[:, :1]], axis=1)
    erased = fit_eraser(wide, labels).erase(wide)
    assert np.isfinite(erased).all()
    means = np.stack([erased[labels == label].mean(axis=0) for label in range(4)])
    assert np.abs(means - wide.mean(axis=0)).max() < 1e-7
