"""A cached forward pass gives the logits of the whole sequence, whatever its meta-tokens, padding and pieces."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from cached_passes import CACHES, PIECES, feed, uncached
from pairwise import all_pairs
from tiny_models import (
    BACKENDS,
    ENCODINGS,
    MAX_LENGTH,
    MEMBERS,
    NUM_TERMS,
    assert_close,
    attention_mask_of,
    shared_model,
    tiny_config,
    tiny_model,
    tokens,
)
from tolerances import tolerance

BATCHES = {
    "one_row": ("x_xx_x__xxxx",),
    "ragged": ("x_xxx_xx_xxx", "xxxxxxxxxxxx", "____xxxx_xx_"),
    "left_padded": ("....x_xx_x__", "xx_xxxxxxx_x", "...........x"),
    "late_meta_tokens": ("xxxxxxxx____", "xxxxxxxxxxx_"),
    "early_meta_tokens": ("____xxxxxxxx", "_xxxxxxxxxxx"),
    "no_meta_token": ("xxxxxxxxxxxx", "..xxxxxxxxxx"),
}
# static ones from transformers 5.24 on; assisted generation asks for it
CROPPABLE = [kind for kind, make in CACHES.items() if make(tiny_config()).is_croppable]
TOLERANCE = 1e-10  # in float64


@all_pairs(batch=BATCHES, pieces=PIECES, kind=CACHES, encoding=ENCODINGS, backend=BACKENDS, over=MEMBERS)
@torch.no_grad()
def test_cached_logits_equal_uncached(
    batch: str, pieces: str, kind: str, encoding: str, backend: str, over: str
) -> None:
    model = shared_model(position_encoding=encoding, attn_implementation=backend, **MEMBERS[over])
    ids = tokens(*BATCHES[batch])
    real = attention_mask_of(ids).bool()
    cached = feed(model, ids, CACHES[kind](model.config), PIECES[pieces])
    assert_close(cached[real], uncached(model, ids)[real], TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("batch", ["one_row", "ragged", "late_meta_tokens"])
@torch.no_grad()
def test_chunked_prefill_without_an_attention_mask_equals_uncached(batch: str, kind: str) -> None:
    # with past keys, sdpa takes a missing mask for an empty cache and drops the newest keys
    model = shared_model()
    ids = tokens(*BATCHES[batch])
    cached = feed(model, ids, CACHES[kind](model.config), [5, 4, 3], masked=False)
    assert_close(cached, uncached(model, ids), TOLERANCE)


@pytest.mark.parametrize("over", ["meta", "all"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.usefixtures("other_copy_of_the_cache")
@torch.no_grad()
def test_cached_logits_equal_uncached_over_the_cache_of_another_copy_of_the_code(kind: str, over: str) -> None:
    model = shared_model(meta_attention_over=over)
    ids = tokens(*BATCHES["ragged"])
    cache = CACHES[kind](model.config)
    assert type(cache.layers[0]).__module__ == "other_copy_of_the_cache"
    assert_close(feed(model, ids, cache, PIECES["prompt_then_tokens"]), uncached(model, ids), TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_cached_logits_equal_uncached_in_float32_but_for_rounding(kind: str) -> None:
    model = shared_model(dtype=torch.float32)
    ids = tokens(*BATCHES["left_padded"])
    real = attention_mask_of(ids).bool()
    cached = feed(model, ids, CACHES[kind](model.config), PIECES["prompt_then_tokens"])
    assert_close(cached[real], uncached(model, ids)[real], tolerance(torch.float32, NUM_TERMS))


@pytest.mark.parametrize("layers", ["none", [0], [2], [0, 2]])
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_cached_logits_equal_uncached_when_only_some_layers_have_meta_attention(
    kind: str, layers: str | list[int]
) -> None:
    model = tiny_model(num_hidden_layers=3, meta_attention_layers=layers)
    ids = tokens(*BATCHES["ragged"])
    cached = feed(model, ids, CACHES[kind](model.config), PIECES["prompt_then_tokens"])
    assert_close(cached, uncached(model, ids), TOLERANCE)


@all_pairs(batch=BATCHES, kind=CROPPABLE, num_removed=(1, 4, 9), encoding=("rope", "alibi", "t5"), over=MEMBERS)
@torch.no_grad()
def test_logits_after_crop_equal_uncached(batch: str, kind: str, num_removed: int, encoding: str, over: str) -> None:
    model = shared_model(position_encoding=encoding, **MEMBERS[over])
    before = tokens(*BATCHES[batch])
    kept = before.shape[1] - num_removed
    after = torch.cat([before[:, :kept], tokens(*["_x__x"] * len(before), seed=1)], dim=1)
    cache = CACHES[kind](model.config)
    feed(model, before, cache, [7, 5])
    cache.crop(-num_removed)
    continued = feed(model, after, cache, [2, 1, 2], start=kept)
    real = attention_mask_of(after).bool()[:, kept:]
    assert_close(continued[real], uncached(model, after)[:, kept:][real], TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_logits_after_reordering_beams_equal_those_of_the_reordered_rows(kind: str) -> None:
    model = shared_model()
    ids = tokens(*BATCHES["ragged"])
    beams = torch.tensor([2, 0, 2])
    after = torch.cat([ids[beams], tokens("_xx", "x_x", "xx_", seed=1)], dim=1)
    cache = CACHES[kind](model.config)
    feed(model, ids, cache, [12])
    cache.reorder_cache(beams)
    continued = feed(model, after, cache, [1, 1, 1], start=12)
    assert_close(continued, uncached(model, after)[:, 12:], TOLERANCE)


@torch.no_grad()
def test_logits_after_repeating_and_selecting_rows_equal_those_of_these_rows() -> None:
    model = shared_model()
    ids = tokens(*BATCHES["ragged"])
    rows = torch.tensor([0, 2, 3, 5])
    after = torch.cat([ids.repeat_interleave(2, dim=0)[rows], tokens("_xx", "x_x", "xx_", "xxx", seed=1)], dim=1)
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache, [12])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(rows)
    continued = feed(model, after, cache, [1, 2], start=12)
    assert_close(continued, uncached(model, after)[:, 12:], TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_reset_cache_remembers_nothing(kind: str) -> None:
    model = shared_model()
    ids = tokens("x__x_xxx_x")
    cache = CACHES[kind](model.config)
    feed(model, tokens("__x_x_x__x", seed=1), cache, [6, 4])
    cache.reset()
    assert_close(feed(model, ids, cache, [6, 1, 1, 1, 1]), uncached(model, ids), TOLERANCE)


@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_cache_holds_a_sequence_of_the_models_full_length(kind: str) -> None:
    model = shared_model()
    picture = "__xx" * (MAX_LENGTH // 4)
    ids = tokens(picture)
    caches = {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, MAX_LENGTH)}
    cached = feed(model, ids, caches[kind], [MAX_LENGTH - 2, 1, 1])
    assert_close(cached, uncached(model, ids), TOLERANCE)
