"""A row gives the same logits alone and in a batch, whatever the padding and the meta-tokens of the other rows."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from baseline_models import BASELINES, baseline_model
from metatokens.baselines.landmark import read_best_blocks
from tiny_models import ENCODINGS, PAD, assert_close, attention_mask_of, shared_model, tiny_model, tokens

BATCHES = {
    "left": (".....x_xx_", "x_xx_x__xx", "...xxxxxxx"),
    "right": ("x_xx_.....", "x_xx_x__xx", "xxxxxxx..."),
    "mixed": ("..x_x__...", "xxxxxx_xxx", "_________."),
    "mixed_counts_of_meta_tokens": ("xxxxxxxxxx", "x_xxxxxxxx", "__________", "x_x_x_x_x_"),
}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_each_row_of_a_mixed_batch_equals_the_row_alone(batch: str, encoding: str, backend: str) -> None:
    model = tiny_model(position_encoding=encoding, attn_implementation=backend, dtype=torch.float64)
    ids = tokens(*BATCHES[batch])
    mask = attention_mask_of(ids)
    together = model(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, real]).logits[0]
        assert_close(together[row, real], alone, 1e-10)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_row_of_padding_only_leaves_logits_and_gradients_finite(encoding: str, backend: str) -> None:
    model = tiny_model(position_encoding=encoding, attn_implementation=backend).train()
    ids = tokens("x_xx_x", "......")
    mask = attention_mask_of(ids)
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(ids, attention_mask=mask).logits.isfinite().all()


PADDED_INSIDE = ("x_x_....x_x", "..xx_.x_.x_", "x_x.xx_x_..")


@pytest.mark.parametrize("over", ["meta", "all", "random"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@torch.no_grad()
def test_padding_inside_a_row_moves_nothing(cache: str, encoding: str, backend: str, over: str) -> None:
    model = shared_model(
        position_encoding=encoding,
        attn_implementation=backend,
        meta_attention_over=over,
        random_ratio=0.4,
        dtype=torch.float64,
    )
    ids = tokens(*PADDED_INSIDE)
    mask = attention_mask_of(ids)
    past = {
        "none": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[cache]()
    pieces = [(0, 11)] if past is None else [(0, 7), (7, 10), (10, 11)]
    logits = torch.cat(
        [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past).logits for a, b in pieces], dim=1
    )
    for row in range(len(ids)):
        real = mask[row].bool()
        assert_close(logits[row, real], model(ids[row, real][None]).logits[0], 1e-10)


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_padding_inside_a_row_moves_nothing_under_sparse_attention(name: str, encoding: str) -> None:
    model = baseline_model(name, position_encoding=encoding, dtype=torch.float64)
    if name == "landmark":
        read_best_blocks(model, 1)
    ids = tokens(*PADDED_INSIDE)
    mask = attention_mask_of(ids)
    past = DynamicCache(config=model.config)
    cached = [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past).logits for a, b in ((0, 7), (7, 11))]
    for row in range(len(ids)):
        real = mask[row].bool()
        alone = model(ids[row, real][None]).logits[0]
        assert_close(model(ids, attention_mask=mask).logits[row, real], alone, 1e-10)
        assert_close(torch.cat(cached, dim=1)[row, real], alone, 1e-10)


@torch.no_grad()
def test_generation_from_a_prompt_with_padding_inside_goes_on_as_without_it() -> None:
    for cache in ("dynamic", "static"):
        model = shared_model(position_encoding="alibi")
        ids = tokens("x_x_....x_xx")
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "disable_compile": True}
        options["cache_implementation"] = cache
        expected = model.generate(ids[ids != PAD][None], **options)
        padded = model.generate(ids, attention_mask=attention_mask_of(ids), **options)
        assert torch.equal(padded[0, 12:], expected[0, 8:])


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = tiny_model(dtype=torch.float64)
    padded, garbage = tokens("..x_xx.", "x_x_x_x"), tokens("x_x_xx_", "x_x_x_x")
    garbage[padded != padded[0, 0]] = padded[padded != padded[0, 0]]
    mask = attention_mask_of(padded)
    expected = model(padded, attention_mask=mask).logits[mask.bool()]
    assert_close(model(garbage, attention_mask=mask).logits[mask.bool()], expected, 1e-10)
