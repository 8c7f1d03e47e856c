"""Eviction frees the cache of columns and changes nothing else: what is left is attended to as if the rest were cut."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from metatokens.analysis.causal.eviction import (
    Condition,
    check_evictable,
    continue_in_ways,
    continue_sequence,
    count_kept,
    evict,
    measure_eviction,
    read_prefix,
    received_attention,
)
from metatokens.analysis.causal.policies import POLICIES, AlwaysKept, Prefix, choose_columns
from metatokens.baselines.masks import SparseAttentionConfig
from metatokens.errors import UsageError
from metatokens.lens import Lens, edits
from tiny_models import VOCAB_SIZE, randomize, tiny_model, tokens

PREFIX, LENGTH = 24, 34
ROW = "xxx_xxxxx_xx_xxxxxxx_xxxxxxx_xxxxx"
KEPT = np.array([0, 1, 3, 9, 12, 20, 22, 23])
ALWAYS = AlwaysKept(sinks=2, newest=3)


def gpt2() -> Any:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return randomize(GPT2LMHeadModel(config)).eval()


def gpt_neo(**changes: Any) -> Any:
    fields = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "attention_types": [[["global"], 2]]} | changes
    config = GPTNeoConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, **fields)
    return randomize(GPTNeoForCausalLM(config)).eval()


MODELS = {
    "rope": tiny_model,
    "learned": lambda: tiny_model(position_encoding="learned"),
    "none": lambda: tiny_model(position_encoding="none"),
    "all": lambda: tiny_model(meta_attention_over="all"),
    "random": lambda: tiny_model(meta_attention_over="random", random_ratio=0.4),
    "one layer": lambda: tiny_model(meta_attention_layers=[1]),
    "plain": lambda: tiny_model(meta_attention_layers="none"),
    "retarget": lambda: tiny_model(loss_policy="retarget"),
    "gpt2": gpt2,
    "gpt-neo": gpt_neo,
}


@pytest.fixture(params=MODELS, name="lens")
def fixture_lens(request: pytest.FixtureRequest) -> Lens:
    return Lens(MODELS[request.param]())


def mask_of(columns: np.ndarray) -> torch.Tensor:
    return torch.isin(torch.arange(LENGTH), torch.from_numpy(columns))[None]


def test_what_follows_sees_the_kept_columns_as_if_the_edges_to_the_others_were_cut(lens):
    ids = tokens(ROW)
    prefix, rest = ids[:, :PREFIX], ids[:, PREFIX:]
    cache = lens(prefix, use_cache=True).past_key_values
    evicted = continue_sequence(lens, cache, rest, PREFIX, columns=KEPT)
    before = torch.arange(LENGTH)[None] < PREFIX
    cut = {"query": ~before, "key": before & ~mask_of(KEPT)}
    branches = ["attn", "meta_attn"] if getattr(lens.model.config, "meta_attention_over", "") == "all" else ["attn"]
    with lens.edit(*(edits.cut_edges(None, **cut, branch=branch) for branch in branches)):
        expected = lens(ids).logits[:, PREFIX:]
    torch.testing.assert_close(evicted, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(evicted, lens(ids).logits[:, PREFIX:], atol=1e-2)


def test_the_whole_budget_costs_exactly_nothing(lens):
    losses = measure_eviction(lens, tokens(ROW, ROW, seed=3).split(1), PREFIX, budgets=(1.0, 0.4))
    assert losses.keys() == {None, *(Condition(policy, budget) for policy in POLICIES for budget in (1.0, 0.4))}
    for policy in POLICIES:
        assert (losses[Condition(policy, 1.0)] == losses[None]).all()
        assert (losses[Condition(policy, 0.4)] != losses[None]).all()


def test_ways_to_evict_continue_together_as_they_would_alone(lens):
    ids = tokens(ROW, seed=5)
    prefix, cache = read_prefix(lens, ids[:, :PREFIX])
    columns = [choose_columns(policy, prefix, 10, ALWAYS) for policy in POLICIES]
    together = continue_in_ways(lens, cache, ids[:, PREFIX:], PREFIX, columns)
    for row, one in zip(together, columns, strict=True):
        alone = continue_sequence(lens, cache, ids[:, PREFIX:], PREFIX, columns=one)
        torch.testing.assert_close(row, alone[0], rtol=1e-9, atol=1e-9)


def test_a_budget_is_a_share_of_the_prefix():
    assert [count_kept(budget, PREFIX) for budget in (1.0, 0.4, 0.001)] == [PREFIX, 10, 1]


def test_full_loss_is_that_of_the_whole_sequence(lens):
    rows = tokens(ROW, seed=4)
    losses = measure_eviction(lens, [rows], PREFIX, policies=("window",), budgets=(0.5,))
    logits = lens(rows).logits[0].double().log_softmax(-1)
    nats, is_meta = [], lens.is_meta(rows)[0]
    for position in range(PREFIX + 1, LENGTH):
        if is_meta[position]:
            continue
        source = position - 1
        while lens.loss_policy == "retarget" and is_meta[source]:
            source -= 1
        nats.append(-float(logits[source, rows[0, position]]))
    assert losses[None][0] == pytest.approx(np.mean(nats), abs=1e-4)


def test_rows_with_unequal_metas_lose_columns_as_they_would_alone():
    lens = Lens(tiny_model())
    ids = tokens(ROW, "x" * 5 + "_" + "x" * 28)
    columns = torch.from_numpy(np.stack([KEPT, KEPT + np.array([0, 0, 1, 1, 1, 0, 0, 0])]))
    positions = torch.arange(PREFIX, LENGTH)[None]

    def run(rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        cache = evict(lens(rows[:, :PREFIX], use_cache=True).past_key_values, kept)
        logits = []
        for i in range(LENGTH - PREFIX):  # token by token: each step meets the renumbered columns
            step = {"position_ids": positions[:, i : i + 1], "past_key_values": cache, "use_cache": True}
            logits.append(lens(rows[:, PREFIX + i : PREFIX + i + 1], **step).logits)
        return torch.cat(logits, 1)

    together = run(ids, columns)
    for row in range(2):
        alone = run(ids[row : row + 1], columns[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    whole = continue_sequence(
        lens, lens(ids[:1, :PREFIX], use_cache=True).past_key_values, ids[:1, PREFIX:], PREFIX, columns=KEPT
    )
    torch.testing.assert_close(together[:1], whole, rtol=1e-4, atol=1e-4)


def test_memory_is_freed_the_given_cache_stays_and_the_meta_part_is_whole():
    lens = Lens(tiny_model())
    cache = lens(tokens(ROW)[:, :PREFIX], use_cache=True).past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    kept = evict(cache, torch.from_numpy(KEPT)[None])
    assert kept.get_seq_length() == len(KEPT)
    for layer, old, keys in zip(kept.layers, cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[:, :, KEPT])
        assert layer.keys.untyped_storage().nbytes() == keys.nbytes * len(KEPT) // PREFIX
        assert torch.equal(layer.meta_keys, old.meta_keys)
        assert torch.equal(old.keys, keys)
        # metas at 3, 9, 12 and 20 are among those kept
        assert layer.meta_columns.tolist() == [[2, 3, 4, 5]]
    dropped = evict(cache, torch.tensor([[0, 1, 9, 23]]))
    assert dropped.layers[0].meta_columns.tolist() == [[2, 2, 3, 3]]


@pytest.mark.usefixtures("other_copy_of_the_cache")
def test_a_cache_of_another_copy_of_the_models_code_is_evicted_from_as_well():
    lens = Lens(tiny_model())
    cache = lens(tokens(ROW)[:, :PREFIX], use_cache=True).cache
    assert type(cache.layers[0]).__module__ == "other_copy_of_the_cache"
    kept = evict(cache, torch.from_numpy(KEPT)[None])
    assert kept.layers[0].meta_columns.tolist() == [[2, 3, 4, 5]]


def test_columns_may_differ_by_layer_and_head():
    lens = Lens(tiny_model())
    cache = lens(tokens(ROW)[:, :PREFIX], use_cache=True).past_key_values
    columns = torch.stack([torch.randperm(PREFIX)[:5].sort().values for _ in range(8)]).view(1, 2, 4, 5)
    kept = evict(cache, columns)
    for number in range(2):
        for head in range(4):
            expected = cache.layers[number].values[0, head, columns[0, number, head]]
            assert torch.equal(kept.layers[number].values[0, head], expected)


def prefix_of(picture: str, *, received: np.ndarray | None = None, key: int = 0) -> Prefix:
    is_meta = np.array([c == "_" for c in picture])
    return Prefix(is_meta, np.zeros((1, 1, len(picture))) if received is None else received, key)


def chosen(policy: str, picture: str, count: int, **fields: Any) -> str:
    columns = choose_columns(policy, prefix_of(picture, **fields), count, ALWAYS)  # type: ignore[arg-type]
    return "".join("k" if i in columns else " " for i in range(len(picture)))


# fmt: off
CHOICES = {
    ("window", 5):      "kk                     kkk",
    ("window", 8):      "kk                  kkkkkk",
    ("meta", 7):        "kk       k    k        kkk",
    ("meta", 10):       "kk  k    k    k      kkkkk",  # three metas, then the newest
    ("slots", 7):       "kk      k    k         kkk",
    ("even", 12):       "kk k  k  k  k  k  k  k kkk",
    ("window", 1):      "k                         ",
    ("meta", 3):        "kk                       k",
}
PICTURE =               "xxxx_xx.x_x.xx_xx.xxxxxxxx"
# fmt: on


@pytest.mark.parametrize(("policy", "count"), CHOICES)
def test_policies_keep_the_columns_drawn(policy, count):
    assert chosen(policy, PICTURE, count) == CHOICES[policy, count]


def test_random_columns_are_a_function_of_the_key():
    drawn = [chosen("random", PICTURE, 10, key=key) for key in range(20)]
    assert drawn == [chosen("random", PICTURE, 10, key=key) for key in range(20)]
    assert len(set(drawn)) > 15
    assert {drawing.count("k") for drawing in drawn} == {10}


def test_heavy_hitters_are_chosen_for_each_layer_and_head():
    received = np.zeros((2, 1, 26))
    received[0, 0, [5, 11]], received[1, 0, [6, 20]] = 1, [0.5, 2]
    received[:, 0, 0] = 9  # kept anyway, and takes the place of none
    columns = choose_columns("heavy_hitters", prefix_of(PICTURE, received=received), 7, ALWAYS)
    assert columns.tolist() == [[[0, 1, 5, 11, 23, 24, 25]], [[0, 1, 6, 20, 23, 24, 25]]]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 11, 25, 26])
def test_every_policy_keeps_as_many_columns_each_once(policy, count):
    received = np.random.default_rng(0).random((2, 4, 26))
    columns = choose_columns(policy, prefix_of(PICTURE, received=received), count, ALWAYS)
    assert columns.shape[-1] == count
    assert (np.diff(columns, axis=-1) > 0).all()
    assert columns.min() >= 0
    assert columns.max() < 26


@pytest.mark.parametrize("name", ["rope", "gpt2", "eager"])
def test_attention_received_is_the_sum_of_the_models_weights(name):
    model = tiny_model() if name == "eager" else MODELS[name]()
    if name == "eager":
        model.set_attn_implementation("eager")
    lens, ids, received = Lens(model), tokens(ROW), []
    with lens.observe(lambda call: received.append(received_attention(call)) if call.branch == "attn" else None):
        lens(ids)
    model.set_attn_implementation("eager")
    weights = lens(ids, output_attentions=True).attentions
    for own, expected in zip(received, weights, strict=True):
        torch.testing.assert_close(own.double(), expected.double().sum(-2), rtol=1e-4, atol=1e-5)
    prefix, _ = read_prefix(lens, ids)
    assert prefix.received.sum(-1) == pytest.approx(np.full((2, 4), LENGTH), abs=1e-3)


def test_models_whose_attention_counts_columns_are_refused():
    for model, message in (
        (tiny_model(position_encoding="alibi"), "alibi"),
        (gpt_neo(attention_types=[[["global", "local"], 1]]), "local layers"),
        (type("Model", (), {"config": SparseAttentionConfig()}), "model_type"),
    ):
        with pytest.raises(UsageError, match=message):
            check_evictable(model)


def test_a_continuation_without_a_target_is_refused():
    with pytest.raises(UsageError, match="at least two text tokens behind the prefix, found 1"):
        measure_eviction(Lens(tiny_model()), [tokens(ROW)], LENGTH - 1, budgets=(0.5,))


def test_a_misused_eviction_says_in_one_sentence_what_is_wrong():
    lens = Lens(tiny_model())
    with pytest.raises(ValueError, match=r"share of the prefix in \(0, 1\], not 1.5"):
        measure_eviction(lens, [tokens(ROW)], PREFIX, budgets=(1.5,))
    with pytest.raises(ValueError, match="a cache that grows and has been filled"):
        evict(DynamicCache(config=lens.model.config), torch.tensor([[0]]))
