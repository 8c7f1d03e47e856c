"""The models of `metatokens.baselines` decode from a cache and come back from disk like the model itself."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

import metatokens  # noqa: F401 - registers the models
from baseline_models import BASELINES, PATTERNS, RECURRENCES, baseline_model
from cached_passes import PIECES, feed, uncached
from metatokens.baselines.landmark import read_best_blocks
from metatokens.model.export import save_model
from pairwise import all_pairs
from tiny_models import assert_close, attention_mask_of, gradients, tokens

BATCHES = {
    "ragged": ("xx_xxx_xx_xx", "xxxxxxxxxxxx", "__x_xxxx_xx_"),
    "left_padded": ("....x_xx_x__", "xx_xxxxxxx_x", "...........x"),
}
IDS = tokens("x_xx_x__xxxxx", "xxxxxxx_xxxx_")


@all_pairs(name=BASELINES, batch=BATCHES, pieces=PIECES, encoding=("rope", "alibi"))
@torch.no_grad()
def test_cached_logits_of_baselines_equal_uncached(name: str, batch: str, pieces: str, encoding: str) -> None:
    model = baseline_model(name, position_encoding=encoding)
    ids = tokens(*BATCHES[batch])
    real = attention_mask_of(ids).bool()
    cached = feed(model, ids, DynamicCache(config=model.config), PIECES[pieces])
    assert_close(cached[real], uncached(model, ids)[real], 1e-10)


@pytest.mark.parametrize("name", ["longformer_meta", "landmark", "block_recurrent"])
@torch.no_grad()
def test_cached_logits_equal_uncached_with_meta_attention_as_well(name: str) -> None:
    model = baseline_model(name, meta_attention_layers="all")
    ids = tokens(*BATCHES["left_padded"])
    real = attention_mask_of(ids).bool()
    cached = feed(model, ids, DynamicCache(config=model.config), PIECES["prompt_then_tokens"])
    assert_close(cached[real], uncached(model, ids)[real], 1e-10)


@pytest.mark.parametrize("num_best", [1, 2])
@torch.no_grad()
def test_cached_logits_equal_uncached_when_only_the_best_blocks_are_read(num_best: int) -> None:
    model = baseline_model("landmark")
    read_best_blocks(model, num_best)
    ids = tokens(*BATCHES["ragged"])
    for pieces in PIECES.values():
        assert_close(feed(model, ids, DynamicCache(config=model.config), pieces), uncached(model, ids), 1e-10)


@pytest.mark.parametrize(
    ("name", "num_removed"),
    # a state cannot be taken back
    [(name, removed) for name in BASELINES for removed in ((0,) if name in RECURRENCES else (1, 5))],
)
@torch.no_grad()
def test_logits_after_crop_and_reordered_rows_equal_uncached(name: str, num_removed: int) -> None:
    model = baseline_model(name)
    before = tokens(*BATCHES["ragged"])
    kept = 12 - num_removed
    cache = DynamicCache(config=model.config)
    feed(model, before, cache, [7, 5])
    cache.crop(-num_removed)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 5]))
    after = torch.cat([before[[2, 0, 2], :kept], tokens("_x__x", "xx_x_", "x_xx_", seed=1)], dim=1)
    continued = feed(model, after, cache, [2, 1, 2], start=kept)
    assert_close(continued, uncached(model, after)[:, kept:], 1e-10)


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_reset_cache_remembers_nothing(name: str) -> None:
    model = baseline_model(name)
    cache = DynamicCache(config=model.config)
    feed(model, tokens("__x_x_x__x", seed=1), cache, [6, 4])
    cache.reset()
    ids = tokens("x__x_xxx_x")
    assert_close(feed(model, ids, cache, [6, 4]), uncached(model, ids), 1e-10)


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_generation_equals_that_without_a_cache(name: str) -> None:
    model = baseline_model(name)
    ids = tokens("..x_xx_xx", "xx_xxx_x_")
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": attention_mask_of(ids), "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "longformer_meta"])
@torch.no_grad()
def test_patterns_that_ask_for_no_meta_token_work_with_a_static_cache(name: str) -> None:
    model = baseline_model(name)
    ids = tokens(*BATCHES["left_padded"])
    real = attention_mask_of(ids).bool()
    cached = feed(model, ids, StaticCache(config=model.config, max_cache_len=16), [8, 1, 1, 1, 1])
    assert_close(cached[real], uncached(model, ids)[real], 1e-10)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": attention_mask_of(ids), "eos_token_id": None}
    static = model.generate(ids, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(ids, **options))


@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_auto_classes_load_the_bits_of_the_saved_model(name: str, tmp_path: Path) -> None:
    model = baseline_model(name)
    save_model(model, tmp_path)
    assert not list(tmp_path.glob("*.py"))
    causal, decoder = AutoModelForCausalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    for loaded in (causal, decoder):
        for tensor in loaded.parameters():
            tensor.data = tensor.clone()  # kernels round by address, and in a file no tensor needs to be aligned
    assert type(causal) is type(model)
    assert type(decoder) is type(model.model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["model_type"] == model.config.model_type
    assert torch.equal(causal(IDS).logits, model(IDS).logits)
    assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize("name", BASELINES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    results = []
    for is_checkpointed in (False, True):
        model = baseline_model(name).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    for name_, gradient in results[0].items():
        assert_close(results[1][name_], gradient, 1e-6)
