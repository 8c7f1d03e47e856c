"""Layers with and without positions in turn (RNoPE, Yang et al. 2025), a value of `position_layers`."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from baseline_models import BASELINES, baseline_model
from cached_passes import CACHES, PIECES, feed, uncached
from dense_model import count_tokens, dense_logits, turn_at
from metatokens.evaluation.interventions import NoPositionEdges, intervene
from metatokens.lens import Lens
from metatokens.lens.activations import AttentionCall
from metatokens.model.reference import DenseReferenceForCausalLM
from pairwise import all_pairs
from tiny_models import BACKENDS, PAD, assert_close, attention_mask_of, gradients, tiny_model, tokens

LAYERS = {"even": [0], "last": [1]}
"""Layers with positions, of two."""
ROTATIONS = ("rope", "xpos", "fourier")
ROWS = ("..x_x_xx__xx", "_xx_xxxx_xx.", "xxxxx_xxxxxx")


def model_of(layers: str, encoding: str, **changes: Any) -> Any:
    named = layers if layers == "even" else LAYERS[layers]
    return tiny_model(position_encoding=encoding, position_layers=named, **changes)


@all_pairs(layers=LAYERS, encoding=ROTATIONS, backend=BACKENDS)
def test_logits_and_gradients_are_those_of_the_definition(layers: str, encoding: str, backend: str) -> None:
    ids, found = tokens(*ROWS), []
    for is_dense in (False, True):
        model = model_of(layers, encoding, attn_implementation=backend)
        turn = turn_at(model, count_tokens(ids))
        logits = (
            dense_logits(model, ids, turn_of=lambda layer, turn=turn: turn if layer in LAYERS[layers] else None)
            if is_dense
            else model(ids, attention_mask=attention_mask_of(ids)).logits
        )[ids != PAD]
        logits.square().sum().backward()
        found.append((logits.detach(), gradients(model)))
    (logits, of_model), (expected, of_definition) = found
    assert_close(logits, expected, 1e-8)
    assert of_model.keys() == of_definition.keys()
    for name, gradient in of_definition.items():
        assert_close(of_model[name], gradient, 1e-8)


@all_pairs(layers=LAYERS, encoding=ROTATIONS, pieces=PIECES, kind=CACHES, backend=BACKENDS)
@torch.no_grad()
def test_cached_logits_equal_uncached(layers: str, encoding: str, pieces: str, kind: str, backend: str) -> None:
    model, ids = model_of(layers, encoding, attn_implementation=backend), tokens(*ROWS)
    real = ids != PAD
    cached = feed(model, ids, CACHES[kind](model.config), PIECES[pieces])
    assert_close(cached[real], uncached(model, ids)[real], 1e-10)


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_the_dense_meta_attention_follows_its_block(layers: str) -> None:
    ids = tokens(*ROWS)
    packed = model_of(layers, "rope")
    dense = model_of(layers, "rope", model_class=DenseReferenceForCausalLM)
    dense.load_state_dict(packed.state_dict())
    assert_close(uncached(dense, ids)[ids != PAD], uncached(packed, ids)[ids != PAD], 1e-10)


@pytest.mark.parametrize("name", [*BASELINES, "memory"])
@torch.no_grad()
def test_without_positions_in_any_layer_every_attention_is_that_of_no_positions(name: str) -> None:
    def logits(**changes: Any) -> torch.Tensor:
        if name == "memory":
            return tiny_model(memory={"anchors": "meta", "window": 2, "num_sinks": 1}, **changes)(ids).logits
        return baseline_model(name, meta_attention_layers="all", **changes)(ids).logits

    ids = tokens("x_xxx_xx_xx_")
    without = logits(position_layers=[])
    assert torch.equal(without, logits(position_encoding="none"))
    assert (without - logits()).abs().max() > 0.01


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_attention_that_the_lens_observes_is_the_models_own(layers: str) -> None:
    model, ids = model_of(layers, "rope", attn_implementation="eager"), tokens("x_xxx_xx_xx_")
    expected = model(ids, output_attentions=True, output_meta_attentions=True)
    calls: list[AttentionCall] = []
    lens = Lens(model)
    with lens.observe(calls.append):
        lens(ids)
    assert len(calls) == 4
    for call in calls:
        of_branch = expected.attentions if call.branch == "attn" else expected.meta_attentions
        (block,) = call.score_blocks()
        weights = block.scores.masked_fill(~block.visible, -torch.inf).softmax(-1)
        assert_close(weights, of_branch[call.layer], 1e-10)


@torch.no_grad()
def test_cached_logits_without_position_edges_equal_uncached_where_the_first_layer_has_no_positions() -> None:
    model, ids = tiny_model(position_layers=[1]), tokens("x_xxx_xx_xx_")
    with intervene(model, NoPositionEdges()):
        cached = feed(model, ids, DynamicCache(config=model.config), PIECES["prompt_then_tokens"])
        assert_close(cached, uncached(model, ids), 1e-10)
    assert (cached - uncached(model, ids)).abs().max() > 0.01
