"""Usable information and online codes against known entropies, and what is recorded of them."""

import math

import numpy as np
import pytest

from analysis_inputs import records_of, task_inputs, value_of
from metatokens.analysis.compression.heads import frequency_code, label_entropy
from metatokens.analysis.compression.probes import online_code, v_information
from metatokens.analysis.inputs.labelled_states import Samples, states_of
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
    entropy = label_entropy(labels)
    assert result.pointwise.mean() == pytest.approx(entropy, abs=0.07)
    assert result.codes.mean() < 0.03
    assert result.pointwise.mean() - result.shuffled_pointwise.mean() > 0.9 * entropy
    assert result.pointwise.shape == (2, 180)


@pytest.mark.parametrize("config", [LINEAR, MLP], ids=["linear", "mlp"])
def test_states_that_do_not_depend_on_the_label_have_no_information(config):
    labels, _ = classes_and_states(1_200)
    states = np.random.default_rng(1).normal(size=(1_200, 6))
    result = v_information(states, labels, np.arange(1_200), config=config, seed=0)
    assert -0.1 < result.pointwise.mean() < 0.02
    assert abs(result.pointwise.mean() - result.shuffled_pointwise.mean()) < 0.05


def test_shuffled_labels_of_telling_states_have_no_information():
    labels, states = classes_and_states(1_200)
    result = v_information(states, labels, np.arange(1_200), config=LINEAR, seed=0)
    assert -0.1 < result.shuffled_pointwise.mean() < 0.02


def test_a_linear_probe_cannot_use_what_a_hidden_layer_can():
    rng = np.random.default_rng(0)
    states = rng.choice([-1.0, 1.0], (1_200, 2)) + 0.1 * rng.normal(size=(1_200, 2))
    labels = states[:, 0] * states[:, 1] > 0
    linear, mlp = (
        v_information(states, labels, np.arange(1_200), config=config, seed=0).pointwise.mean()
        for config in (LINEAR, MLP)
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
    assert result.pointwise.mean() == pytest.approx(truth, abs=3 * standard_error)
    assert truth == pytest.approx(0.3369, abs=1e-3)
    assert result.pointwise.min() < 0 < result.pointwise.max() < math.log(2) + 0.05


def test_pointwise_information_adds_up_from_the_probe_and_the_frequencies():
    labels, states = classes_and_states(400)
    documents = np.arange(400) // 4
    result = v_information(states, labels, documents, config=LINEAR, seed=3)
    again = v_information(states, labels, documents, config=LINEAR, seed=3)
    np.testing.assert_array_equal(result.pointwise, again.pointwise)
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
    assert result.block_ends == (60,)


def test_the_first_block_is_uniform_and_the_rest_nearly_free_where_states_tell_the_label():
    labels, states = classes_and_states(1_000)
    config = ProbeConfig(code_shares=(0.1, 0.4, 1.0), **FAST | {"num_seeds": 1})
    result = online_code(states, labels, np.arange(1_000), config=config, seed=0)
    assert result.block_ends == (100, 400, 1_000)
    assert 100 * math.log(4) < result.lengths[0] < 100 * math.log(4) + 40
    assert result.uniform_length / result.lengths[0] > 5
    assert result.shuffled_lengths[0] > 0.98 * result.prior_length


def test_states_that_do_not_depend_on_the_label_cost_no_less_than_its_frequencies():
    labels, _ = classes_and_states(600)
    states = np.random.default_rng(1).normal(size=(600, 6))
    result = online_code(states, labels, np.arange(600), config=LINEAR, seed=0)
    assert 0.9 < result.prior_length / result.lengths.mean() < 1.005
    # the labels' skew alone makes the code shorter than uniform
    assert 1 < result.uniform_length / result.lengths.mean() < math.log(4) / label_entropy(labels) + 0.02


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


# What is recorded ----------------------------------------------------------------------------------------------------


def test_a_probe_reads_what_a_state_holds_and_labels_that_do_not_exist_are_left_out():
    generator = np.random.Generator(np.random.PCG64(0))
    answer = generator.integers(0, 3, 240)
    noise = generator.normal(size=(240, 6)).astype(np.float32)
    telling = np.concatenate([np.eye(3, dtype=np.float32)[answer] * 4, noise], axis=1)
    past = np.where(generator.random(240) < 0.3, -1, answer)
    rare = np.where(np.arange(240) < 20, answer, -1)
    labels = {
        "answer": answer,
        "the token before": past,
        "the token 16 back": rare,
        "meta-tokens so far": np.ones(240, dtype=np.int64),
    }
    samples = Samples({"last meta-token": telling, "token before it": noise, "mean embedding": noise}, labels)
    probe = ProbeConfig(num_seeds=1, learning_rate=0.05, max_steps=300, code_shares=(0.1, 0.5, 1.0))
    inputs = task_inputs(probe=probe)
    inputs.provide(states_of, samples)

    def value(name, state, target="answer"):
        return value_of(name, inputs, state=state, target=target)

    assert value("usable_information", "last meta-token") > 0.9
    assert value("selectivity", "last meta-token") > 0.9
    assert value("usable_information", "last meta-token", "the token before") > 0.8
    assert abs(value("usable_information", "token before it")) < 0.1
    assert value("remaining_entropy", "last meta-token") < 0.2
    shuffled = value_of("compression_of_shuffled", inputs, state="last meta-token")
    assert value_of("compression", inputs, state="last meta-token") > 2 > shuffled
    asked = {(r.at["state"], r.at["target"]) for r in records_of("usable_information", inputs)}
    assert ("mean embedding", "the token before") not in asked
    assert ("token before it", "the token before") not in asked  # that is the same token
    assert any("20 instances that have it" in line for line in inputs.skipped)
    (left,) = records_of("remaining_entropy", inputs, state="token before it")
    assert left.high - left.low > 0.01
    assert not any(target == "meta-tokens so far" for _, target in asked)  # one label is no question


def test_probes_that_ran_out_of_steps_are_said():
    labels, states = classes_and_states(80)
    inputs = task_inputs(probe=ProbeConfig(num_seeds=1, max_steps=1, code_shares=(0.5, 1.0)))
    inputs.provide(states_of, Samples({"last meta-token": states.astype(np.float32)}, {"answer": labels}))
    records_of("usable_information", inputs)
    records_of("compression", inputs)
    assert inputs.skipped == [
        "probes: 1 of 1 heads of last meta-token for answer ran out of steps",
        "probes: 1 of 1 heads of last meta-token for the online code ran out of steps",
    ]


def test_a_single_answer_leaves_nothing_to_probe():
    inputs = task_inputs()
    same = Samples({"last meta-token": np.zeros((9, 2), dtype=np.float32)}, {"answer": np.zeros(9, dtype=np.int64)})
    inputs.provide(states_of, same)
    assert records_of("usable_information", inputs) == records_of("compression", inputs) == []
    assert inputs.skipped == ["probe of answer: it is the same in all instances"]
