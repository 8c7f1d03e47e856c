"""Memory mode's fast masks see exactly the pairs of its definition, and attend alike, with gradients."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from memory_policies import BATCHES, POLICIES
from metatokens.model.memory import MemoryMask, MemoryPolicy, describe_tokens, take_columns
from metatokens.model.memory_reference import MemoryReferenceForCausalLM, pooling_weights, visible_pairs
from pairwise import all_pairs
from tiny_models import EOS, META, PAD, assert_close, attention_mask_of, gradients, tiny_model, tokens


def sees(policy: MemoryPolicy, tokens_: str, query: int, key: int) -> bool:
    """Say in plain words of a row, drawn without padding, whether the query sees the key."""
    if key >= query:
        return key == query
    is_meta = [token == "_" and policy.anchors != "every" for token in tokens_]
    text = [place for place in range(len(tokens_)) if not is_meta[place]]
    sinks = text[: policy.num_sinks]
    if policy.anchors != "every":
        anchors = [place for place in range(query + 1) if is_meta[place]]
    else:
        anchors = [
            p for number, p in enumerate(text, 1) if number % policy.every == 0 and p <= query and p not in sinks
        ]
    if policy.memory_limit is not None:
        anchors = anchors[-policy.memory_limit :]
    in_window = sum(key < place <= query for place in text) < policy.window
    if not is_meta[key]:
        return in_window or key in sinks or key in anchors
    return key in anchors and (not in_window or is_meta[query] or policy.reveal == "always")


def masks_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids == META, ids != PAD


@all_pairs(name=POLICIES, batch=BATCHES)
def test_definition_is_what_a_loop_over_pairs_says(name: str, batch: str) -> None:
    policy = MemoryPolicy(**POLICIES[name])
    ids = tokens(*BATCHES[batch])
    is_meta, is_real = masks_of(ids)
    actual = visible_pairs(policy, is_meta, is_real)
    for row, drawn in enumerate(BATCHES[batch]):
        text = drawn.replace(".", "")
        length = len(text)
        expected = [[sees(policy, text, query, key) for key in range(length)] for query in range(length)]
        assert actual[row][is_real[row]][:, is_real[row]].tolist() == expected


def test_a_pool_is_the_text_since_the_anchor_before_within_the_window() -> None:
    policy = MemoryPolicy(window=3, num_sinks=1, anchors="pooled")
    ids = tokens("_xx_xxxxx__x", "....xxx_xx_x")
    pools: list[dict[int, list[int]]] = [{3: [1, 2], 9: [6, 7, 8]}, {7: [4, 5, 6], 10: [8, 9]}]
    expected = torch.zeros(2, 12, 12, dtype=torch.float64)
    for row, own in enumerate(pools):
        for place in range(12):
            members = own.get(place, [place])
            expected[row, place, members] = 1 / len(members)
    assert torch.equal(pooling_weights(policy, *masks_of(ids)), expected)


@all_pairs(name=POLICIES, batch=BATCHES, chunk=(1, 5, 24, 100))
def test_dense_mask_and_chunks_attend_as_the_definition(name: str, batch: str, chunk: int) -> None:
    policy = MemoryPolicy(**POLICIES[name])
    is_meta, is_real = masks_of(tokens(*BATCHES[batch]))
    columns = describe_tokens(policy, is_meta, is_real)
    mask = MemoryMask(policy, columns, columns, chunk=chunk)
    expected_mask = visible_pairs(policy, is_meta, is_real)[:, None]
    assert torch.equal(mask.dense(), expected_mask)

    generator = torch.Generator().manual_seed(0)
    shape = (len(is_meta), 2, is_meta.shape[1], 8)
    query, key, value, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    results = []
    for way in ("definition", "chunks", "chunks of sdpa"):
        leaves = [tensor.clone().requires_grad_(way in ("definition", "chunks")) for tensor in (query, key, value)]
        if way == "definition":
            output = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=expected_mask, scale=0.3)
        elif way == "chunks":
            output = mask.attend(*leaves, scaling=0.3).transpose(1, 2)
        else:
            with torch.no_grad():
                output = mask.attend(*leaves, scaling=0.3).transpose(1, 2)
        if output.requires_grad:
            (output * weight).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=False):
            assert_close(actual, expected, 1e-10)
    assert [len(result) for result in results] == [4, 4, 1]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["evicted", "every_limited"])
def test_flex_attention_over_permuted_keys_attends_as_the_definition(name: str) -> None:
    policy = MemoryPolicy(**POLICIES[name])
    is_meta, is_real = masks_of(tokens(*BATCHES["padded"]))
    columns = describe_tokens(policy, is_meta, is_real)
    mask = MemoryMask(policy, columns, columns)
    query, key, value = torch.randn(3, 3, 2, 24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    permuted = [take_columns(tensor, mask.permutation) for tensor in (key, value)]
    actual = flex_attention(query, *permuted, block_mask=mask.flex, scale=0.3)
    seen = visible_pairs(policy, is_meta, is_real)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3)
    assert_close(actual, expected, 1e-10)


def test_a_chunk_visits_sinks_anchors_and_its_window_alone() -> None:
    policy = MemoryPolicy(anchors="meta", window=64, num_sinks=4)
    is_meta = torch.zeros(1, 4000, dtype=torch.bool)
    is_meta[0, 9::10] = True
    columns = describe_tokens(policy, is_meta)
    mask = MemoryMask(policy, columns, columns)
    for chunk in mask.chunks:
        text = (~is_meta[0, chunk.start : chunk.stop]).sum() + 64
        assert chunk.mask.shape[-1] <= 4 + is_meta[0, : chunk.stop].sum() + text


@pytest.mark.parametrize("name", POLICIES)
def test_loss_and_gradients_of_a_long_text_equal_those_of_the_definition(name: str) -> None:
    # longer than a chunk, so that the model takes the fast form
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, EOS, (2, 300), generator=generator)
    ids[0, 5::7], ids[1, torch.randperm(300, generator=generator)[:40]] = META, META
    ids[1, :30] = PAD
    results = []
    for model_class in ({}, {"model_class": MemoryReferenceForCausalLM}):
        model = tiny_model(memory={**POLICIES[name], "window": 20}, max_position_embeddings=300, **model_class)
        labels = ids.masked_fill(ids == PAD, -100)
        loss = model(ids, attention_mask=attention_mask_of(ids), labels=labels, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert_close(results[0][0], results[1][0], 1e-10)
    for parameter, gradient in results[1][1].items():
        assert_close(results[0][1][parameter], gradient, 1e-10)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("memory", [{"reveal": "always"}, {"anchors": "every"}])
@torch.no_grad()
def test_a_window_as_long_as_the_text_gives_the_bits_of_the_model_without_memory(
    memory: dict[str, Any], backend: str
) -> None:
    ids = tokens("x_xx_xxxx_", "...xxx_x_x")
    model, plain = (
        tiny_model(attn_implementation=backend, dtype=torch.float32, **fields)
        for fields in ({"memory": {"anchors": "meta", "window": 10, **memory}}, {})
    )
    mask = attention_mask_of(ids)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    shorter = tiny_model(
        attn_implementation=backend,
        dtype=torch.float32,
        memory={"anchors": "meta", "window": 2, "num_sinks": 0, **memory},
    )
    assert not torch.equal(shorter(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_text_within_the_window_is_the_plain_models_wherever_its_anchors_stand() -> None:
    # hidden until its text is evicted, and without a position of its own, an anchor changes nothing for the text
    drawn = ("x_xx_xxxx_", "_xxx_xx_xx", "xxx__xx_xx")
    model = tiny_model(meta_attention_layers="none", memory={"anchors": "meta", "window": 10, "positions": "text"})
    plain = tiny_model(meta_attention_layers="none")
    ids = tokens(*drawn)
    text = ids[ids != META].view(3, 7)
    assert_close(model(ids).logits[ids != META].view(3, 7, -1), plain(text).logits, 1e-10)
    short = tiny_model(
        meta_attention_layers="none", dtype=torch.float32, memory={"anchors": "meta", "window": 7, "positions": "text"}
    )
    bits = tiny_model(meta_attention_layers="none", dtype=torch.float32)
    assert torch.equal(short(text).logits, bits(text).logits)


@pytest.mark.long  # flex attention is compiled, for the instructions of this processor and no others
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="torch.compile makes kernels for this processor alone")
@torch.no_grad()
def test_a_model_under_flex_attention_equals_the_definition() -> None:
    ids = tokens(*BATCHES["padded"])
    logits = [
        tiny_model(memory=POLICIES["evicted"], dtype=torch.float32, **fields)(
            ids, attention_mask=attention_mask_of(ids), use_cache=False
        ).logits[ids != PAD]
        for fields in ({"attn_implementation": "flex_attention"}, {"model_class": MemoryReferenceForCausalLM})
    ]
    assert_close(logits[0], logits[1], 1e-4)


def test_the_drawing_of_the_guide_is_drawn_from_the_definition() -> None:
    folder = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("memory_drawing", folder / "memory_drawing.py")
    assert spec is not None
    assert spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    assert (folder / "memory.svg").read_text() == drawing.draw()
