"""Position encodings by their own papers' formulas, in the attention weights of the model, packed or not.

With the projections of queries and keys at zero and equal biases of one, a score depends on positions alone.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from metatokens.baselines.building import build_config
from metatokens.config.schema import LinearScaling, ModelConfig, YarnScaling
from metatokens.model.attention import Attention
from metatokens.model.positions import MetaTokenRotaryEmbedding, alibi_slopes
from tiny_models import META, assert_close, tiny_model, tokens

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
    return model


def weights_by_formula(positions: list[int], scores: Any, num_heads: int) -> Tensor:
    """Return softmax weights (H, T, T) of `scores(head, distance)` over what is causal."""
    rows = torch.full((num_heads, len(positions), len(positions)), -math.inf, dtype=torch.float64)
    for head in range(num_heads):
        for i, query in enumerate(positions):
            for j, key in enumerate(positions[: i + 1]):
                rows[head, i, j] = scores(head, query - key)
    return rows.softmax(-1)


def rope_score(_: int, distance: int, *, factor: float = 1.0, temperature: float = 1.0) -> float:
    # the rotated dot product of a vector of ones with itself: a pair of dimensions gives 2 cos(distance x frequency)
    frequencies = [THETA ** (-2 * pair / 8) / factor for pair in range(4)]
    return sum(2 * math.cos(distance * frequency) for frequency in frequencies) * temperature**2 / math.sqrt(8)


def xpos_score(_: int, distance: int) -> float:
    # Sun et al. 2022, equation 14: each pair decays by its own zeta; 512 positions to a power as in torchscale
    zetas = [(2 * pair / 8 + 0.4) / 1.4 for pair in range(4)]
    frequencies = [THETA ** (-2 * pair / 8) for pair in range(4)]
    pairs = zip(zetas, frequencies, strict=True)
    return sum(2 * math.cos(distance * f) * zeta ** (distance / 512) for zeta, f in pairs) / math.sqrt(8)


SCORES: dict[str, tuple[dict[str, Any], Any]] = {
    "rope": ({}, rope_score),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}},
        lambda head, distance: rope_score(head, distance, factor=4),
    ),
    "xpos": ({"position_encoding": "xpos"}, xpos_score),
    "alibi": ({"position_encoding": "alibi"}, lambda head, distance: -(2.0 ** (-2 * (head + 1))) * distance),
    "none": ({"position_encoding": "none"}, lambda _head, _distance: 0.0),
}


@pytest.mark.parametrize("encoding", SCORES)
@torch.no_grad()
def test_attention_weights_are_those_of_the_formula_in_both_attentions(encoding: str) -> None:
    changes, scores = SCORES[encoding]
    model = with_constant_scores(**changes)
    ids = tokens("x_xxx_xx_xxxxx__x")
    # the model's own float32 tables and masks bound what can be asked
    outputs = model.model(ids, output_attentions=True, output_meta_attentions=True)
    expected = weights_by_formula(list(range(17)), scores, 4)
    meta_positions = (ids[0] == META).nonzero()[:, 0].tolist()
    expected_meta = weights_by_formula(meta_positions, scores, 4)
    for layer in range(2):
        assert_close(outputs.attentions[layer][0], expected, 1e-6)
        # packed: the distances are those of the whole sequence
        assert_close(outputs.meta_attentions[layer][0], expected_meta, 1e-6)
    assert (expected_meta - weights_by_formula(list(range(5)), scores, 4)).abs().max() > 0.01 or encoding == "none"


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
