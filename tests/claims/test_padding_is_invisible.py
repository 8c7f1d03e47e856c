"""A row gives the same logits alone and in a batch, whatever the padding and the meta-tokens of the other rows."""

import pytest
import torch

from baseline_models import BASELINES, baseline_model
from cached_passes import CACHES, feed, uncached
from metatokens.baselines.landmark import read_best_blocks
from pairwise import all_pairs
from tiny_models import (
    BACKENDS,
    ENCODINGS,
    MEMBERS,
    PAD,
    assert_close,
    attention_mask_of,
    shared_model,
    tiny_model,
    tokens,
)

BATCHES = {
    "left": (".....x_xx_", "x_xx_x__xx", "...xxxxxxx"),
    "right": ("x_xx_.....", "x_xx_x__xx", "xxxxxxx..."),
    "mixed": ("..x_x__...", "xxxxxx_xxx", "_________."),
    "mixed_counts_of_meta_tokens": ("xxxxxxxxxx", "x_xxxxxxxx", "__________", "x_x_x_x_x_"),
}


@all_pairs(batch=BATCHES, encoding=ENCODINGS, backend=BACKENDS, over=MEMBERS)
@torch.no_grad()
def test_each_row_of_a_mixed_batch_equals_the_row_alone(batch: str, encoding: str, backend: str, over: str) -> None:
    model = shared_model(position_encoding=encoding, attn_implementation=backend, **MEMBERS[over])
    ids = tokens(*BATCHES[batch])
    mask = attention_mask_of(ids)
    together = model(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, real]).logits[0]
        assert_close(together[row, real], alone, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
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


@all_pairs(cache=("none", *CACHES), encoding=ENCODINGS, backend=BACKENDS, over=MEMBERS)
@torch.no_grad()
def test_padding_inside_a_row_moves_nothing(cache: str, encoding: str, backend: str, over: str) -> None:
    model = shared_model(position_encoding=encoding, attn_implementation=backend, **MEMBERS[over])
    ids = tokens(*PADDED_INSIDE)
    mask = attention_mask_of(ids)
    logits = uncached(model, ids) if cache == "none" else feed(model, ids, CACHES[cache](model.config), [7, 3, 1])
    for row in range(len(ids)):
        real = mask[row].bool()
        assert_close(logits[row, real], model(ids[row, real][None]).logits[0], 1e-10)


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize(("name", "num_best"), [*((name, None) for name in BASELINES), ("landmark", 1)])
@torch.no_grad()
def test_padding_inside_a_row_moves_nothing_under_sparse_attention(
    name: str, num_best: int | None, encoding: str
) -> None:
    model = baseline_model(name, position_encoding=encoding)
    if name == "landmark":
        read_best_blocks(model, num_best)
    ids = tokens(*PADDED_INSIDE)
    mask = attention_mask_of(ids)
    cached = feed(model, ids, CACHES["dynamic"](model.config), [7, 4])
    for row in range(len(ids)):
        real = mask[row].bool()
        alone = model(ids[row, real][None]).logits[0]
        assert_close(uncached(model, ids)[row, real], alone, 1e-10)
        assert_close(cached[row, real], alone, 1e-10)


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
    model = tiny_model()
    padded, garbage = tokens("..x_xx.", "x_x_x_x"), tokens("x_x_xx_", "x_x_x_x")
    garbage[padded != padded[0, 0]] = padded[padded != padded[0, 0]]
    mask = attention_mask_of(padded)
    expected = model(padded, attention_mask=mask).logits[mask.bool()]
    assert_close(model(garbage, attention_mask=mask).logits[mask.bool()], expected, 1e-10)
