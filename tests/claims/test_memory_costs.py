"""What memory mode costs: the peak of prefill follows what is kept, and a step of decoding copies no cache."""

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from metatokens.model.accounting import cache_bytes
from metatokens.model.memory import MemoryMask, MemoryPolicy, describe_tokens
from tiny_models import META, tiny_model, tokens
from watched import LiveBytes, Watched

CHUNK = 256
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 8192}


def text(length: int) -> Tensor:
    return tokens("xxxxxxxxx_" * (length // 10 + 1))[:, :length]


@torch.no_grad()
def read(model: Any, length: int) -> tuple[int, int]:
    """Return the peak of reading a text in chunks, and the bytes of the cache that is left, by counting tensors."""
    cache, ids = DynamicCache(config=model.config), text(length)
    with LiveBytes() as live:
        for part in ids.split(CHUNK, dim=1):
            model.model(part, past_key_values=cache, use_cache=True)
    layers = [[layer.keys, layer.values, layer.meta_keys, layer.meta_values] for layer in cache.layers]
    return live.peak, sum(tensor.nbytes for tensors in layers for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("memory", [{"window": 64}, {"window": 64, "anchors": "every", "every": 64}])
def test_the_peak_of_prefill_grows_with_the_kept_columns_alone(memory: dict[str, Any]) -> None:
    model, full = tiny_model(memory=memory, **SHAPE), tiny_model(**SHAPE)
    peaks, beside = {}, {}
    for length in (512, 2048):
        peaks[length], held = read(model, length)
        num_meta = int((text(length) == META).sum())
        expected = cache_bytes(model.config, num_positions=length, num_meta=num_meta, bytes_per_number=8)
        assert held == expected.total
        beside[length] = peaks[length] - 2 * held  # a layer joins, sorts and visits its own columns
    assert beside[2048] < 1.5 * beside[512]
    assert read(full, 2048)[0] - read(full, 512)[0] > 3 * (peaks[2048] - peaks[512])


def test_the_wider_keys_of_transformer_xl_are_counted() -> None:
    model = tiny_model(memory={"anchors": "meta", "window": 64}, position_encoding="transformer_xl", **SHAPE)
    num_meta = int((text(300) == META).sum())
    expected = cache_bytes(model.config, num_positions=300, num_meta=num_meta, bytes_per_number=8)
    assert read(model, 300)[1] == expected.total


def test_the_peak_of_prefill_does_not_grow_once_the_memory_is_full() -> None:
    model = tiny_model(memory={"anchors": "meta", "window": 64, "memory_limit": 60}, **SHAPE)
    assert read(model, 1024) == read(model, 2048)


def test_the_backward_pass_makes_no_gradient_of_all_keys_for_each_chunk() -> None:
    columns = describe_tokens(MemoryPolicy(anchors="meta", window=64), text(4000) == META)
    mask = MemoryMask(MemoryPolicy(window=64), columns, columns)
    leaves = [torch.randn(1, 1, 4000, 8, requires_grad=True) for _ in range(3)]
    output = mask.attend(*leaves, scaling=0.3).sum()
    with Watched() as watched:
        output.backward()
    of_all = [count for (_, shape), count in watched.written.items() if prod(shape) == 4000 * 8]
    assert sum(of_all) < len(mask.chunks) // 2


@torch.no_grad()
def test_a_step_writes_text_over_what_leaves_the_window_and_copies_no_cache() -> None:
    model, ids = tiny_model(memory={"anchors": "meta", "window": 64}, **SHAPE), text(2020)
    cache = DynamicCache(config=model.config)
    model(ids[:, :2000], past_key_values=cache)
    columns = cache.layers[0].keys.shape[2]
    assert columns == 4 + 64 + 200
    for place in range(2000, 2009):
        with Watched() as watched:
            model(ids[:, place : place + 1], past_key_values=cache)
        assert cache.layers[0].keys.shape[2] == columns
        # the mask is that long; the keys are 64 times as long
        assert max(prod(shape) for name, shape in watched.written if not name.endswith("_")) <= 2 * columns


@torch.no_grad()
def test_a_step_leaves_alone_what_others_put_into_the_cache() -> None:
    model, ids = tiny_model(memory={"anchors": "meta", "window": 8}), text(40)
    logits = []
    for is_shared in (False, True):
        cache = DynamicCache(config=model.config)
        model(ids[:, :36], past_key_values=cache)
        layer = cache.layers[0]
        shared = layer.keys.clone()
        kept = shared.clone()
        if is_shared:
            layer.keys = shared
        logits.append(model(ids[:, 36:37], past_key_values=cache).logits)
        assert torch.equal(shared, kept)
        assert not torch.equal(layer.keys, kept)
    assert torch.equal(*logits)
