"""Memory grows with the length, not its square: packed meta-attention, and the sparse patterns in blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from baseline_models import PATTERNS, baseline_model
from metatokens.baselines import blocks, masks
from metatokens.baselines.masks import PATTERNS as KINDS
from metatokens.baselines.masks import Columns, Pattern
from metatokens.lens import Lens
from metatokens.model import MetaTokenForCausalLM
from tiny_models import META, PAD, assert_close, attention_mask_of, gradients, tiny_model, tokens
from watched import Watched

RAGGED = ("...xx_xxxx_xxx_x", "xx_xxxx_xx_xx...", "xxxxxxxxxxxxxxxx", "_x_xxxxxxxxxxxx_")
LONG_PATTERNS: dict[str, dict[str, Any]] = {
    "sliding_window": {"kind": "sliding_window", "window": 256},
    "longformer": {"kind": "longformer", "window": 128, "num_global_tokens": 4, "meta_tokens_are_global": True},
    "bigbird": {
        "kind": "bigbird",
        "block_size": 64,
        "window_blocks": 3,
        "num_global_blocks": 1,
        "num_random_blocks": 2,
        "seed": 0,
    },
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "SHORTEST", 1)
    monkeypatch.setattr(blocks, "QUERIES_PER_BLOCK", 3)


def run(model: Any, ids: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of the real tokens and the gradients of a loss in which each logit has its own weight."""
    model.zero_grad(set_to_none=True)
    logits = model(ids, **inputs).logits[ids != PAD]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights).sum().backward()
    return logits.detach(), gradients(model)


def took_blocks(model: Any) -> list[bool]:
    taken: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: taken.append(isinstance(args[2], blocks.BlockPlan)))
    return taken


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("encoding", ["rope", "alibi", "t5"])
@pytest.mark.parametrize("rows", [RAGGED, ("xx_xxx_xxxxxx_xx",)], ids=["ragged", "alone"])
@pytest.mark.parametrize("name", PATTERNS)
def test_blocks_equal_the_dense_mask_in_value_and_gradient(name: str, rows: tuple[str, ...], encoding: str) -> None:
    ids = tokens(*rows)
    inputs = {"attention_mask": attention_mask_of(ids)} if len(rows) > 1 else {}
    shape = {"position_encoding": encoding, "meta_attention_layers": "all"}
    dense = run(baseline_model(name, attn_implementation="eager", **shape), ids, **inputs)
    model = baseline_model(name, **shape)
    taken = took_blocks(model)
    logits, found = run(model, ids, **inputs)
    assert taken == [model.config.pattern.applies_to(layer) for layer in range(2)]
    assert_close(logits, dense[0], 1e-10)
    assert found.keys() == dense[1].keys()
    for gradient, expected in ((found[key], dense[1][key]) for key in found):
        scale = expected.abs().max().clamp(min=1)
        assert_close(gradient / scale, expected / scale, 1e-10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", PATTERNS)
@torch.no_grad()
def test_a_prompt_read_in_parts_takes_blocks_over_the_cache(name: str) -> None:
    ids = tokens(*RAGGED)[1:]
    mask = attention_mask_of(ids)
    model = baseline_model(name)
    expected = baseline_model(name, attn_implementation="eager")(ids, attention_mask=mask).logits
    taken = took_blocks(model)
    first = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True)
    second = model(ids[:, 7:], attention_mask=mask, past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], dim=1)
    assert any(taken)
    assert_close(logits[ids != PAD], expected[ids != PAD], 1e-10)


@pytest.mark.usefixtures("small_blocks")
@torch.no_grad()
def test_a_lens_sees_the_dense_mask() -> None:
    ids = tokens("xx_xxx_xxxxxx_xx")
    seen: dict[str, list[Tensor]] = {"sdpa": [], "eager": []}
    for backend, visible in seen.items():
        lens = Lens(baseline_model("sliding_window", attn_implementation=backend))
        with lens.observe(lambda call, visible=visible: visible.extend(part.visible for part in call.score_blocks())):
            lens(ids)
    assert len(seen["sdpa"]) == 2
    assert all(torch.equal(*pair) for pair in zip(*seen.values(), strict=True))
    assert not seen["sdpa"][0].all(-2).any()


@pytest.mark.parametrize("name", PATTERNS)
def test_the_keys_of_some_queries_are_none_too_few(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    is_real = torch.rand(3, 50, generator=generator) < 0.8
    columns = Columns(is_real.long().cumsum(-1) - 1, torch.rand(3, 50, generator=generator) < 0.1)
    fields = {key: value for key, value in PATTERNS[name].items() if key != "kind"}
    pattern = KINDS[PATTERNS[name]["kind"]](**fields)
    keys_of = pattern.keys_function(columns, 1)
    exact = Pattern.keys_function(pattern, columns, 1)
    for queries in torch.arange(50).split(7):
        kept = ~pattern.sees_everything(columns)[queries]
        assert not (exact(queries[kept]) & ~keys_of(queries[kept])).any()


def long_model(kind: str, length: int) -> MetaTokenForCausalLM:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": length}
    if kind == "meta-attention":
        return tiny_model(dtype=torch.float32, **shape).train()
    model: MetaTokenForCausalLM = baseline_model("sliding_window", dtype=torch.float32, **shape)
    model.config.attention_pattern = LONG_PATTERNS[kind]
    return model.train()


def largest_in_a_step(kind: str, length: int) -> int:
    ids = tokens("x" * length)
    ids[:, 9::10] = META
    model = long_model(kind, length)
    with Watched() as watched:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(gradients(model)) == len(list(model.parameters()))
    return watched.largest


@pytest.mark.parametrize(
    "length", [2048, 4096, pytest.param(8192, marks=pytest.mark.slow), pytest.param(16384, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("kind", ["meta-attention", *LONG_PATTERNS])
def test_no_tensor_of_a_step_exceeds_a_block_of_queries_times_the_length(kind: str, length: int) -> None:
    assert largest_in_a_step(kind, length) <= blocks.QUERIES_PER_BLOCK * length


def test_the_watch_sees_a_tensor_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "SHORTEST", 2048)
    assert largest_in_a_step("sliding_window", 1024) >= 1024**2
