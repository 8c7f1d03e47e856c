"""Position encodings: rotary tables, their scalings and the ALiBi bias, on explicit positions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from metatokens.model import MetaTokenConfig
from metatokens.model.position_bias import AlibiBias, add_bias, alibi_slopes
from metatokens.model.positions import MetaTokenRotaryEmbedding, RotaryTables, rotate
from tiny_models import assert_close, tiny_config, tiny_model, tokens
from tolerances import tolerance

THETA = 10_000.0
TRAINED = 1024
HEAD_DIM = 64
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
}


def wide_config(scaling: str | None) -> MetaTokenConfig:
    """Return a config with the paper's head size and window; a scaled window is that of the longer model."""
    parameters = {"rope_theta": THETA, **(SCALINGS[scaling] if scaling else {"rope_type": "default"})}
    window = 4 * TRAINED if scaling == "yarn" else TRAINED
    return tiny_config(
        hidden_size=4 * HEAD_DIM, head_dim=HEAD_DIM, max_position_embeddings=window, rope_parameters=parameters
    )


def tables(config: MetaTokenConfig, positions: Tensor) -> RotaryTables:
    return MetaTokenRotaryEmbedding(config)(torch.zeros(1), positions[None])


def default_frequencies() -> Tensor:
    return THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_tables_equal_those_of_transformers_functions(scaling: str) -> None:
    config = wide_config(scaling)
    positions = torch.arange(1500)  # beyond the trained window, where dynamic scaling sets in
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"), seq_len=len(positions))
    angles = torch.cat([positions[:, None] * frequencies] * 2, dim=-1)
    cos, sin = tables(config, positions)
    assert_close(cos[0], angles.cos() * factor, 1e-5)
    assert_close(sin[0], angles.sin() * factor, 1e-5)


def test_rotation_is_that_of_transformers_with_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    cos, sin = torch.randn(2, 2, 9, 8, generator=generator, dtype=torch.float64)  # of no angles: halves that differ
    states, weights = torch.randn(2, 2, 9, 3, 8, generator=generator, dtype=torch.float64).transpose(2, 3)
    states.requires_grad_()
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin)
    rotated = rotate(states, cos, sin)
    assert_close(rotated, expected, 1e-14)
    assert_close(rotate(states.detach(), cos, sin), expected.detach(), 1e-14)
    gradients = [torch.autograd.grad((out * weights).sum(), states)[0] for out in (rotated, expected)]
    assert_close(*gradients, 1e-14)
    assert torch.autograd.gradgradcheck(lambda given: rotate(given, cos, sin), states)


def test_linear_scaling_divides_the_positions() -> None:
    scaled, default = (
        tables(wide_config("linear"), torch.arange(0, 400, 4)),
        tables(wide_config(None), torch.arange(100)),
    )
    assert_close(scaled[0], default[0], 1e-5)
    assert_close(scaled[1], default[1], 1e-5)


def test_yarn_keeps_fast_frequencies_divides_slow_ones_and_ramps_between() -> None:
    # Peng et al. 2023, section 3.2, with beta_fast 32 and beta_slow 1 over the trained window
    def dimension_of(rotations: float) -> float:
        return HEAD_DIM * math.log(TRAINED / (rotations * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = math.floor(dimension_of(32)), math.ceil(dimension_of(1))
    ramp = ((torch.arange(HEAD_DIM // 2) - low) / (high - low)).clamp(0, 1)
    expected = default_frequencies() * (1 - ramp) + default_frequencies() / 4 * ramp
    rotary = MetaTokenRotaryEmbedding(wide_config("yarn"))
    torch.testing.assert_close(rotary.inv_freq, expected)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_dynamic_scaling_leaves_the_trained_window_alone_and_returns_after_a_longer_sequence() -> None:
    rotary = MetaTokenRotaryEmbedding(wide_config("dynamic"))
    short, long = torch.arange(100)[None], torch.arange(3000)[None]
    default = tables(wide_config(None), short[0])[0]
    before, beyond = rotary(torch.zeros(1), short)[0], rotary(torch.zeros(1), long)[0]
    after = rotary(torch.zeros(1), short)[0]
    assert torch.equal(before, default)
    assert not torch.equal(beyond[:, :100], default)
    assert torch.equal(after, default)


def test_dynamic_tables_do_not_depend_on_what_was_read_before() -> None:
    # transformers keeps the base of the longest sequence, until one is shorter than the trained window
    rotary, middle = MetaTokenRotaryEmbedding(wide_config("dynamic")), torch.arange(2000)[None]
    alone = rotary(torch.zeros(1), middle)[0]
    rotary(torch.zeros(1), torch.arange(4000)[None])
    assert torch.equal(rotary(torch.zeros(1), middle)[0], alone)


def test_rotation_turns_pairs_of_dimensions_by_position_times_frequency() -> None:
    query, key = torch.randn(2, 1, 4, 10, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 5, 9, 17, 100, 500, 1000, 1023])
    rotated = tables(wide_config(None), positions).apply(query, key)
    turn = torch.polar(torch.ones(()), positions[:, None] * default_frequencies())
    for before, after in zip((query, key), rotated, strict=True):
        pairs = torch.complex(before[..., : HEAD_DIM // 2], before[..., HEAD_DIM // 2 :]) * turn
        # a frequency that is an epsilon off turns as many epsilons further as there are positions
        assert_close(after, torch.cat([pairs.real, pairs.imag], dim=-1), tolerance(torch.float32, 4 * 1023))


def test_tables_at_an_index_are_those_of_its_positions_row_by_row() -> None:
    whole = tables(wide_config(None), torch.arange(100))
    index = torch.tensor([[3, 50], [0, 99]])
    for picked, table in zip(whole.at(index), whole, strict=True):
        assert torch.equal(picked, table[0][index])


def test_alibi_slopes_of_a_power_of_two_are_geometric() -> None:
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_alibi_slopes_of_twelve_heads_are_the_authors() -> None:
    between = [0.707107, 0.353553, 0.176777, 0.088388]
    assert alibi_slopes(12) == pytest.approx([*alibi_slopes(8), *between], abs=1e-6)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 6, 7, 16, 20])
def test_alibi_has_one_distinct_slope_for_each_head(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert len(slopes) == len(set(slopes)) == num_heads
    assert all(0 < slope <= 1 for slope in slopes)


def test_alibi_bias_is_minus_slope_times_distance_of_the_given_positions() -> None:
    causal = torch.ones(3, 3).tril().bool()[None, None]
    positions = torch.tensor([[2, 5, 11]])
    bias = add_bias(causal, positions, positions, AlibiBias(torch.tensor([0.5, 0.25])))
    lowest = torch.finfo(torch.float32).min
    expected = torch.tensor([[0.0, lowest, lowest], [-1.5, 0.0, lowest], [-4.5, -3.0, 0.0]])
    assert torch.equal(bias[0, 0], expected)
    assert torch.equal(bias[0, 1], torch.where(causal[0, 0], expected / 2, lowest))


def test_alibi_bias_is_the_same_on_a_bool_and_on_an_additive_mask() -> None:
    causal = torch.ones(4, 4).tril().bool()[None, None]
    additive = torch.zeros(1, 1, 4, 4).masked_fill(~causal, torch.finfo(torch.float32).min)
    positions, bias = torch.arange(4)[None], AlibiBias(torch.tensor([0.5, 0.25]))
    assert torch.equal(add_bias(causal, positions, positions, bias), add_bias(additive, positions, positions, bias))


@torch.no_grad()
def test_scores_of_xpos_do_not_depend_on_the_middle_of_the_window_that_it_counts_from() -> None:
    ids = tokens("xx_xxx_xxxxx")
    near, far = (tiny_model(position_encoding="xpos", max_position_embeddings=window) for window in (64, 4096))
    assert_close(near(ids).logits, far(ids).logits, 1e-5)
    query = torch.ones(1, 1, 12, 8)
    tables = [model.model.rotary_emb(query, torch.arange(12)[None]) for model in (near, far)]
    assert (tables[1].scale / tables[0].scale).max() > 100  # what is cached differs


@torch.no_grad()
def test_xpos_in_bfloat16_stays_finite_at_the_ends_of_a_long_window() -> None:
    model = tiny_model(position_encoding="xpos", max_position_embeddings=8192, dtype=torch.bfloat16)
    positions = torch.tensor([[0, 1, 8190, 8191]])
    tables = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    for side in tables.apply(torch.ones(1, 4, 4, 8).bfloat16(), torch.ones(1, 4, 4, 8).bfloat16()):
        assert side.isfinite().all()
        assert side.abs().max() < 1e5


@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.float16, 3966), (torch.bfloat16, 35_694), (torch.float32, 35_694)]
)
@torch.no_grad()
def test_xpos_is_right_over_the_longest_window_that_its_dtype_has_room_for(dtype: torch.dtype, window: int) -> None:
    ids = tokens("xx_xxx_xxxxx")
    positions = torch.arange(window - 12, window)[None]
    expected = tiny_model(position_encoding="xpos", max_position_embeddings=64, dtype=torch.float64)(ids).logits
    for backend in ("sdpa", "eager"):
        shape = {"position_encoding": "xpos", "max_position_embeddings": window, "attn_implementation": backend}
        model = tiny_model(**shape, dtype=dtype)
        for position_ids in (positions, positions - positions.min()):
            # a rounding of the dtype at each of some ten operations in a row
            tolerance = 64 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-2
            logits = model(ids, position_ids=position_ids).logits.double()
            assert (logits - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_xpos_over_a_window_that_leaves_the_range_of_its_dtype_is_refused(dtype: torch.dtype) -> None:
    window = {torch.float16: 3967, torch.float32: 35_695}[dtype]
    model = tiny_model(position_encoding="xpos", max_position_embeddings=window, dtype=dtype)
    with pytest.raises(ValueError, match=f"over {window} positions leaves the range of {dtype}"):
        model(tokens("x_xx"))


def test_xpos_under_autocast_to_float16_is_refused_by_the_range_of_float16() -> None:
    model = tiny_model(position_encoding="xpos", max_position_embeddings=8192)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"range of torch\.float16"):
        model(tokens("x_xx"))
