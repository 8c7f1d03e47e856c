"""The logit lens, output statistics, direct attribution and branch strength, against slow definitions and sums."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from metatokens.analysis.representations.logits import (
    OutputHead,
    attribute_logits,
    branch_strength,
    direct_logit_attribution,
    logit_lens,
    measure_branch_strengths,
    measure_logit_lens,
    measure_outputs,
    output_statistics,
    preceding_text,
)
from metatokens.errors import UsageError
from metatokens.lens import Lens, edits
from metatokens.lens.residuals import capture_residuals
from tiny_models import ENCODINGS, META, attention_mask_of, randomize, tiny_model, tokens
from tolerances import tolerance

ROWS = ("xxx_xx_x", "x_xxxx_x")
ROUNDING = tolerance(torch.float32, 32 + 24)  # the head is float32: a logit adds the width, a softmax the vocabulary


def random_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_head(vocabulary: int = 9, width: int = 6, *, bias: bool = False) -> OutputHead:
    gain, norm_bias = 1 + 0.3 * random_states(width, seed=1), random_states(width, seed=2)
    head_bias = random_states(vocabulary, seed=4) if bias else None
    return OutputHead(gain, norm_bias, 1e-5, random_states(vocabulary, width, seed=3), head_bias)


def head_that_passes(width: int) -> OutputHead:
    """Return a head whose logits are the normed state itself."""
    return OutputHead(torch.ones(width), torch.zeros(width), 0.0, torch.eye(width))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model: GPT2LMHeadModel = randomize(GPT2LMHeadModel(config)).double().eval()
    return model


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


def test_preceding_text_leaves_out_padding_on_the_left() -> None:
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
    for one, other in zip(whole, pieces, strict=True):
        for values, other_values in zip(vars(one).values(), vars(other).values(), strict=True):
            torch.testing.assert_close(values, other_values)


def test_measured_lens_is_that_of_the_selected_positions() -> None:
    lens = Lens(tiny_model())
    ids = tokens("xxx_xx_x", "x_xxxx..")
    mask = attention_mask_of(ids)
    measured = measure_logit_lens(lens, ids, at=ids == META, documents=[6, 2], distances=(1, 4), attention_mask=mask)
    states = capture_residuals(lens, ids, attention_mask=mask)
    head = OutputHead.of(lens)
    assert measured.log_probability.documents.tolist() == [2, 6]
    np.testing.assert_array_equal(measured.log_probability.counts[:, 0], [[1, 0], [2, 1]])
    for layer in range(3):
        log_p = head.log_probabilities(states[layer])
        expected = float(log_p[0, 3, ids[0, 2]] + log_p[0, 6, ids[0, 5]]) / 2
        assert measured.log_probability.means[1, layer, 0] == pytest.approx(expected, rel=ROUNDING)
        assert measured.log_probability.means[1, layer, 1] == pytest.approx(float(log_p[0, 6, ids[0, 1]]), rel=ROUNDING)
    np.testing.assert_array_equal(measured.divergence.means[:, -1], 0)
    assert measured.divergence.means[:, 0].min() > 0.01
    assert measured.reciprocal_rank.means[1].max() <= 1


# output statistics -----------------------------------------------------------------------------------------------


def test_statistics_of_a_known_distribution() -> None:
    head = OutputHead(torch.ones(4), torch.zeros(4), 0.0, torch.eye(4))
    logits = torch.tensor([[math.log(1 / 2), math.log(1 / 4), math.log(1 / 8), math.log(1 / 8)], [1.0, 1.0, 1.0, 1.0]])
    stats = output_statistics(logits + 3, head, torch.tensor([1, -100]))
    assert stats.max_log_probability.tolist() == pytest.approx([math.log(0.5), math.log(0.25)])
    assert stats.entropy.tolist() == pytest.approx([1.75 * math.log(2), math.log(4)])
    assert stats.max_over_mean.tolist() == pytest.approx([(2 + 3 + 3 - 3) / 4 * math.log(2), 0], abs=1e-6)
    assert float(stats.cross_entropy[0]) == pytest.approx(math.log(4))
    assert stats.cross_entropy[1].isnan()


def test_shift_of_all_logits_changes_no_statistic() -> None:
    states, head, targets = random_states(6, 6), random_head(bias=True), torch.arange(6)
    assert head.bias is not None
    shifted = OutputHead(head.gain, head.norm_bias, head.epsilon, head.weight, head.bias + 5)
    differences = output_statistics(states, shifted, targets).minus(output_statistics(states, head, targets), range(6))
    assert set(differences) == {"max_over_mean", "max_log_probability", "entropy", "cross_entropy"}
    for difference in differences.values():
        np.testing.assert_allclose(difference.means, 0, atol=1e-5)


def test_measured_cross_entropy_is_the_models_loss() -> None:
    for policy in ("skip", "retarget"):
        model = tiny_model(loss_policy=policy)
        ids = tokens("xxx_xx_x", "x_xxxx..")
        mask = attention_mask_of(ids)
        stats = measure_outputs(Lens(model), ids, at=mask.bool(), attention_mask=mask)
        with torch.no_grad():
            loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        assert float(stats.cross_entropy.nanmean()) == pytest.approx(float(loss), abs=1e-5)


def test_difference_between_two_runs_comes_by_document() -> None:
    lens = Lens(tiny_model())
    ids = tokens(*ROWS)
    at = ids != META
    documents = torch.tensor([3, 1])[at.nonzero()[:, 0]]
    whole = measure_outputs(lens, ids, at=at)
    with lens.edit(edits.scale("blocks.*.hook_meta_out", 0.0)):
        ablated = measure_outputs(lens, ids, at=at)
    entropy = whole.minus(ablated, documents)["entropy"]
    log_p = lens(ids).logits.log_softmax(-1)
    with lens.edit(edits.scale("blocks.*.hook_meta_out", 0.0)):
        other = lens(ids).logits.log_softmax(-1)
    per_token = -(log_p.exp() * log_p).sum(-1) + (other.exp() * other).sum(-1)
    expected = [float(per_token[row][at[row]].mean()) for row in (1, 0)]
    assert entropy.documents.tolist() == [1, 3]
    assert entropy.means.tolist() == pytest.approx(expected, abs=1e-5)
    assert np.abs(entropy.means).min() > 1e-4
    # before the first meta-token nothing changes
    first = at & ((ids == META).cumsum(1) == 0)
    assert float((per_token[first]).abs().max()) < 1e-6


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


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("encoding", [*ENCODINGS, "gpt2"])
def test_measured_attribution_sums_to_the_models_logit(encoding: str, per_head: bool) -> None:
    model: Any = gpt2() if encoding == "gpt2" else tiny_model(position_encoding=encoding)
    lens = Lens(model)
    ids = tokens(*ROWS)
    at = torch.tensor([[False, True, True, True, False, True, True, True]]).expand(2, -1)
    ids_asked = torch.arange(12)
    shared = attribute_logits(lens, ids, at=at, token_ids=ids_asked, per_head=per_head)
    logits = lens(ids).logits[at]
    torch.testing.assert_close(shared.logits, logits[torch.arange(12), ids_asked], atol=1e-4, rtol=1e-4)
    branches = ["attn", "mlp"] if encoding == "gpt2" else ["attn", "meta", "mlp"]
    if not per_head:
        expected = [f"blocks.{layer}.{branch}_out" for layer in range(2) for branch in branches]
        assert list(shared.names) == ["embed", *expected, "norm_bias"]
    else:
        assert sum(".head." in name for name in shared.names) == 2 * 4 * (len(branches) - 1)


def test_difference_of_two_tokens_is_the_difference_of_their_attributions() -> None:
    lens = Lens(tiny_model())
    ids, at = tokens(*ROWS), torch.ones(2, 8, dtype=torch.bool)
    answers, foils = torch.arange(16), torch.arange(16).flip(0)
    answer, foil = (attribute_logits(lens, ids, at=at, token_ids=asked) for asked in (answers, foils))
    both = attribute_logits(lens, ids, at=at, token_ids=answers, foil_ids=foils)
    torch.testing.assert_close(both.values, answer.values - foil.values, atol=ROUNDING, rtol=ROUNDING)


def test_heads_and_bias_add_up_to_their_branch_and_meta_heads_are_zero_at_text() -> None:
    lens = Lens(tiny_model())
    ids = tokens("xxx_xx_x", "x_xxxxxx")  # rows of unequal numbers of meta-tokens
    at, asked = torch.ones(2, 8, dtype=torch.bool), torch.arange(16)
    whole = attribute_logits(lens, ids, at=at, token_ids=asked)
    shared = attribute_logits(lens, ids, at=at, token_ids=asked, per_head=True)
    for layer in range(2):
        for branch, out in (("attn", "attn_out"), ("meta_attn", "meta_out")):
            names = [name for name in shared.names if name.startswith(f"blocks.{layer}.{branch}.")]
            assert len(names) == 5
            parts = shared.values[:, [shared.names.index(name) for name in names]]
            total = whole.values[:, whole.names.index(f"blocks.{layer}.{out}")]
            torch.testing.assert_close(parts.sum(-1), total, atol=ROUNDING, rtol=ROUNDING)
            if branch == "meta_attn":
                is_text = (ids != META).flatten()
                assert (parts[is_text] == 0).all()
                assert (parts[~is_text][:, :4].abs() > 0).any(0).all()


def test_batch_without_meta_tokens_has_no_meta_component() -> None:
    lens = Lens(tiny_model())
    ids = tokens("xxxxx")
    shared = attribute_logits(
        lens, ids, at=torch.ones(1, 5, dtype=torch.bool), token_ids=torch.arange(5), per_head=True
    )
    assert not any("meta" in name for name in shared.names)
    torch.testing.assert_close(
        shared.logits, lens(ids).logits[0, torch.arange(5), torch.arange(5)], atol=1e-4, rtol=1e-4
    )


# branch strength -------------------------------------------------------------------------------------------------


def test_strength_is_the_ratio_of_norms() -> None:
    strength = branch_strength(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 10.0], [0.0, 0.0]]))
    assert strength[0] == 0.5
    assert strength[1].isnan()


def test_measured_strength_is_that_of_each_branch_at_the_selected_tokens() -> None:
    lens = Lens(tiny_model(meta_attention_layers=[1]))
    ids = tokens(*ROWS)
    measured = measure_branch_strengths(lens, ids, at=ids == META, documents=[0, 1])
    with lens.capture(["blocks.1.hook_meta_out", "blocks.1.hook_resid_mid"]) as captured:
        lens(ids)
    ratio = captured["blocks.1.hook_meta_out"].norm(dim=-1) / captured["blocks.1.hook_resid_mid"].norm(dim=-1)
    expected = [float(ratio[row][ids[row] == META].mean()) for row in range(2)]
    assert measured.meta_attention.means[:, 1].tolist() == pytest.approx(expected)
    assert np.isnan(measured.meta_attention.means[:, 0]).all()
    assert (measured.attention.means > 0).all()
    assert (measured.mlp.means > 0).all()
