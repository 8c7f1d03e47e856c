"""Erasure on labels whose means are known, and on circuits whose cause is known."""

import numpy as np
import pytest
import torch

from analysis_inputs import TASK, records_of, task_inputs, value_of
from circuits import BOS, QUESTION_AT, WRITER_AT, build_circuit, hand_made_pairs
from metatokens.analysis.compression.erasure import LinearEraser, fit_eraser, fit_erasers, meta_states
from metatokens.analysis.compression.probes import v_information
from metatokens.analysis.inputs.labelled_states import Sample, draw_samples, samples_of
from metatokens.config.analysis import MlpProbe, ProbeConfig
from metatokens.tasks.encoding import EncodedInstance
from task_drawing import word_encoder
from task_models import task_lens

FAST = {"num_seeds": 2, "learning_rate": 0.02, "max_steps": 400}
LINEAR, MLP = ProbeConfig(**FAST), ProbeConfig(probe=MlpProbe(hidden_size=32), **FAST)


def classes_and_states(num_states, seed=0):
    """Return labels of four classes, and states that tell them with certainty."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, num_states, p=[0.4, 0.3, 0.2, 0.1])
    return labels, 3 * np.eye(4)[labels] @ rng.normal(size=(4, 6)) + 0.05 * rng.normal(size=(num_states, 6))


def circuit_inputs(circuit, samples, **probe):
    model = build_circuit(circuit)
    model.config.pad_token_id = BOS
    inputs = task_inputs(model, probe=ProbeConfig(**{"num_seeds": 1, "max_steps": 20, **probe}))
    inputs.provide(samples_of, samples)
    return inputs


def circuit_samples() -> list[Sample]:
    """Return each hand-made prompt with its answer behind it, many times."""
    rows = []
    for pair in hand_made_pairs() * 6:
        ids = np.append(pair.clean, pair.answer)
        row = EncodedInstance(ids, np.full_like(ids, -100), ((len(pair.clean), len(ids)),), len(pair.clean), (), 0.5)
        rows.append(Sample(row, int(pair.meta_positions[-1]), WRITER_AT + 1, QUESTION_AT))
    return rows


@pytest.mark.parametrize(("circuit", "rise"), [("meta", True), ("direct", False)])
def test_erasure_costs_the_answer_where_the_circuit_reads_it_from_meta_tokens(circuit, rise):
    inputs = circuit_inputs(circuit, circuit_samples())
    loss, lost = (
        value_of(name, inputs, layer=0, erased="answer") for name in ("erasure_loss", "answers_lost_to_erasure")
    )
    # with the answer erased the two logits are equal, and rounding decides which of them counts as the answer
    assert (loss > 0.5) == rise
    assert lost >= 0
    if not rise:
        assert abs(loss) < 1e-4
        assert lost == 0
    control = value_of("erasure_loss", inputs, layer=0, erased="shuffled")
    assert value_of("erasure_excess", inputs, layer=0) == pytest.approx(loss - control, abs=1e-9)


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
def test_erased_states_have_the_same_mean_for_every_answer_and_those_of_shuffled_labels_do_not(layers):
    lens = task_lens(num_hidden_layers=4)
    samples = draw_samples(lens, word_encoder().text_encoder, TASK, seed=0)
    labels = np.arange(len(samples)) % 3

    def spread_of_means(erased: np.ndarray | None) -> list[float]:
        erasers = [] if erased is None else fit_erasers(lens, samples, erased, layers)
        spreads = []
        for place, layer in enumerate(layers):
            states, rows = meta_states(lens, samples, layer, erasers[: place + 1])
            means = np.stack([states[labels[rows] == label].mean(0) for label in range(3)])
            spreads.append(float(np.abs(means - means.mean(0)).max()))
        return spreads

    shuffled = np.random.Generator(np.random.PCG64(1)).permutation(labels)
    for erased, control, before in zip(
        spread_of_means(labels), spread_of_means(shuffled), spread_of_means(None), strict=True
    ):
        assert erased < 1e-4 < 0.1 * before
        assert control > 0.3 * before


def test_what_erasure_took_is_what_a_probe_of_the_same_states_no_longer_finds():
    probe = {"learning_rate": 0.05, "max_steps": 3_000, "minimum_documents": 2}
    inputs = circuit_inputs("meta", circuit_samples() * 4, **probe)
    before, after = (
        value_of("erasure_information", inputs, layer=0, erased=erased) for erased in ("nothing", "answer")
    )
    assert before > 0.3  # one of the three meta-tokens holds it
    assert abs(after) < 0.05


def test_answers_that_cannot_be_erased_leave_erasure_out_with_the_reason():
    inputs = circuit_inputs("meta", circuit_samples()[::4])
    assert records_of("erasure_loss", inputs) == records_of("erasure_information", inputs) == []
    assert len(inputs.skipped) == 1
    assert "answers to erase" in inputs.skipped[0]


def erase(eraser: LinearEraser, states: np.ndarray) -> np.ndarray:
    return eraser.erase(torch.from_numpy(states)).numpy()


def test_erasure_leaves_every_label_the_same_mean_and_the_rest_alone():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=500)
    states = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + np.eye(3, 6)[labels] * 4
    eraser = fit_eraser(states, labels)
    erased = erase(eraser, states)
    means = np.stack([erased[labels == label].mean(axis=0) for label in range(3)])
    assert np.abs(means - states.mean(axis=0)).max() < 1e-10
    # two directions for three labels, and a second erasure changes nothing
    assert np.linalg.matrix_rank(states - erased, tol=1e-8) == 2
    np.testing.assert_allclose(erase(eraser, erased), erased, atol=1e-10)


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
    leace = ((erase(fit_eraser(states, labels), states) - states) ** 2).sum()
    assert leace <= ((projected - centered) ** 2).sum() * (1 + 1e-9)


def test_a_linear_probe_finds_nothing_after_erasure_and_a_hidden_layer_still_may():
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=1_500)
    # the mean and the spread tell the label
    states = rng.normal(size=(1_500, 3)) * np.where(labels, 0.2, 1.0)[:, None] + labels[:, None]
    erased = erase(fit_eraser(states, labels), states)
    before, after, hidden = (
        v_information(x, labels, np.arange(1_500), config=config, seed=0).pointwise.mean()
        for x, config in ((states, LINEAR), (erased, LINEAR), (erased, MLP))
    )
    assert before > 0.25
    assert after < 0.01
    assert hidden > 0.2


def test_states_that_never_move_in_a_direction_are_erased_without_dividing_by_0():
    labels, states = classes_and_states(200)
    wide = np.concatenate([states, np.zeros((200, 2)), states[:, :1]], axis=1)
    erased = erase(fit_eraser(wide, labels), wide)
    assert np.isfinite(erased).all()
    means = np.stack([erased[labels == label].mean(axis=0) for label in range(4)])
    assert np.abs(means - wide.mean(axis=0)).max() < 1e-7
