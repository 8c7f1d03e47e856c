"""What is measured of a graft, beside slow definitions on the plain model."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from analysis_inputs import records_of, value_of
from grafted_models import (
    CONFIG,
    LENGTH,
    TOLERANCES,
    additive,
    by_definition,
    every_nth,
    ids,
    is_followed,
    largest,
    layout,
    make,
    plain,
    seen_with_anchors,
    trained,
)
from metatokens.analysis.graft.anchor_attention import KINDS, observed
from metatokens.analysis.graft.losses import losses_by_intervention
from metatokens.analysis.inputs.documents import Document
from metatokens.analysis.inputs.subject import Inputs, Subject
from metatokens.config.analysis import AnalysisConfig, GraftSubject
from metatokens.errors import UsageError
from metatokens.graft import GraftConfig, graft
from metatokens.graft.interventions import INTERVENTIONS
from task_drawing import word_tokenizer

NUM_DOCUMENTS = 8
FIRST = CONFIG.window + CONFIG.num_sinks  # the first token whose window has left some text behind
ROUNDING = 2e-6  # transformers computes a loss in float32
EVERY = replace(CONFIG, anchors="every")


def inputs_of(model: Any) -> Inputs:
    config = AnalysisConfig(subject=GraftSubject(source="-", window=LENGTH), documents=NUM_DOCUMENTS)
    texts = [ids(seed) for seed in range(NUM_DOCUMENTS)]
    documents = [Document(str(seed), text, torch.zeros_like(text).bool()) for seed, text in enumerate(texts)]
    return Inputs(model, word_tokenizer(), config, Subject(documents, [], [], []))


def loss_of(logits: Tensor, text: Tensor) -> float:
    """Return the mean loss of the tokens that are predicted from the first place on that has lost some text."""
    terms = [cross_entropy(logits[0, at], text[0, at + 1]) for at in range(FIRST, LENGTH - 1)]
    return float(sum(terms) / len(terms))


@pytest.mark.parametrize("config", [CONFIG, EVERY], ids=["meta", "every"])
@torch.no_grad()
def test_what_is_taken_from_the_anchors_is_what_a_plain_model_then_lacks(config: GraftConfig) -> None:
    model, base = trained("llama", config), plain("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = losses_by_intervention(inputs_of(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.metatokens_graft.config == config
    without_row = copy.deepcopy(model)
    without_row.metatokens_graft.row.zero_()
    all_before, kept = torch.ones(LENGTH, LENGTH).tril().bool(), every_nth(config, LENGTH)
    near = kept.clone()
    for query in range(LENGTH):
        for key in range(config.num_sinks, query - config.window + 1):
            near[query, key] = False
    assert near.sum() < kept.sum() < all_before.sum()
    for number in range(2):
        text = ids(number)
        expected = {
            "none": by_definition(base, model, text, config),
            "row zeroed": by_definition(base, without_row, text, config),
            "untrained": base(text, attention_mask=additive(kept)).logits,
            "path cut": base(text, attention_mask=additive(near)).logits,
            "switched off": base(text).logits,
        }
        assert losses.keys() == expected.keys() == INTERVENTIONS.keys()
        for name, logits in expected.items():
            assert losses[name][number] == pytest.approx(loss_of(logits, text), abs=ROUNDING), name
    inputs = inputs_of(model)
    assert value_of("text_perplexity", inputs, intervention="path cut") == pytest.approx(
        math.exp(losses["path cut"].mean())
    )
    assert value_of("anchor_gain", inputs, intervention="untrained") == pytest.approx(
        (losses["untrained"] - losses["none"]).mean()
    )
    assert not records_of("anchor_gain", inputs, intervention="none")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo", "gpt_neox"])
@torch.no_grad()
def test_the_readout_applies_norm_and_head_to_each_layer_of_the_text(family: str) -> None:
    model, base = trained(family), plain(family)
    inputs = inputs_of(model)
    losses, tolerance = losses_by_intervention(inputs), TOLERANCES.get(family, ROUNDING)
    blocks = model.metatokens_graft.family.blocks_of(base.base_model)
    norm = [module for module in base.base_model.children() if getattr(module, "weight", None) is not None][-1]
    caught: list[Tensor] = []
    handle = blocks[0].register_forward_hook(
        lambda *given: caught.append(given[2][0] if isinstance(given[2], tuple) else given[2])
    )
    expected = []
    for number in range(NUM_DOCUMENTS):
        base(ids(number))
        expected.append(loss_of(base.get_output_embeddings()(norm(caught.pop())), ids(number)))
    handle.remove()
    assert value_of("readout_loss", inputs, layer=1, intervention="switched off") == pytest.approx(
        np.mean(expected), abs=tolerance
    )
    for name in ("none", "path cut", "switched off"):
        last = value_of("readout_loss", inputs, layer=len(blocks), intervention=name)
        assert last == pytest.approx(losses[name].mean(), abs=tolerance), name
    first = [value_of("readout_loss", inputs, layer=0, intervention=name) for name in ("none", "switched off")]
    assert first[0] == pytest.approx(first[1], abs=tolerance)  # no token has seen another


@torch.no_grad()
def test_attention_is_that_of_text_to_what_it_sees() -> None:
    """An untrained anchor is a second copy of the token before it, so a plain model can read all columns."""
    model = graft(make("llama"), CONFIG)
    found = records_of("anchor_attention", inputs_of(model))
    base = make("llama")
    base.config._attn_implementation = "eager"
    columns = layout(CONFIG, LENGTH)
    places = torch.tensor([[place for place, _ in columns]])
    expected = torch.zeros(NUM_DOCUMENTS, 2, len(KINDS), 7, dtype=torch.float64)
    for number in range(NUM_DOCUMENTS):
        output = base(
            inputs_embeds=base.get_input_embeddings()(ids(number)[:, places[0]]),
            attention_mask=additive(seen_with_anchors(CONFIG, LENGTH)),
            position_ids=places,
            output_attentions=True,
        )
        for layer, weights in enumerate(output.attentions):
            queries = [n for n, (at, is_anchor) in enumerate(columns) if not is_anchor and at >= FIRST]
            for query in queries:
                for key, (place, is_anchor) in enumerate(columns):
                    distance = columns[query][0] - place
                    if distance >= 0:
                        kind = "anchors" if is_anchor else "sinks" if place < CONFIG.num_sinks else "window"
                        mass = weights[0, :, query, key].mean() / len(queries)
                        expected[number, layer, KINDS.index(kind), distance.bit_length()] += mass
    assert len(found) == expected[0].numel()
    for one in found:
        place = (one.at["layer"], KINDS.index(str(one.at["to"])), int(one.at["distance"]).bit_length())
        assert one.value == pytest.approx(float(expected.mean(0)[place]), abs=1e-6), one.at
    assert sum(one.value or 0 for one in found if one.at["layer"] == 1) == pytest.approx(1)
    # by the definition, no anchor is nearer than the window, and the first one is as far as any
    assert is_followed(2, CONFIG)
    anchors = [one for one in found if one.at["to"] == "anchors" and one.value]
    assert {one.at["distance"] for one in anchors} == {4, 8, 16, 32}


@torch.no_grad()
def test_looking_at_attention_changes_nothing() -> None:
    for family in ("llama", "gpt2", "gpt_neox"):
        model, seen = trained(family), []
        logits = model(ids(), use_cache=False).logits
        with observed(model, seen.append):
            assert largest(model(ids(), use_cache=False).logits - logits) < 1e-5  # softmax in float32
        assert len(seen) == 2
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(ids(), use_cache=False).logits, logits)


@pytest.mark.parametrize(("family", "config"), [("gpt_neo", CONFIG), ("llama", replace(CONFIG, positions="compact"))])
def test_attention_that_cannot_be_seen_is_left_out_in_one_line(family: str, config: GraftConfig) -> None:
    inputs = inputs_of(trained(family, config))
    assert records_of("anchor_attention", inputs) == []
    (reason,) = inputs.skipped
    assert reason.startswith("graft: attention to anchors: expected")
    assert records_of("anchor_gain", inputs)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training mode.*call model\.eval"):
        inputs_of(trained("llama").train())


@pytest.mark.parametrize("window", [CONFIG.window + CONFIG.num_sinks + CONFIG.every, 2049])
def test_a_window_in_which_no_anchor_is_seen_or_that_the_model_lacks_is_refused(window: int) -> None:
    config = AnalysisConfig(subject=GraftSubject.model_construct(source="-", window=window), documents=NUM_DOCUMENTS)
    with pytest.raises(UsageError, match=r"subject\.window: expected more than 11.*at most 2048.*found"):
        Inputs(trained("llama"), word_tokenizer(), config)
