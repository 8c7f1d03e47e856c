"""What each component adds to a logit and how large a branch's addition is, against definitions and known circuits."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from analysis_inputs import records_of, task_inputs, text_inputs, value_of
from circuits import build_circuit, hand_made_pairs
from metatokens.analysis.inputs.pairs import pairs_of
from metatokens.analysis.representations.attribution import (
    attribute_logits,
    direct_logit_attribution,
    measure_branch_strengths,
    relative_length,
)
from metatokens.analysis.representations.logits import OutputHead
from metatokens.errors import UsageError
from metatokens.lens import Lens
from output_heads import gpt2, random_head, random_states
from tiny_models import ENCODINGS, META, tiny_model, tokens
from tolerances import tolerance

ROWS = ("xxx_xx_x", "x_xxxx_x")
ROUNDING = tolerance(torch.float32, 32 + 24)  # the head is float32: a logit adds the width, a softmax the vocabulary


# direct logit attribution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_attribution_sums_to_the_logit(bias: bool) -> None:
    components = {f"part {i}": random_states(5, 6, seed=i) * 10**i for i in range(3)}
    residual, head = sum(components.values()), random_head(bias=bias)
    ids = torch.tensor([0, 8, 3, 3, 1])
    shared = direct_logit_attribution(components, residual, head, ids)
    normed = torch.nn.functional.layer_norm(residual, (6,), head.gain, head.norm_bias, head.epsilon)
    expected = head.project(normed)[torch.arange(5), ids]
    torch.testing.assert_close(shared.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shared.values.sum(-1), shared.logits)
    assert shared.names[-1] == ("head_bias" if bias else "norm_bias")
    assert shared.values.shape == (5, len(shared.names))


def test_component_along_the_token_gets_the_credit_and_a_constant_one_none() -> None:
    token = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    head = OutputHead(torch.ones(4), torch.zeros(4), 0.0, token)
    components = {
        "along": 3 * token,
        "across": torch.tensor([[0.0, 0.0, 2.0, -2.0]]),
        "constant": torch.full((1, 4), 9.0),
    }
    shared = direct_logit_attribution(components, sum(components.values()), head, torch.tensor([0]))
    scale = math.sqrt((9 + 9 + 4 + 4) / 4)
    assert shared.values[0].tolist() == pytest.approx([6 / scale, 0, 0, 0], abs=1e-6)


def test_incomplete_components_are_refused() -> None:
    components = {"a": random_states(3, 6), "b": random_states(3, 6, seed=1)}
    with pytest.raises(UsageError, match="gap"):
        direct_logit_attribution(components, sum(components.values()) + 0.1, random_head(), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("encoding", [*ENCODINGS, "gpt2"])
def test_measured_attribution_sums_to_the_models_logit(encoding: str) -> None:
    model: Any = gpt2() if encoding == "gpt2" else tiny_model(position_encoding=encoding)
    lens = Lens(model)
    ids = tokens(*ROWS)
    at = torch.tensor([[False, True, True, True, False, True, True, True]]).expand(2, -1)
    ids_asked = torch.arange(12)
    shared = attribute_logits(lens, ids, at=at, token_ids=ids_asked)
    logits = lens(ids).logits[at]
    torch.testing.assert_close(shared.logits, logits[torch.arange(12), ids_asked], atol=1e-4, rtol=1e-4)
    branches = ["attn", "mlp"] if encoding == "gpt2" else ["attn", "meta", "mlp"]
    expected = [f"blocks.{layer}.{branch}_out" for layer in range(2) for branch in branches]
    assert list(shared.names) == ["embed", *expected, "norm_bias"]


def test_difference_of_two_tokens_is_the_difference_of_their_attributions() -> None:
    lens = Lens(tiny_model())
    ids, at = tokens(*ROWS), torch.ones(2, 8, dtype=torch.bool)
    answers, foils = torch.arange(16), torch.arange(16).flip(0)
    answer, foil = (attribute_logits(lens, ids, at=at, token_ids=asked) for asked in (answers, foils))
    both = attribute_logits(lens, ids, at=at, token_ids=answers, foil_ids=foils)
    torch.testing.assert_close(both.values, answer.values - foil.values, atol=ROUNDING, rtol=ROUNDING)


def test_batch_without_meta_tokens_has_no_meta_component() -> None:
    lens = Lens(tiny_model())
    ids = tokens("xxxxx")
    shared = attribute_logits(lens, ids, at=torch.ones(1, 5, dtype=torch.bool), token_ids=torch.arange(5))
    assert not any("meta" in name for name in shared.names)
    torch.testing.assert_close(
        shared.logits, lens(ids).logits[0, torch.arange(5), torch.arange(5)], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("circuit", ["meta", "direct"])
def test_the_attention_that_writes_the_answer_has_the_whole_logit_difference(circuit: Any) -> None:
    inputs, pairs = task_inputs(build_circuit(circuit)), hand_made_pairs()
    inputs.provide(pairs_of, pairs)
    total = sum(record.value for record in records_of("attribution", inputs))
    logits = [inputs.lens(torch.from_numpy(pair.clean[None])).logits[0, -1] for pair in pairs]
    differences = [float(row[pair.answer] - row[pair.foil]) for row, pair in zip(logits, pairs, strict=True)]
    assert total == pytest.approx(np.mean(differences), abs=1e-4)
    assert value_of("attribution", inputs, component="attention", layer=1) == pytest.approx(total, rel=1e-3)
    assert value_of("attribution", inputs, component="meta-attention", layer=0) == pytest.approx(0, abs=1e-4)


def test_shares_of_text_tokens_add_up_to_their_logits_over_the_mean() -> None:
    inputs = text_inputs()
    expected = []
    for one in inputs.subject.documents:
        logits = inputs.lens(one.input_ids).logits[0, :-1]
        over_mean = logits.gather(1, one.input_ids[0, 1:, None])[:, 0] - logits.mean(-1)
        behind = (one.is_meta.long().cumsum(1) > 0)[0, 1:] & ~one.is_meta[0, 1:]
        expected.append(float(over_mean[behind].mean()))
    total = sum(record.value for record in records_of("attribution", inputs))
    assert total == pytest.approx(np.mean(expected), abs=1e-4)


# branch strength -------------------------------------------------------------------------------------------------


def test_strength_is_the_ratio_of_norms() -> None:
    strength = relative_length(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 10.0], [0.0, 0.0]]))
    assert strength[0] == 0.5
    assert strength[1].isnan()


def test_measured_strength_is_that_of_each_branch_at_the_selected_tokens() -> None:
    lens = Lens(tiny_model(meta_attention_layers=[1]))
    ids = tokens(*ROWS)
    measured = measure_branch_strengths(lens, ids, at=ids == META)
    with lens.capture(["blocks.1.hook_meta_out", "blocks.1.hook_resid_mid"]) as captured:
        lens(ids)
    ratio = captured["blocks.1.hook_meta_out"].norm(dim=-1) / captured["blocks.1.hook_resid_mid"].norm(dim=-1)
    assert measured["meta-attention"][1] == pytest.approx(float(ratio[ids == META].mean()), rel=ROUNDING)
    assert np.isnan(measured["meta-attention"][0])
    assert (measured["attention"] > 0).all()
    assert (measured["feed-forward"] > 0).all()


def test_strength_of_a_branch_that_adds_nothing_is_zero() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].meta_attn.o_proj.weight.zero_()
        model.model.layers[1].meta_attn.o_proj.bias.zero_()
    inputs = text_inputs(model)
    assert value_of("branch_strength", inputs, branch="meta-attention", layer=1) == 0
    assert value_of("branch_strength", inputs, branch="meta-attention", layer=0) > 0


def test_documents_without_meta_tokens_have_no_branch_strength_and_say_so() -> None:
    inputs = text_inputs()
    bare = [replace(one, is_meta=torch.zeros_like(one.is_meta)) for one in inputs.subject.documents]
    inputs.subject = replace(inputs.subject, documents=bare)
    assert records_of("branch_strength", inputs) == []
    assert inputs.skipped == [
        "output: documents: expected a meta-token in one, found none; choose documents that have meta-tokens"
    ]
