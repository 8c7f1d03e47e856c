"""Dual cross-attention: meta-tokens read the text before them, and text the meta-tokens before it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from cached_passes import CACHES, feed, uncached
from lens_models import build
from metatokens.errors import UsageError
from metatokens.lens import Lens
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.accounting import cache_bytes, count_parameters, forward_flops
from metatokens.model.cross_attention import CrossAttention, CrossPack
from metatokens.model.reference import DenseReferenceForCausalLM
from tiny_models import META, assert_close, attention_mask_of, gradients, shared_model, tiny_config, tiny_model, tokens

CROSS = ["cross", "gather"]
RAGGED = ("x_xxx_xx_xxx", "xxxxxxxxxxxx", "____xxxx_xx_")


def second_attention(model: MetaTokenForCausalLM, ids: Tensor, **inputs: Any) -> tuple[CrossAttention, list[Any]]:
    """Return the second attention of the only block, with what it was given and what it returned."""
    attention: Any = model.model.layers[0].meta_attn
    calls: list[Any] = []
    hook = attention.register_forward_hook(lambda _, args, output: calls.append((*args[:2], output[0])))
    with torch.no_grad():
        model(ids, use_cache=False, **inputs)
    hook.remove()
    return attention, calls


@pytest.mark.parametrize("over", CROSS)
@torch.no_grad()
def test_each_row_is_a_softmax_over_the_tokens_of_the_other_kind_before_it(over: str) -> None:
    model = tiny_model(meta_attention_over=over, num_hidden_layers=1, position_encoding="none")
    ids = tokens("x_xx_x__x")
    attention, [(hidden, _, update)] = second_attention(model, ids)
    query, key, value = (part[0] for part in attention.project(hidden, None))
    is_meta = (ids[0] == META).tolist()
    num_empty = 0
    for row, reads_text in enumerate(is_meta):
        seen = [column for column in range(row) if is_meta[column] != reads_text]
        if not seen or (over == "gather" and not reads_text):
            num_empty += 1
            assert not update[0, row].any()
            continue
        weights = (query[:, row : row + 1] @ key[:, seen].transpose(1, 2) / 8**0.5).softmax(-1)
        assert_close(update[0, row], attention.o_proj((weights @ value[:, seen]).flatten()), 1e-10)
    assert num_empty == {"cross": 1, "gather": 5}[over]


def test_no_mask_has_an_entry_for_every_pair_of_tokens() -> None:
    ids = tokens("x_xxx_xxx_xxxxx_xxxx", "xxxxxxxx_xxxxx_xxxxx")
    for over, shapes in (("cross", [(2, 1, 4, 20), (2, 1, 20, 4)]), ("gather", [(2, 1, 4, 20)])):
        _, [(_, pack, _)] = second_attention(tiny_model(meta_attention_over=over, num_hidden_layers=1), ids)
        assert isinstance(pack, CrossPack)
        assert [tuple(direction.mask.shape) for direction in pack.directions] == shapes


@pytest.mark.parametrize("over", CROSS)
@torch.no_grad()
def test_blocks_without_positions_are_those_of_the_dense_definition(over: str) -> None:
    shape = {"meta_attention_over": over, "position_layers": [1]}
    packed, dense = tiny_model(**shape), tiny_model(**shape, model_class=DenseReferenceForCausalLM)
    ids = tokens(*RAGGED)
    assert_close(packed(ids).logits, dense(ids).logits, 1e-10)
    assert (packed(ids).logits - tiny_model(meta_attention_over=over)(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("over", CROSS)
@torch.no_grad()
def test_text_reads_meta_tokens_only_where_there_is_a_way_back(over: str) -> None:
    ids = tokens("x_xx_xxx")
    model, plain = (
        tiny_model(num_hidden_layers=1, meta_attention_over=over, meta_attention_layers=layers)
        for layers in ("all", "none")
    )
    change = (model(ids).logits - plain(ids).logits).abs().amax(-1)[0]
    assert (change[ids[0] == META] > 0.01).all()
    text = change[ids[0] != META]
    assert text[0] == 0
    assert (text[1:] > 0.01).all() if over == "cross" else not text.any()


@pytest.mark.parametrize("over", CROSS)
@torch.no_grad()
def test_a_sequence_of_one_kind_is_that_of_a_model_without_a_second_attention(over: str) -> None:
    model, plain = (tiny_model(meta_attention_over=over, meta_attention_layers=layers) for layers in ("all", "none"))
    for picture in ("________", "xxxxxxxx"):
        assert torch.equal(model(tokens(picture)).logits, plain(tokens(picture)).logits)
    assert second_attention(model, tokens("xxxxxxxx"))[1] == []


def test_training_on_text_alone_still_touches_every_parameter() -> None:
    model = tiny_model(meta_attention_over="cross").train()
    ids = tokens("xxxxxx")
    model(ids, labels=ids).loss.backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("over", CROSS)
@pytest.mark.parametrize("kind", CACHES)
@torch.no_grad()
def test_logits_after_a_change_of_rows_equal_those_of_the_changed_rows(kind: str, over: str) -> None:
    model = shared_model(meta_attention_over=over)
    ids = tokens(*RAGGED)
    rows = torch.tensor([2, 0, 2])
    after = torch.cat([ids[rows], tokens("_xx", "x_x", "xx_", seed=1)], dim=1)
    cache = CACHES[kind](model.config)
    feed(model, ids, cache, [12])
    cache.reorder_cache(rows)
    assert_close(feed(model, after, cache, [1, 1, 1], start=12), uncached(model, after)[:, 12:], 1e-10)
    cache.reset()
    assert_close(feed(model, ids, cache, [7, 5]), uncached(model, ids), 1e-10)


@torch.no_grad()
def test_logits_after_repeating_and_selecting_rows_equal_those_of_these_rows() -> None:
    model = shared_model(meta_attention_over="cross")
    ids = tokens(*RAGGED)
    rows = torch.tensor([0, 2, 3, 5])
    after = torch.cat([ids.repeat_interleave(2, dim=0)[rows], tokens("_xx", "x_x", "xx_", "xxx", seed=1)], dim=1)
    cache = DynamicCache(config=model.config)
    feed(model, ids, cache, [12])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(rows)
    assert_close(feed(model, after, cache, [1, 2], start=12), uncached(model, after)[:, 12:], 1e-10)


@pytest.mark.parametrize("over", CROSS)
@torch.no_grad()
def test_a_cached_step_reads_no_more_columns_than_it_must(over: str) -> None:
    model = tiny_model(meta_attention_over=over, num_hidden_layers=1)
    ids = tokens("x_xxx_xxxx_x")
    attention: Any = model.model.layers[0].meta_attn
    shapes: list[list[tuple[int, ...]]] = []
    attention.register_forward_hook(
        lambda _, args, __: shapes.append([tuple(direction.mask.shape[2:]) for direction in args[1].directions])
    )
    feed(model, ids, DynamicCache(config=model.config), [9, 1, 1, 1])
    back = over == "cross"
    text, meta = [(1, 2)] if back else [], [(1, 11)] + ([(1, 3)] if back else [])
    assert shapes[1:] == [text, meta, [(1, 3)] if back else []]


def test_parameters_are_those_of_meta_attention() -> None:
    sizes = {over: tiny_model(meta_attention_over=over).num_parameters() for over in ("meta", *CROSS)}
    assert len(set(sizes.values())) == 1
    assert count_parameters(tiny_config(meta_attention_over="cross")).total == sizes["meta"]


@pytest.mark.parametrize("over", CROSS)
def test_operations_counted_are_those_of_the_products_whose_pairs_may_meet(over: str) -> None:
    ids = tokens("x_xxx_xxx_xxxxx_xxxx")
    num_tokens, num_meta, width, layers = 20, 4, 32, 2
    model, plain = (
        tiny_model(meta_attention_over=over, meta_attention_layers=which, attn_implementation="eager")
        for which in ("all", "none")
    )
    measured, counted = [], []
    for one in (model, plain):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(ids, use_cache=False)
        measured.append(counter.get_total_flops())
        counted.append(forward_flops(one.config, num_positions=num_tokens, num_meta=num_meta))
    directions = {"cross": 2, "gather": 1}[over]
    projections = layers * 2 * num_tokens * 4 * width * width
    assert measured[0] - measured[1] == projections + layers * 4 * width * directions * num_meta * num_tokens
    # of each meta-token and each text token, one reads the other, or half of the time
    assert counted[0] - counted[1] == projections + layers * 4 * width * directions * num_meta * 16 // 2


@pytest.mark.parametrize("over", CROSS)
@torch.no_grad()
def test_bytes_counted_are_those_that_the_cache_holds(over: str) -> None:
    model = tiny_model(meta_attention_over=over)
    cache = DynamicCache(config=model.config)
    model(tokens("x_xxx_xx_xxx"), past_key_values=cache)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.meta_keys, layer.meta_values))
    assert held == cache_bytes(model.config, num_positions=12, num_meta=3, bytes_per_number=8).meta_attention


@pytest.mark.parametrize("over", CROSS)
@torch.no_grad()
def test_generation_with_a_static_cache_equals_that_with_a_growing_one(over: str) -> None:
    model = tiny_model(meta_attention_over=over)
    ids = tokens("..x_xx", "xx_xxx")
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": attention_mask_of(ids), "eos_token_id": None}
    growing = model.generate(ids, **options)
    static = model.generate(ids, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(growing, static)


@torch.no_grad()
def test_the_collators_indices_change_nothing() -> None:
    model = shared_model(meta_attention_over="cross")
    ids = tokens("x_xx_xxx", "_xxxx_xx")
    meta_indices = (ids == META).nonzero()[:, 1].view(2, -1)
    assert torch.equal(model(ids, meta_indices=meta_indices).logits, model(ids).logits)


def test_a_backend_without_masks_of_pairs_is_refused() -> None:
    model = tiny_model(meta_attention_over="cross")
    model.config._attn_implementation = "flash_attention_2"  # as where that package is installed
    with pytest.raises(ValueError, match='"cross" needs attn_implementation "eager" or "sdpa"'):
        model(tokens("x_xx"))


def test_the_lens_refuses_what_it_does_not_read() -> None:
    with pytest.raises(UsageError, match="meta_attention_over gather, which is two"):
        Lens(build(meta_attention_over="gather"))
    Lens(build(meta_attention_over="gather", meta_attention_layers="none"))
