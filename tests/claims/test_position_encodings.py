"""Position encodings by their own papers' formulas, in the attention weights of the model, packed or not.

With the projections of queries and keys at zero and equal biases of one, a score depends on positions alone.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.t5.modeling_t5 import T5Attention

from metatokens.baselines.building import build_config
from metatokens.config.schema import LinearScaling, ModelConfig, YarnScaling
from metatokens.model.accounting import forward_flops
from metatokens.model.attention import Attention
from metatokens.model.position_bias import KerpleKernel, alibi_slopes, bucket_of
from metatokens.model.positions import FourierEmbedding, MetaTokenRotaryEmbedding
from tiny_models import META, assert_close, tiny_config, tiny_model, tokens

THETA = 10_000.0
TRAINED = 1024
HEAD_DIM = 64
SLOPES_OF_12_HEADS = [
    *(1 / 2**power for power in range(1, 9)),
    *(0.7071067811865476, 0.35355339059327373, 0.17677669529663687, 0.08838834764831843),
]


def rope_of(scaling: LinearScaling | YarnScaling) -> MetaTokenRotaryEmbedding:
    """Return the rotary embedding of the paper's model with a scaling from a preset."""
    model = ModelConfig(num_hidden_layers=1, max_position_embeddings=8 * TRAINED, rope_scaling=scaling)
    return MetaTokenRotaryEmbedding(build_config(model, text_vocab_size=50_257, eos_token_id=50_256))


@pytest.mark.parametrize(("factor", "temperature"), [(4, 1.13863), (8, 1.20794)])
def test_yarn_of_the_paper_ramps_from_pair_5_to_pair_18_with_the_papers_temperature(
    factor: int, temperature: float
) -> None:
    # Peng et al. 2023: correction(beta) = D ln(L / (2 pi beta)) / (2 ln theta) is 5.656 and 17.697
    rope = rope_of(YarnScaling(factor=factor))
    plain = torch.tensor([THETA ** (-2 * pair / HEAD_DIM) for pair in range(HEAD_DIM // 2)], dtype=torch.float64)
    low, high = 5, 18
    kept = torch.tensor([1 - min(max((pair - low) / (high - low), 0), 1) for pair in range(HEAD_DIM // 2)])
    expected = plain / factor * (1 - kept) + plain * kept
    torch.testing.assert_close(rope.inv_freq.double(), expected, rtol=1e-6, atol=0)
    ratio = rope.inv_freq.double() / plain
    assert ratio[: low + 1].tolist() == pytest.approx([1] * (low + 1), rel=1e-6)
    assert ratio[low + 1] < 1 - 1e-3
    assert ratio[high - 1] > (1 + 1e-3) / factor
    assert ratio[high:].tolist() == pytest.approx([1 / factor] * (HEAD_DIM // 2 - high), rel=1e-6)
    assert rope.attention_scaling == pytest.approx(temperature, abs=5e-6)
    assert rope.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1)


def test_position_interpolation_divides_every_frequency_and_has_no_temperature() -> None:
    rope = rope_of(LinearScaling(factor=4))
    plain = [THETA ** (-2 * pair / HEAD_DIM) for pair in range(HEAD_DIM // 2)]
    assert rope.inv_freq.tolist() == pytest.approx([frequency / 4 for frequency in plain], rel=1e-6)
    assert rope.attention_scaling == 1


def test_the_twelve_slopes_of_alibi_are_the_authors() -> None:
    assert alibi_slopes(12) == pytest.approx(SLOPES_OF_12_HEADS, rel=1e-12)


def with_constant_scores(**changes: Any) -> Any:
    """Return a model whose queries and keys are all ones before rotation."""
    model = tiny_model(attn_implementation="eager", dtype=torch.float64, **changes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                for projection in (module.q_proj, module.k_proj):
                    projection.weight.zero_()
                    projection.bias.fill_(1)
            elif isinstance(module, KerpleKernel):
                module.weight.copy_(torch.tensor([[1.5, 0.5, 1, 2], [1, 0.5, -1, 2]]))
    return model


def weights_by_formula(positions: list[int], scores: Any, num_heads: int) -> Tensor:
    """Return softmax weights (H, T, T) of `scores(head, query, key)` over what is causal."""
    rows = torch.full((num_heads, len(positions), len(positions)), -math.inf, dtype=torch.float64)
    for head in range(num_heads):
        for i, query in enumerate(positions):
            for j, key in enumerate(positions[: i + 1]):
                rows[head, i, j] = scores(head, query, key)
    return rows.softmax(-1)


def rope_score(distance: int, *, factor: float = 1.0, temperature: float = 1.0) -> float:
    # the rotated dot product of a vector of ones with itself: a pair of dimensions gives 2 cos(distance x frequency)
    frequencies = [THETA ** (-2 * pair / 8) / factor for pair in range(4)]
    return sum(2 * math.cos(distance * frequency) for frequency in frequencies) * temperature**2 / math.sqrt(8)


def xpos_score(distance: int) -> float:
    # Sun et al. 2022, equation 14: each pair decays by its own zeta; 512 positions to a power as in torchscale
    zetas = [(2 * pair / 8 + 0.4) / 1.4 for pair in range(4)]
    frequencies = [THETA ** (-2 * pair / 8) for pair in range(4)]
    pairs = zip(zetas, frequencies, strict=True)
    return sum(2 * math.cos(distance * f) * zeta ** (distance / 512) for zeta, f in pairs) / math.sqrt(8)


def t5_bucket(distance: int) -> int:
    # Raffel et al. 2020, section 2.1, with the code's 32 buckets up to 128, all for the past
    if distance < 16:
        return distance
    return min(31, 16 + math.floor(16 * math.log(distance / 16) / math.log(128 / 16)))


def fourier_score(mixing: Tensor, head: int, query: int, key: int) -> float:
    # Hua et al. 2024: of theta^(-2d/8) only 1 and 0.1 have a whole turn in 64 positions, and D / 4 pairs hold mixtures
    cos, sin = (
        [
            [sum(f(at * w) * float(row[out]) for w, row in zip((1, 0.1), of_head, strict=True)) for out in range(2)]
            for at in (query, key)
        ]
        for f, of_head in zip((math.cos, math.sin), mixing[:, head], strict=True)
    )
    turning = sum(2 * (cos[0][out] * cos[1][out] + sin[0][out] * sin[1][out]) for out in range(2))
    return (turning + 2 * 2) / math.sqrt(8)  # two pairs do not turn


def kerple_score(model: Any, head: int, query: int, key: int) -> float:
    # Chi et al. 2022, the logarithmic kernel; the authors' code keeps both weights at 0.01 or more
    factor, rate = (max(float(weights[head]), 0.01) for weights in model.model.kernel.weight)
    return -factor * math.log(1 + rate * (query - key))


def dape_score(bias: Any, attention: Any, head: int, query: int, key: int) -> float:
    # Zheng et al. 2024: scores + bias + f(scores, bias), where each score is a product of eight ones
    scores = [math.sqrt(8)] * 4
    biases = [bias(other, query, key) for other in range(4)]
    up, down = attention.adaptive_bias.up_proj, attention.adaptive_bias.down_proj
    inner = []
    for row, start in zip(up.weight.tolist(), up.bias.tolist(), strict=True):
        value = start + sum(w * x for w, x in zip(row, scores + biases, strict=True))
        inner.append(value if value > 0 else 0.01 * value)
    row, start = down.weight.tolist()[head], float(down.bias[head])
    return scores[head] + biases[head] + start + sum(w * x for w, x in zip(row, inner, strict=True))


def transformer_xl_score(attention: Any, head: int, query: int, key: int) -> float:
    # Dai et al. 2019, section 3.3: (q + u) k + (q + v) W r, for queries and keys of ones
    relative = attention.relative_keys
    angles = [(query - key) / THETA ** (pair / 16) for pair in range(16)]
    places = [*map(math.sin, angles), *map(math.cos, angles)]
    rows = relative.distance_proj.weight.view(4, 8, 32)[head].tolist()
    score = 0.0
    for size in range(8):
        score += 1 + float(relative.content_bias[head, size])
        at = sum(w * place for w, place in zip(rows[size], places, strict=True))
        score += (1 + float(relative.distance_bias[head, size])) * at
    return score / math.sqrt(8)


SCORES: dict[str, tuple[dict[str, Any], Any]] = {
    "rope": ({}, lambda _, _head, query, key: rope_score(query - key)),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}},
        lambda _, _head, query, key: rope_score(query - key, factor=4),
    ),
    "xpos": ({"position_encoding": "xpos"}, lambda _, _head, query, key: xpos_score(query - key)),
    "fourier": (
        {"position_encoding": "fourier"},
        lambda model, head, query, key: fourier_score(model.model.rotary_emb.mixing.double(), head, query, key),
    ),
    "alibi": (
        {"position_encoding": "alibi"},
        lambda _, head, query, key: -(2.0 ** (-2 * (head + 1))) * (query - key),
    ),
    "t5": (
        {"position_encoding": "t5"},
        lambda model, head, query, key: float(model.model.distance_bias.weight[t5_bucket(query - key), head]),
    ),
    "kerple": ({"position_encoding": "kerple"}, kerple_score),
    "none": ({"position_encoding": "none"}, lambda _, _head, _query, _key: 0.0),
}
"""Of (model, head, query, key)."""
OWN_SCORES: dict[str, Any] = {
    "transformer_xl": lambda _, attention: partial(transformer_xl_score, attention),
    "dape_alibi": lambda model, attention: partial(dape_score, partial(SCORES["alibi"][1], model), attention),
    "dape_kerple": lambda model, attention: partial(dape_score, partial(kerple_score, model), attention),
}
"""Of (model, attention), where each attention has weights of its own; these return a score of (head, query, key)."""


@pytest.mark.parametrize("encoding", SCORES)
@torch.no_grad()
def test_attention_weights_are_those_of_the_formula_in_both_attentions(encoding: str) -> None:
    changes, score = SCORES[encoding]
    model = with_constant_scores(**changes)
    scores = partial(score, model)
    ids = tokens("x_xxx_xx_xxxxx__x_xxxxxx_")
    # the tables of RoPE are float32, whatever the model's type
    outputs = model.model(ids, output_attentions=True, output_meta_attentions=True)
    expected = weights_by_formula(list(range(25)), scores, 4)
    meta_positions = (ids[0] == META).nonzero()[:, 0].tolist()
    expected_meta = weights_by_formula(meta_positions, scores, 4)
    bound = 1e-10 if encoding in ("fourier", "alibi", "t5", "kerple", "none") else 1e-6
    for layer in range(2):
        assert_close(outputs.attentions[layer][0], expected, bound)
        # packed: the distances are those of the whole sequence
        assert_close(outputs.meta_attentions[layer][0], expected_meta, bound)
    assert (expected_meta - weights_by_formula(list(range(7)), scores, 4)).abs().max() > 0.01 or encoding == "none"


@pytest.mark.parametrize("encoding", OWN_SCORES)
@torch.no_grad()
def test_attention_weights_are_those_of_the_formula_with_weights_of_each_attention(encoding: str) -> None:
    model, ids = with_constant_scores(position_encoding=encoding), tokens("x_xxx_xx_xxxxx__x")
    outputs = model.model(ids, output_attentions=True, output_meta_attentions=True)
    meta_positions = (ids[0] == META).nonzero()[:, 0].tolist()
    for layer, block in enumerate(model.model.layers):
        of_text = weights_by_formula(list(range(17)), OWN_SCORES[encoding](model, block.self_attn), 4)
        assert_close(outputs.attentions[layer][0], of_text, 1e-10)
        of_meta = OWN_SCORES[encoding](model, block.meta_attn)
        assert_close(outputs.meta_attentions[layer][0], weights_by_formula(meta_positions, of_meta, 4), 1e-10)
        nearby = weights_by_formula(list(range(len(meta_positions))), of_meta, 4)
        assert (outputs.meta_attentions[layer][0] - nearby).abs().max() > 0.01


@pytest.mark.parametrize("distance", [0, 1, 15, 16, 17, 20, 27, 31, 32, 64, 127, 128, 129, 5000])
def test_buckets_of_t5_are_those_of_transformers(distance: int) -> None:
    expected = T5Attention._relative_position_bucket(torch.tensor(-distance), bidirectional=False)
    assert bucket_of(torch.tensor(distance)) == expected == t5_bucket(distance)


def test_fourier_keeps_18_of_32_frequencies_of_the_papers_model_and_mixes_them_into_16() -> None:
    embedding = FourierEmbedding(tiny_config(head_dim=64, max_position_embeddings=1024))
    assert embedding.mixing.shape == (2, 4, 18, 16)
    identity = torch.zeros(18, 16)
    identity[torch.arange(0, 18, 2), torch.arange(9)] = 1
    noise = embedding.mixing - identity
    assert noise.std() == pytest.approx(0.3 * math.sqrt(2 / 34), rel=0.1)
    assert noise.mean().abs() < 0.01
    # the other 16 pairs do not turn, which scores of equal queries and keys would not show
    cos, sin = (table[..., 16:32] for table in embedding(torch.zeros(1), torch.arange(9)[None]))
    assert (cos == 1).all()
    assert (sin == 0).all()
    again = FourierEmbedding(tiny_config(head_dim=64, max_position_embeddings=1024))
    assert torch.equal(again.mixing, embedding.mixing)


@torch.no_grad()
def test_yarn_multiplies_scores_by_the_square_of_its_temperature() -> None:
    # at distance 0 nothing turns, and the temperature shows alone
    rope = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 16}
    model = with_constant_scores(rope_parameters=rope)
    attention = model.model.layers[0].self_attn
    rotary = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long))
    query, key, _ = attention.project(torch.zeros(1, 1, 32, dtype=torch.float64), rotary)
    score = (query * key).sum(-1)[0, 0, 0].item()
    assert score == pytest.approx(8 * 1.29648, abs=1e-3)  # 1.13863 squared


@pytest.mark.parametrize("encoding", OWN_SCORES)
def test_operations_of_an_encoding_with_weights_of_its_own_are_counted(encoding: str) -> None:
    length, heads, width, layers = 24, 4, 32, 2
    shape: dict[str, Any] = {"attn_implementation": "eager", "meta_attention_layers": "none"}
    flops = []
    for name in (encoding, "none"):
        model = tiny_model(position_encoding=name, **shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens("x" * length), use_cache=False)
        flops.append((counter.get_total_flops(), forward_flops(model.config, num_positions=length)))
    measured, counted = (ours - others for ours, others in zip(*flops, strict=True))
    of_token, of_pair = (2 * width * width, 2 * heads * width) if "xl" in encoding else (0, 2 * 3 * heads * heads)
    # the model computes all pairs, and those that causality allows are counted
    assert measured == layers * (length * of_token + length * length * of_pair)
    assert counted == layers * (length * of_token + length * (length + 1) // 2 * of_pair)
