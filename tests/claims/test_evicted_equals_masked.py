"""In memory mode, columns that left the cache change nothing: cached logits are those of the defining mask."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from cached_passes import PIECES, feed, uncached
from memory_policies import BATCHES, POLICIES
from metatokens.model.accounting import cache_bytes
from metatokens.model.configuration import BIASES
from metatokens.model.memory_reference import MemoryReferenceForCausalLM
from pairwise import all_pairs
from tiny_models import META, PAD, PLAIN_SCORES, assert_close, attention_mask_of, tiny_model, tokens

TOLERANCE = 1e-10
CHUNKS = {**{name: [2 * piece for piece in pieces] for name, pieces in PIECES.items()}, "decoded": [10, *[1] * 14]}


def models(**fields: Any) -> tuple[Any, Any]:
    """Return the model and the definition with its weights."""
    return tiny_model(**fields), tiny_model(**fields, model_class=MemoryReferenceForCausalLM)


@all_pairs(
    name=POLICIES,
    batch=BATCHES,
    chunks=CHUNKS,
    encoding=PLAIN_SCORES,
    backend=("sdpa", "eager"),
    meta_attention=("all", "none", [1]),
    layers=("all", "odd"),
)
@torch.no_grad()
def test_cached_logits_equal_the_definition(
    name: str, batch: str, chunks: str, encoding: str, backend: str, meta_attention: Any, layers: str
) -> None:
    if POLICIES[name].get("memory_limit") and meta_attention != "none":
        layers = "all"  # a limit is one for all blocks
    if POLICIES[name].get("positions") == "text" and encoding in BIASES:
        layers = "all"  # another block does not know which of its columns are text
    model, reference = models(
        memory={**POLICIES[name], "layers": layers},
        position_encoding=encoding,
        attn_implementation=backend,
        meta_attention_layers=meta_attention,
    )
    ids = tokens(*BATCHES[batch])
    real = attention_mask_of(ids).bool()
    cache = DynamicCache(config=model.config)
    cached = feed(model, ids, cache, CHUNKS[chunks])
    assert_close(cached[real], uncached(reference, ids)[real], TOLERANCE)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_prefill_in_chunks_longer_than_those_of_the_mask_before_and_behind_steps_equals_the_definition(
    name: str,
) -> None:
    ids = tokens("xxx_xx_xxxxxxx_" * 30, "xxxxxxxxxx_xxx_" * 30)
    fields = {"memory": {**POLICIES[name], "window": 20}, "max_position_embeddings": 450}
    model, reference = models(**fields)
    cached = feed(model, ids, DynamicCache(config=model.config), [200, *[1] * 10, 150, 1, 89], masked=False)
    assert_close(cached, reference(ids, use_cache=False).logits, TOLERANCE)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_the_cache_holds_sinks_anchors_and_the_window_alone(name: str) -> None:
    policy = {"memory_limit": None, "anchors": "meta", "every": 9, **POLICIES[name]}
    ids = tokens("xxx_xx_xxxxxxx_" * 4)
    model = tiny_model(memory=POLICIES[name])
    cache = DynamicCache(config=model.config)
    for stop in range(20, 60):
        feed(model, ids, cache, [1 if stop > 20 else 20], start=stop - 1 if stop > 20 else 0, masked=False)
        is_meta = ids[0, :stop] == META
        is_text = ~is_meta if policy["anchors"] != "every" else torch.ones_like(is_meta)
        number = is_text.cumsum(-1)
        is_sink = is_text & (number <= policy["num_sinks"])
        is_anchor = is_meta if policy["anchors"] != "every" else (number % policy["every"] == 0) & ~is_sink
        if policy["memory_limit"]:
            is_anchor &= is_anchor.flip(0).cumsum(0).flip(0) <= policy["memory_limit"]
        in_window = is_text & (number > is_text.sum() - policy["window"])
        layer = cache.layers[0]
        assert layer.keys.shape[2] == layer.values.shape[2] == int((is_sink | is_anchor | in_window).sum())
        num_meta = int(is_meta.sum())
        limit = policy["memory_limit"] or num_meta
        assert layer.meta_keys.shape[2] == min(num_meta, limit)


@pytest.mark.parametrize(
    "memory", [{"window": 256, "memory_limit": 1_000}, {"window": 256, "anchors": "every", "every": 9}]
)
@torch.no_grad()
def test_bytes_of_the_cache_are_those_of_the_formula(memory: dict[str, Any]) -> None:
    ids = tokens("xxxxxxxxx_" * 1_639)[:, : 2**14]
    model = tiny_model(memory=memory, max_position_embeddings=2**14, num_hidden_layers=1, dtype=torch.float32)
    cache, read = DynamicCache(config=model.config), 0
    for length in (2**10, 2**12, 2**14):
        while read < length:
            model.model(ids[:, read : read + 1024], past_key_values=cache)
            read += 1024
        layer = cache.layers[0]
        kept = (layer.keys, layer.values, layer.meta_keys, layer.meta_values)
        expected = cache_bytes(model.config, num_positions=length, num_meta=int((ids[0, :length] == META).sum()))
        assert sum(tensor.nbytes for tensor in kept) == expected.total
        assert layer.meta_keys.nbytes + layer.meta_values.nbytes == expected.meta_attention


@all_pairs(name=POLICIES, length=(1, 5, 20, 33, 60))
@torch.no_grad()
def test_columns_of_any_length_are_those_of_the_formula(name: str, length: int) -> None:
    model, ids = tiny_model(memory=POLICIES[name]), tokens("xxx_xx_xxxxxxx_" * 4)[:, :length]
    cache = model(ids, use_cache=True).past_key_values
    expected = cache_bytes(model.config, num_positions=length, num_meta=int((ids == META).sum()), bytes_per_number=8)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == expected.text + expected.anchors


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_rows_follow_beams_and_selections(name: str) -> None:
    model, reference = models(memory=POLICIES[name])
    ids = tokens(*BATCHES["padded"])
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache, [17, 1, 1, 5])
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 5]))
    after = torch.cat([ids[[2, 0, 2]], tokens("_x__x", "xx_x_", "x_xx_", seed=1)], dim=1)
    real = attention_mask_of(after[:, 24:]).bool()
    continued = feed(model, after, cache, [2, 1, 2], start=24)
    assert_close(continued[real], uncached(reference, after)[:, 24:][real], TOLERANCE)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(feed(model, ids, cache, [9, 15])[0, -1], uncached(reference, ids)[0, -1], TOLERANCE)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_crop_forgets_tokens_and_refuses_to_bring_back_what_was_evicted(name: str) -> None:
    model, reference = models(memory=POLICIES[name])
    ids = tokens(*BATCHES["full"])
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    feed(model, ids, cache, [12, 1, 7], masked=False)
    cache.crop(-5)
    assert cache.get_seq_length() == 15
    num_kept = cache.layers[0].keys.shape[2]
    assert num_kept < 15
    after = torch.cat([ids[:, :15], tokens("_x__x_xx_x", "xx_x__xx_x", "x_xx__xx_x", seed=1)], dim=1)
    continued = feed(model, after, cache, [3, 1, 6], start=15, masked=False)
    assert_close(continued, reference(after, use_cache=False).logits[:, 15:], TOLERANCE)
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"back by 20 tokens.*window.*activate_past_recording"):
        cache.crop(-20)


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_inference_mode_may_begin_or_end_between_two_passes(modes: tuple[Any, Any]) -> None:
    model, reference = models(memory={"anchors": "meta", "window": 4})
    ids = tokens("x_xxx_xx_xxxx_xxxxx_x_xx")
    cache, logits = DynamicCache(config=model.config), []
    for start, stop, mode in ((0, 10, 0), (10, 13, 1), (13, 16, 0), (16, 24, 1)):
        with modes[mode]():
            logits.append(feed(model, ids, cache, [1] * (stop - start) if start else [stop], start=start, masked=False))
    with torch.no_grad():
        expected = reference(ids, use_cache=False).logits
    assert_close(torch.cat(logits, dim=1), expected, TOLERANCE)


@torch.no_grad()
def test_before_anything_was_evicted_crop_needs_no_record() -> None:
    model, reference = models(memory={"anchors": "meta", "window": 30})
    ids = tokens(*BATCHES["full"])
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache, [20], masked=False)
    cache.crop(-8)
    continued = feed(model, ids, cache, [12], start=12, masked=False)
    assert_close(continued, reference(ids, use_cache=False).logits[:, 12:], TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_generated_text_is_that_of_the_definition(name: str, options: dict[str, Any]) -> None:
    model, reference = models(memory=POLICIES[name])
    ids = tokens(".....xx_xxxx_xxx", "xxxxx_xxxx_xxx_x")
    if "num_beams" not in options and options:
        ids = ids[1:]  # as transformers wants it
    fixed = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "attention_mask": attention_mask_of(ids)}
    expected = reference.generate(ids, **fixed, use_cache=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(model.generate(ids, **fixed, **options), expected)
    if not options:  # and its positions are those of the forward pass
        logits = reference(expected, attention_mask=attention_mask_of(expected), use_cache=False).logits[:, 15:-1]
        logits[..., [META, PAD]] = -torch.inf
        assert torch.equal(logits.argmax(-1), expected[:, 16:])


@all_pairs(
    name=("evicted", "always", "limited", "every", "every_limited", "pooled", "pooled_limited"),
    batch=BATCHES,
    chunks=CHUNKS,
    meta_attention=("all", "none"),
)
@torch.no_grad()
def test_compact_positions_equal_the_definition(name: str, batch: str, chunks: str, meta_attention: str) -> None:
    memory = {**POLICIES[name], "positions": "compact"}
    model, reference = models(memory=memory, meta_attention_layers=meta_attention)
    ids = tokens(*BATCHES[batch])
    real = attention_mask_of(ids).bool()
    cached = feed(model, ids, DynamicCache(config=model.config), CHUNKS[chunks])[real]
    assert_close(cached, uncached(model, ids)[real], TOLERANCE)
    # RoPE's tables are float32, and the definition rotates by distances in place of positions
    assert_close(cached, uncached(reference, ids)[real], 1e-6)
    others = tiny_model(memory=POLICIES[name], meta_attention_layers=meta_attention)
    assert (cached - uncached(others, ids)[real]).abs().max() > 1e-3


@torch.no_grad()
def test_compact_positions_and_a_limit_read_texts_without_end() -> None:
    memory = {"anchors": "meta", "window": 6, "num_sinks": 2, "memory_limit": 5, "positions": "compact"}
    model = tiny_model(memory=memory, max_position_embeddings=16)
    ids = tokens("xxx_xx_xxxxxxx_" * 20, "xxxxxxxxxx_xxx_" * 20)
    cache = DynamicCache(config=model.config)
    cached = feed(model, ids, cache, [140, 1, 1, 158], masked=False)
    assert_close(cached, model(ids, use_cache=False).logits, TOLERANCE)
    assert cache.layers[0].keys.shape[2] == 2 + 6 + 5
    assert cache.layers[0].meta_keys.shape[2] == 5
    written = model.generate(ids[:1], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 320)
    for too_long in ({**memory, "memory_limit": None}, {**memory, "memory_limit": 14}):
        with pytest.raises(ValueError, match=r"model has 16 \(max_position_embeddings\): set memory.memory_limit"):
            tiny_model(memory=too_long, max_position_embeddings=16)(ids)
    with pytest.raises(ValueError, match="longer than the model's 16"):
        tiny_model(memory={**memory, "positions": "all"}, max_position_embeddings=16)(ids)


@torch.no_grad()
def test_a_refused_pass_leaves_the_cache_as_it_was() -> None:
    model, reference = models(
        memory={"anchors": "meta", "window": 6, "num_sinks": 2, "positions": "compact"}, max_position_embeddings=16
    )
    ids = tokens("xxx_xx_xxxxxxx_" * 6)
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache, [30], masked=False)
    with pytest.raises(ValueError, match=r"at 18 positions.*set memory\.memory_limit"):
        model(ids[:, 30:80], past_key_values=cache)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match='needs attn_implementation "sdpa"'):
        model(ids[:, 30:32], past_key_values=cache)
    model.set_attn_implementation("sdpa")
    assert cache.get_seq_length() == 30
    continued = feed(model, ids, cache, [4, 1, 5], start=30, masked=False)
    # RoPE's tables are float32
    assert_close(continued, reference(ids[:, :40], use_cache=False).logits[:, 30:], 1e-6)


@torch.no_grad()
def test_wrong_caches_and_masks_are_refused_in_one_sentence() -> None:
    model, ids = tiny_model(memory={"anchors": "meta", "window": 4}), tokens("xx_xx_xx")
    with pytest.raises(ValueError, match="no static cache: use DynamicCache"):
        StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model\.config\)"):
        model(ids, past_key_values=DynamicCache())
    plain = DynamicCache(config=tiny_model().config)
    with pytest.raises(ValueError, match="not made from this model's config"):
        model(ids, past_key_values=plain)
    other = DynamicCache(config=model.config)
    tiny_model(memory={"anchors": "meta", "window": 5})(ids, past_key_values=other)
    with pytest.raises(ValueError, match=r"made for another memory.*window=5.*window=4"):
        model(ids, past_key_values=other)
    with pytest.raises(ValueError, match="attention_mask as"):
        model(ids, attention_mask=torch.ones(1, 1, 8, 8).tril().bool())
    with pytest.raises(ValueError, match="one document a row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), use_cache=False)
