"""The logit lens, affine maps and output statistics against slow definitions, and what is recorded of them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from analysis_inputs import document, records_of, text_inputs, value_of
from metatokens.analysis.representations.logits import (
    OutputHead,
    fit_affine_maps,
    logit_lens,
    measure_logit_lens,
    measure_outputs,
    output_statistics,
    preceding_text,
)
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import ZeroEmbedding, intervene
from metatokens.lens import Lens
from metatokens.lens.residuals import capture_residuals
from output_heads import gpt2, random_head, random_states
from tiny_models import META, tiny_model, tokens
from tolerances import tolerance

ROWS = ("xxx_xx_x", "x_xxxx_x")
ROUNDING = tolerance(torch.float32, 32 + 24)  # the head is float32: a logit adds the width, a softmax the vocabulary


def head_that_passes(width: int) -> OutputHead:
    """Return a head whose logits are the normed state itself."""
    return OutputHead(torch.ones(width), torch.zeros(width), 0.0, torch.eye(width))


# head and logit lens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [tiny_model(), tiny_model(tie_word_embeddings=False), gpt2()])
def test_head_gives_the_models_own_distribution(model: PreTrainedModel) -> None:
    lens = Lens(model)
    ids = tokens(*ROWS)
    last = capture_residuals(lens, ids)[-1]
    expected = lens(ids).logits.log_softmax(-1)
    torch.testing.assert_close(OutputHead.of(lens).log_probabilities(last).double(), expected, atol=1e-5, rtol=1e-5)


def test_preceding_text_counts_text_tokens_alone() -> None:
    ids = torch.tensor([[5, META, 6, 7, META, 8]])
    found = preceding_text(ids, ids != META, (1, 2, 4))
    none = -100
    assert found[0].tolist() == [
        [none, none, none],
        [5, none, none],
        [5, none, none],
        [6, 5, none],
        [7, 6, none],
        [7, 6, none],
    ]


def test_preceding_text_leaves_out_what_is_no_text() -> None:
    ids = torch.tensor([[9, 9, 3, 4]])
    text = torch.tensor([[False, False, True, True]])
    assert preceding_text(ids, text, (1, 2))[0].tolist() == [[-100, -100], [-100, -100], [-100, -100], [3, -100]]


def test_logit_lens_equals_the_definition() -> None:
    states, head = [random_states(5, 6, seed=s) for s in (7, 8, 9)], random_head(bias=True)
    ids = torch.tensor([[0, 3], [8, -100], [2, 2], [5, 1], [7, 4]])
    read = logit_lens(states, head, ids)

    def distribution(state: Tensor) -> list[float]:
        normed = torch.nn.functional.layer_norm(state, (6,), head.gain, head.norm_bias, head.epsilon)
        logits = [float(normed @ row + bias) for row, bias in zip(head.weight, head.bias, strict=True)]
        total = sum(map(math.exp, logits))
        return [math.exp(logit) / total for logit in logits]

    for layer in range(3):
        for position in range(5):
            p, final = distribution(states[layer][position]), distribution(states[-1][position])
            kl = sum(f * math.log(f / q) for f, q in zip(final, p, strict=True))
            assert float(read.divergence[layer, position]) == pytest.approx(kl, abs=1e-5)
            for index, token in enumerate(ids[position].tolist()):
                rank, log_p = (float(values[layer, position, index]) for values in (read.rank, read.log_probability))
                if token < 0:
                    assert math.isnan(rank)
                    assert math.isnan(log_p)
                else:
                    assert rank == 1 + sum(q > p[token] for q in p)
                    assert log_p == pytest.approx(math.log(p[token]), abs=1e-5)
    assert (read.divergence[-1] == 0).all()


def test_token_among_equals_ranks_in_the_middle() -> None:
    states = [torch.tensor([[3.0, 0.0, 0.0, 0.0, -3.0]])]
    read = logit_lens(states, head_that_passes(5), torch.tensor([[0, 1, 4]]))
    assert read.rank[0, 0].tolist() == [1, 3, 5]


def test_lens_in_chunks_equals_the_lens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    states, head, ids = (
        [random_states(11, 6), random_states(11, 6, seed=5)],
        random_head(),
        torch.arange(11)[:, None] % 9,
    )
    whole = logit_lens(states, head, ids), output_statistics(states[0], head, ids[:, 0])
    monkeypatch.setattr("metatokens.analysis.representations.logits._LOGITS_AT_A_TIME", 9 * 4)
    pieces = logit_lens(states, head, ids), output_statistics(states[0], head, ids[:, 0])
    for values, of_pieces in zip(whole[0], pieces[0], strict=True):
        torch.testing.assert_close(values, of_pieces)
    for name, values in whole[1].items():
        torch.testing.assert_close(values, pieces[1][name])


def test_measured_lens_is_that_of_the_selected_positions() -> None:
    lens, head = Lens(tiny_model()), OutputHead.of(Lens(tiny_model()))
    ids = tokens("xxx_xx_x", "x_xxxx_x")
    measured = measure_logit_lens(lens, ids, at=ids == META, distances=(1, 4))
    states = capture_residuals(lens, ids)
    places = [(0, 3), (0, 6), (1, 1), (1, 6)]
    for layer in range(3):
        log_p = head.log_probabilities(states[layer])
        expected = [log_p[row, place, ids[row, place - 1]] for row, place in places]
        found = measured.log_probability[layer, :, 0]
        assert found.tolist() == pytest.approx([float(one) for one in expected], rel=ROUNDING)
        fourth = float(log_p[0, 6, ids[0, 1]])  # the first meta-token of a row has fewer than four tokens before it
        assert float(measured.log_probability[layer, 1, 1]) == pytest.approx(fourth, rel=ROUNDING)
    assert measured.log_probability[:, [0, 2], 1].isnan().all()
    assert (measured.divergence[-1] == 0).all()
    assert float(measured.divergence[0].min()) > 0.01
    assert float(measured.rank.nan_to_num(1).min()) >= 1


def test_affine_maps_find_the_final_state_where_it_is_an_affine_function_of_an_earlier_one() -> None:
    # without attention and feed-forward a block adds its biases alone
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj, layer.meta_attn.o_proj):
                module.weight.zero_()
    lens, shown = Lens(model), document(0)
    maps = fit_affine_maps(lens, [document(100 + number).input_ids for number in range(6)])
    states = capture_residuals(lens, shown.input_ids)
    assert len(maps) == len(states) - 1
    for to_final, layer_states in zip(maps, states[:-1], strict=True):
        text = ~shown.is_meta[0]
        error = (to_final(layer_states[0]) - states[-1][0])[text].norm() / states[-1][0][text].norm()
        assert float(error) < 0.02


def test_affine_maps_of_a_single_document_are_refused() -> None:
    with pytest.raises(UsageError, match="affine maps"):
        fit_affine_maps(Lens(tiny_model()), [document(0).input_ids])


def test_a_mapped_state_predicts_more_like_the_final_one_than_the_state_itself() -> None:
    lens, shown = Lens(tiny_model()), document(0)
    maps = fit_affine_maps(lens, [document(100 + number).input_ids for number in range(6)])
    plain = measure_logit_lens(lens, shown.input_ids, at=~shown.is_meta).divergence.mean(1)
    mapped = measure_logit_lens(lens, shown.input_ids, at=~shown.is_meta, maps=maps).divergence.mean(1)
    assert (mapped[:-1] < plain[:-1]).all()
    assert float(mapped[-1]) == float(plain[-1]) == 0


def test_logit_lenses_are_recorded_by_state_layer_and_distance() -> None:
    inputs = text_inputs()
    per_document = [
        (1 / measure_logit_lens(inputs.lens, one.input_ids, at=one.is_meta).rank[1, :, 0]).nanmean()
        for one in inputs.subject.documents
    ]
    value = value_of("reciprocal_rank", inputs, state="meta-token", read="state", layer=1, distance=1)
    assert value == pytest.approx(np.nanmean(per_document))
    divergences = records_of("divergence", inputs)
    assert {one.at["state"] for one in divergences} == {"meta-token", "ordinary token"}
    assert {one.at["read"] for one in divergences} == {"state", "mapped state"}


# output statistics -----------------------------------------------------------------------------------------------


def test_statistics_of_a_known_distribution() -> None:
    head = OutputHead(torch.ones(4), torch.zeros(4), 0.0, torch.eye(4))
    logits = torch.tensor([[math.log(1 / 2), math.log(1 / 4), math.log(1 / 8), math.log(1 / 8)], [1.0, 1.0, 1.0, 1.0]])
    stats = output_statistics(logits + 3, head, torch.tensor([1, -100]))
    assert stats["max_log_probability"].tolist() == pytest.approx([math.log(0.5), math.log(0.25)])
    assert stats["entropy"].tolist() == pytest.approx([1.75 * math.log(2), math.log(4)])
    assert stats["max_over_mean"].tolist() == pytest.approx([(2 + 3 + 3 - 3) / 4 * math.log(2), 0], abs=1e-6)
    assert float(stats["cross_entropy"][0]) == pytest.approx(math.log(4))
    assert stats["cross_entropy"][1].isnan()


def test_shift_of_all_logits_changes_no_statistic() -> None:
    states, head, targets = random_states(6, 6), random_head(bias=True), torch.arange(6)
    assert head.bias is not None
    shifted = OutputHead(head.gain, head.norm_bias, head.epsilon, head.weight, head.bias + 5)
    still, moved = (output_statistics(states, one, targets) for one in (head, shifted))
    assert set(moved) == {"max_over_mean", "max_log_probability", "entropy", "cross_entropy"}
    for name, values in moved.items():
        torch.testing.assert_close(values, still[name], atol=1e-5, rtol=0)


def test_measured_cross_entropy_is_the_models_loss() -> None:
    for policy in ("skip", "retarget"):
        model = tiny_model(loss_policy=policy)
        ids = tokens("xxx_xx_x", "x_xxxx_x")
        stats = measure_outputs(Lens(model), ids, at=torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        assert float(stats["cross_entropy"].nanmean()) == pytest.approx(float(loss), abs=1e-5)


def test_changes_of_the_output_are_those_between_two_runs() -> None:
    inputs = text_inputs()
    lens, drops = inputs.lens, []
    for one in inputs.subject.documents:
        at = (one.is_meta.long().cumsum(1) > 0) & ~one.is_meta
        full = measure_outputs(lens, one.input_ids, at=at)["cross_entropy"]
        with intervene(lens.model, [ZeroEmbedding()]):
            without = measure_outputs(lens, one.input_ids, at=at)["cross_entropy"]
        drops.append(float((without - full).nanmean()))
    (record,) = records_of("loss_saved", inputs, place="text behind")
    assert record.value == pytest.approx(np.mean(drops), abs=1e-6)  # losses of a few nats in float32
    assert record.p_value is not None
    assert math.isfinite(value_of("max_logit_boost", inputs, place="meta-tokens"))
