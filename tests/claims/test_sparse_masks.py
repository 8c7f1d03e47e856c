"""The sparse patterns see exactly the pairs that their papers name, whatever the padding, the cache and the backend."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import GPTNeoConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from baseline_models import PATTERNS, baseline_model
from metatokens.baselines.masks import BigBird, SparseAttentionConfig
from metatokens.model.accounting import forward_flops
from tiny_models import META, PAD, assert_close, attention_mask_of, tiny_config, tiny_model, tokens

ROWS = {"full": "xx_xxxx_xxxx", "left": "...xx_xxxx_x", "right": "xx_xxxx_xx.."}


def sees(pattern: dict[str, Any], layer: int, query: int, key: int, is_meta: list[bool]) -> bool:
    """Say in plain words of two positions of a row without padding whether the query sees the key."""
    if key > query:
        return False
    layers = pattern.get("layers", "all")
    if layers == "odd" and layer % 2 == 0:
        return True
    kind = pattern["kind"]
    if kind in ("sliding_window", "blockwise"):
        half = pattern["window"] // 2
        return key > query - pattern["window"] if kind == "sliding_window" else query // half - key // half < 2
    if kind == "longformer":
        global_ones = set(range(pattern["num_global_tokens"]))
        if pattern["meta_tokens_are_global"]:
            global_ones |= {position for position, meta in enumerate(is_meta) if meta}
        return query - key < pattern["window"] or query in global_ones or key in global_ones
    size = pattern["block_size"]
    query_block, key_block = query // size, key // size
    if query_block - key_block < pattern["window_blocks"] or key_block < pattern["num_global_blocks"]:
        return True
    # the random blocks are those of the model; what they must satisfy has tests of its own
    fields = {name: value for name, value in pattern.items() if name != "kind"}
    return bool(BigBird(**fields).visible_blocks(query_block + 1, layer)[query_block, key_block])


def seen_pairs(name: str, ids: Tensor, **changes: Any) -> list[Tensor]:
    """Return for each layer which (query, key) pairs of a row have attention weight, padding cut away."""
    model = baseline_model(name, attn_implementation="eager", num_hidden_layers=3, dtype=torch.float64, **changes)
    attentions = model(ids, attention_mask=attention_mask_of(ids), output_attentions=True).attentions
    real = ids[0] != PAD
    return [(weights[0] > 0).all(0)[real][:, real] for weights in attentions]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_attention_weights_lie_where_a_loop_over_pairs_puts_them(name: str, row: str) -> None:
    ids = tokens(ROWS[row])
    is_meta = (ids[ids != PAD] == META).tolist()
    length = len(is_meta)
    for layer, actual in enumerate(seen_pairs(name, ids)):
        expected = torch.tensor(
            [[sees(PATTERNS[name], layer, i, j, is_meta) for j in range(length)] for i in range(length)]
        )
        assert torch.equal(actual, expected), layer


@pytest.mark.parametrize("window", [1, 4, 256])
@torch.no_grad()
def test_alternating_window_is_gpt_neos_local_mask(window: int) -> None:
    length = 12
    neo = GPTNeoConfig(
        hidden_size=8,
        num_heads=1,
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
        window_size=window,
        max_position_embeddings=length,
    )
    pattern = {"kind": "sliding_window", "window": window, "layers": "odd"}
    ids = tokens("x" * length)
    model = baseline_model("alternating", attn_implementation="eager", num_hidden_layers=4)
    model.config.attention_pattern = pattern
    attentions = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        expected = GPTNeoSelfAttention(neo, neo.attention_layers[layer], layer).bias[0, 0].bool()
        assert torch.equal((weights[0] > 0).all(0), expected), layer


@pytest.mark.parametrize("encoding", ["rope", "alibi", "t5", "fourier"])
@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_sdpa_equals_eager(name: str, encoding: str) -> None:
    ids = tokens("...xx_xxxx_x", "xx_xxxx_xx..", "xxxxxxxxxxxx")
    real = attention_mask_of(ids).bool()
    logits = [
        baseline_model(name, attn_implementation=backend, position_encoding=encoding, dtype=torch.float64)(
            ids, attention_mask=attention_mask_of(ids)
        ).logits[real]
        for backend in ("sdpa", "eager")
    ]
    assert_close(logits[0], logits[1], 1e-10)


@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_a_row_gives_the_same_logits_alone_and_padded_in_a_batch(name: str) -> None:
    model = baseline_model(name, dtype=torch.float64)
    row, other = tokens("xx_xx_xxxx_x", seed=3), tokens("xxxxxxxxxx_xxxxx", seed=4)
    padding = torch.full((1, 4), PAD)
    alone = model(row).logits
    for parts, columns in (((padding, row), slice(4, 16)), ((row, padding), slice(0, 12))):
        batch = torch.cat([torch.cat(parts, dim=1), other])
        assert_close(model(batch, attention_mask=attention_mask_of(batch)).logits[:1, columns], alone, 1e-10)


@torch.no_grad()
def test_a_window_as_long_as_the_sequence_is_full_attention() -> None:
    ids = tokens("xx_xx_xxxx_x")
    model = baseline_model("sliding_window", dtype=torch.float64)
    plain = tiny_model(meta_attention_layers="none", dtype=torch.float64)
    assert (model(ids).logits - plain(ids).logits).abs().max() > 0.1
    model.config.attention_pattern = {"kind": "sliding_window", "window": 12}
    assert_close(model(ids).logits, plain(ids).logits, 1e-10)


@torch.no_grad()
def test_meta_attention_is_not_narrowed_by_the_pattern() -> None:
    ids = tokens("_xxxxxxxxxx_")
    eager = baseline_model(
        "sliding_window", meta_attention_layers="all", meta_attention_over="all", attn_implementation="eager"
    )
    outputs = eager(ids, output_attentions=True, output_meta_attentions=True)
    assert (outputs.attentions[0][0, :, 11, 0] == 0).all()
    assert (outputs.meta_attentions[0][0, :, 11, 0] > 0).all()


def bigbird(**changes: int) -> BigBird:
    shape = {"block_size": 64, "window_blocks": 3, "num_global_blocks": 2, "num_random_blocks": 3, "seed": 0}
    return BigBird(**{**shape, **changes})


def test_bigbird_draws_so_many_past_blocks_that_it_would_not_see_otherwise() -> None:
    visible = bigbird().visible_blocks(40, 0)
    without = bigbird(num_random_blocks=0).visible_blocks(40, 0)
    assert torch.equal(visible & without, without)
    # block b has b - 2 - 2 candidates: the past without two global blocks and two of the window
    expected = [min(3, max(0, block - 4)) for block in range(40)]
    assert (visible & ~without).sum(-1).tolist() == expected
    assert not visible.triu(1).any()


def test_bigbird_draws_anew_for_every_layer_and_seed_and_spreads_over_the_past() -> None:
    draws = [bigbird(seed=seed).visible_blocks(100, layer) for seed in range(2) for layer in range(3)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 6
    chosen = torch.cat(
        [bigbird(seed=seed).visible_blocks(100, 0)[99, 2:97].nonzero()[:, 0] for seed in range(200)]
    ).float()
    assert len(chosen) == 600
    assert chosen.mean().item() == pytest.approx(94 / 2, abs=4)  # about four standard errors


def test_a_longer_sequence_only_adds_to_bigbirds_blocks() -> None:
    assert torch.equal(bigbird().visible_blocks(40, 1)[:25, :25], bigbird().visible_blocks(25, 1))


@pytest.mark.parametrize("name", PATTERNS)
def test_flops_count_the_pairs_that_the_pattern_allows(name: str) -> None:
    config = SparseAttentionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, attention_pattern=PATTERNS[name], vocab_size=24
    )
    length, is_meta = 40, [position in (9, 19, 29, 39) for position in range(40)]
    pairs = sum(
        sees(PATTERNS[name], layer, i, j, is_meta) for layer in range(3) for i in range(length) for j in range(length)
    )
    full = tiny_config(num_hidden_layers=3, meta_attention_layers="none", intermediate_size=config.intermediate_size)
    saved = 4 * 32 * (3 * length * (length + 1) // 2 - pairs)
    assert forward_flops(config, num_positions=length, num_meta=4) == (
        forward_flops(full, num_positions=length, num_meta=4) - saved
    )


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ({"kind": "slidingwindow"}, ("slidingwindow", "sliding_window")),
        ({"kind": "sliding_window"}, ("window",)),
        ({"kind": "sliding_window", "window": 4, "blocks": 1}, ("sliding_window", "blocks")),
        ({"kind": "sliding_window", "window": 0}, ("window", "at least 1")),
        ({"kind": "blockwise", "window": 7}, ("window", "even", "7")),
        ({"kind": "blockwise", "window": 0}, ("window", "at least 1", "0")),
    ],
)
def test_a_wrong_pattern_is_refused_by_name(pattern: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="attention_pattern") as caught:
        SparseAttentionConfig(attention_pattern=pattern)
    for word in words:
        assert word in str(caught.value)


def test_a_mask_of_four_dimensions_is_refused_instead_of_dropping_the_pattern() -> None:
    mask = torch.ones(1, 1, 4, 4).tril().bool()
    with pytest.raises(ValueError, match="attention_mask as"):
        baseline_model("sliding_window")(tokens("xxxx"), attention_mask=mask)


def test_the_plain_config_refuses_a_pattern_instead_of_dropping_it() -> None:
    with pytest.raises(ValueError, match=r"metatokens\.baselines"):
        tiny_config(attention_pattern=PATTERNS["longformer"])
