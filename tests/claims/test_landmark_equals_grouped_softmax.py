"""Landmark attention in one softmax is the grouped softmax of its paper, and reading all blocks is the full form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baseline_models import baseline_model
from metatokens.baselines.landmark import LandmarkForCausalLM, Landmarks, landmark_weights, read_best_blocks
from metatokens.baselines.landmark_reference import grouped_softmax_weights
from metatokens.model.masks import TokenLayout
from tiny_models import EOS, META, PAD, assert_close, attention_mask_of, gradients, tokens
from tolerances import tolerance

LAYOUTS = {
    "periodic": ("xxx_xxx_xxx_", "xxx_xxx_xxx_"),
    "ragged": ("xx_xxxx_x_xx", "xxxxx_xxxxxx"),
    "no_landmark": ("xxxxxxxxxxxx", "xxxxxx_xxxxx"),
    "empty_blocks": ("__xx__x_xx__", "x___xxxxx_xx"),
    "landmarks_only": ("____________", "xxxxxxxxxxxx"),
    "left_padding": ("...xx_xxx_xx", ".._xx_xx__xx"),
    "right_padding": ("xx_xx_xx....", "_xxxx_......"),
}


def landmarks_of(ids: Tensor, num_queries: int) -> Landmarks:
    model = baseline_model("landmark").model
    is_real = ids != PAD
    positions = torch.arange(ids.shape[1] - num_queries, ids.shape[1])[None]
    layout = TokenLayout(positions, attention_mask=None, documents=None, bias=None)
    return model._find_blocks((ids == META), is_real, num_queries, layout)


def both_forms(ids: Tensor, num_queries: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the weights, and the gradient of a weighing of them, of the one softmax and of the definition."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(ids), 2, num_queries, ids.shape[1])
    values = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    weighing = torch.randn(shape, generator=generator, dtype=torch.float64)
    results = []
    for form in (
        lambda scores: landmark_weights(scores, landmarks_of(ids, num_queries)),
        lambda scores: grouped_softmax_weights(scores, is_landmark=ids == META, is_real=ids != PAD),
    ):
        scores = values.clone().requires_grad_()
        weights = form(scores)
        (gradient,) = torch.autograd.grad((weights * weighing).sum() + 0 * scores.sum(), scores)
        results.append((weights.detach(), gradient))
    return results[0], results[1]


@pytest.mark.parametrize("num_queries", [12, 5, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_softmax_equals_the_grouped_softmax_to_1e_12_with_gradients(layout: str, num_queries: int) -> None:
    actual, expected = both_forms(tokens(*LAYOUTS[layout]), num_queries)
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(picture=st.text("x_", min_size=1, max_size=10), seed=st.integers(0, 100))
def test_one_softmax_equals_the_grouped_softmax_for_random_layouts(picture: str, seed: int) -> None:
    actual, expected = both_forms(tokens(picture, seed=seed), len(picture))
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-12)


def test_rows_sum_to_one_and_landmarks_have_no_weight() -> None:
    ids = tokens("xx_xxxx_x_xx")
    weights, _ = both_forms(ids, 12)[0]
    assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), 1e-12)
    assert (weights[..., ids[0] == META] == 0).all()
    assert (weights.triu(1) == 0).all()


def test_an_earlier_block_gets_what_its_landmark_wins_in_the_querys_group() -> None:
    # blocks of two tokens; all scores zero but the first landmark's, which is ln 2
    ids = tokens("xx_xx_x")
    scores = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    scores[..., 2] = math.log(2)
    weights = landmark_weights(scores, landmarks_of(ids, 7))[0, 0]
    # the group of the last token: itself 1, first landmark 2, second landmark 1
    expected = torch.tensor([2 / 8, 2 / 8, 0, 1 / 8, 1 / 8, 0, 2 / 8], dtype=torch.float64)
    assert_close(weights[6], expected, 1e-12)
    # a landmark's own block is open to it, itself is not
    assert_close(weights[2], torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0], dtype=torch.float64), 1e-12)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    ids = tokens("xx_xx_xx")
    scores = torch.zeros(1, 1, 8, 8)
    scores[..., 0], scores[..., 3] = -500.0, 500.0
    scores.requires_grad_()
    weights = landmark_weights(scores, landmarks_of(ids, 8))
    expected = grouped_softmax_weights(scores, is_landmark=ids == META, is_real=ids != PAD)
    assert_close(weights, expected, tolerance(torch.float32, 2 * 8))  # float64 would not overflow
    (gradient,) = torch.autograd.grad(weights[..., ::2].sum(), scores)
    assert gradient.isfinite().all()


def logits_and_gradients(model: LandmarkForCausalLM, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(ids, attention_mask=attention_mask_of(ids)).logits[ids != PAD]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights).sum().backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("encoding", ["rope", "alibi", "t5", "learned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_as_many_blocks_as_there_are_equals_the_full_form(layout: str, encoding: str) -> None:
    ids = tokens(*LAYOUTS[layout])
    model = baseline_model("landmark", position_encoding=encoding, dtype=torch.float64)
    expected, expected_gradients = logits_and_gradients(model, ids)
    read_best_blocks(model, 12)
    actual, actual_gradients = logits_and_gradients(model, ids)
    assert_close(actual, expected, 1e-10)
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1)
        assert_close(actual_gradients[name] / scale, gradient / scale, 1e-10)


@torch.no_grad()
def test_reading_the_best_block_alone_is_the_full_form_over_that_block_and_the_own() -> None:
    # one head, one layer: hide every other block from each query, and compare
    ids = tokens("xx_xxx_x_xxx_xx")
    model = baseline_model("landmark", num_hidden_layers=1, num_attention_heads=1, dtype=torch.float64)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(1, 15, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    read_best_blocks(model, 1)
    layout = TokenLayout(torch.arange(15)[None], attention_mask=None, documents=None, bias=None)
    best = model.model._find_blocks(ids == META, ids != PAD, 15, layout)
    output, _ = attention(hidden, None, best)
    full = landmarks_of(ids, 15)
    query, key, value = attention.project(hidden, None)
    scores = query @ key.transpose(-1, -2) * attention.scaling
    for position in range(15):
        own = int(full.block_of_key[0, position])
        ends = [column for column in range(15) if ids[0, column] == META and int(full.block_of_key[0, column]) < own]
        chosen = max(ends, key=lambda end: float(scores[0, 0, position, end])) if ends else -1
        block = int(full.block_of_key[0, chosen]) if ends else own
        kept = [c for c in range(position + 1) if int(full.block_of_key[0, c]) in (block, own)]
        weights = grouped_softmax_weights(
            scores[:, :, position : position + 1, kept], is_landmark=(ids == META)[:, kept], is_real=ids[:, kept] != PAD
        )
        expected = attention.o_proj((weights @ value[:, :, kept])[:, :, 0].flatten(1))
        assert_close(output[:, position], expected, 1e-10)


@torch.no_grad()
def test_reading_fewer_blocks_changes_what_the_tests_compare() -> None:
    ids = tokens("xx_xx_xx_xx_xxx")
    model = baseline_model("landmark")
    full = model(ids).logits
    read_best_blocks(model, 1)
    assert (model(ids).logits - full).abs().max() > 0.01
    # the first two blocks have nothing to choose from
    assert_close(model(ids).logits[:, :6], full[:, :6], 1e-5)


@torch.no_grad()
def test_queries_in_several_chunks_equal_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens("xx_xxx_x_xxx_xx", "xxxx_xxxxxx__xx")
    model = baseline_model("landmark", dtype=torch.float64)
    read_best_blocks(model, 2)
    expected = model(ids).logits
    monkeypatch.setattr("metatokens.baselines.landmark_retrieval.QUERY_CHUNK", 4)
    assert_close(model(ids).logits, expected, 1e-10)


@torch.no_grad()
def test_without_a_landmark_it_is_ordinary_attention() -> None:
    from tiny_models import tiny_model

    ids = tokens("xxxxxxxxx") % EOS
    landmark = baseline_model("landmark", dtype=torch.float64)
    plain = tiny_model(meta_attention_layers="none", dtype=torch.float64)
    assert_close(landmark(ids).logits, plain(ids).logits, 1e-10)


def test_training_reads_all_blocks_whatever_evaluation_does() -> None:
    ids = tokens("xx_xx_xx_xx_xxx")
    model = baseline_model("landmark").train()
    full = model(ids).logits
    read_best_blocks(model, 1)
    assert torch.equal(model(ids).logits, full)


@torch.no_grad()
def test_scores_stay_in_float32_under_autocast() -> None:
    ids = tokens("xx_xx_xx_xx_xxx")
    attention = baseline_model("landmark", dtype=torch.float32).model.layers[0].self_attn
    query, key, value = torch.randn(3, 1, 4, 15, 8, generator=torch.Generator().manual_seed(0))
    _, expected = attention.attend(query, key, value, landmarks_of(ids, 15))
    with torch.autocast("cpu", torch.bfloat16):
        _, weights = attention.attend(query, key, value, landmarks_of(ids, 15))
    assert torch.equal(weights, expected)
