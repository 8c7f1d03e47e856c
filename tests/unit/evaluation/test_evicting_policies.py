"""Columns that are really dropped from the cache give the logits of one pass under the policy's mask."""

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from memory_policies import POLICIES as MEMORIES
from metatokens.errors import UsageError
from metatokens.evaluation.eviction import POLICIES, Budget, Reader
from metatokens.evaluation.eviction.reading import Plan
from tiny_models import attention_mask_of, randomize, tiny_model, tokens

LENGTH = 41
BUDGET = Budget(columns=14, length=LENGTH, sinks=2, window=6)
VOCAB_SIZE = 40
SEPARATORS = torch.arange(VOCAB_SIZE) % 3 == 0
SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {"num_key_value_heads": 2, "intermediate_size": 48, **SHAPE}),
    "Qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, **SHAPE}),
    "GPTNeoX": ("GPTNeoXForCausalLM", {"intermediate_size": 48, **SHAPE}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, **SHAPE}),
}
CHUNKS = {"at once": [LENGTH], "chunks, then one by one": [17, 9, 8, *[1] * 7], "one by one": [1] * LENGTH}


@cache
def model_of(family: str, attention: str = "sdpa") -> Any:
    name, fields = FAMILIES[family]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**fields, attn_implementation=attention)
    torch.manual_seed(0)
    return randomize(model_class(config)).double().eval()


def ids(seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(seed))


def read(model: Any, policy: str, input_ids: Tensor, chunks: Sequence[int], mask: Tensor | None = None) -> Tensor:
    reader = Reader(model, POLICIES[policy], BUDGET, separators=SEPARATORS)
    logits = []
    for start, piece in zip([sum(chunks[:i]) for i in range(len(chunks))], chunks, strict=True):
        here = slice(start, start + piece)
        logits.append(reader.read(input_ids[:, here], None if mask is None else mask[:, here]))
    return torch.cat(logits, 1)


# the definitions, once more and slowly: the set of tokens that a query sees ------------------------------------


def seen(policy: str, query: int, text: Tensor) -> set[int]:
    past = range(query + 1)
    sinks, newest = set(past[:2]), set(past[-6:])
    between = [token for token in past if token not in sinks | newest]
    if policy == "window":
        return set(past[-14:])
    if policy == "sinks":
        return sinks | set(past[-12:])
    if policy == "every":  # 33 tokens share 6 columns
        return sinks | newest | {token for token in past[2:] if (token - 2 + 1) % 6 == 0}
    if policy == "separators":
        return sinks | newest | set([token for token in between if text[0, token] % 3 == 0][-6:])
    return set(past)


def mask_of(policy: str, text: Tensor) -> Tensor:
    visible = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    for query in range(LENGTH):
        visible[0, 0, query, sorted(seen(policy, query, text))] = True
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)


def pooled_attention(
    module: Any,  # noqa: ARG001 - transformers sets the arguments
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,  # noqa: ARG001
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """One query after the other: tokens of spans of 6 that reach into the last tokens, means of the earlier spans."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    rows = []
    for position in range(query.shape[2]):
        keys, values = [key[:, :, :2]], [value[:, :, :2]]  # sinks; cut below for the first query
        start = 2
        while start + 5 <= position - 1:  # the window is 6 - 5 = 1 token
            keys.append(key[:, :, start : start + 6].mean(2, keepdim=True))
            values.append(value[:, :, start : start + 6].mean(2, keepdim=True))
            start += 6
        keys.append(key[:, :, start : position + 1])
        values.append(value[:, :, start : position + 1])
        own_keys, own_values = torch.cat(keys, 2), torch.cat(values, 2)
        if position == 0:
            own_keys, own_values = key[:, :, :1], value[:, :, :1]
        scores = query[:, :, position : position + 1] @ own_keys.transpose(2, 3) * scaling
        rows.append(scores.softmax(-1) @ own_values)
    return torch.cat(rows, 2).transpose(1, 2), None


AttentionInterface.register("pooled_definition", pooled_attention)


@torch.no_grad()
def by_definition(family: str, policy: str, text: Tensor) -> Tensor:
    places = torch.arange(LENGTH)[None]
    attention = "pooled_definition" if policy == "pooled" else "sdpa"
    mask = mask_of(policy, text)
    return model_of(family, attention)(input_ids=text, attention_mask=mask, position_ids=places, use_cache=False).logits


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_evicted_columns_give_the_logits_of_the_mask(family: str) -> None:
    text = ids()
    full = by_definition(family, "full", text)
    for policy in POLICIES:
        expected = by_definition(family, policy, text)
        # the policy matters here: else nothing would be tested
        assert policy == "full" or largest(expected - full) > 1e-3, policy
        for name, chunks in CHUNKS.items():
            assert largest(read(model_of(family), policy, text, chunks) - expected) < 1e-10, (policy, name)


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    # transformers' eager attention takes its softmax in float32, whatever the model's dtype
    [("sdpa", torch.float64, 1e-10), ("eager", torch.float32, 1e-4)],
)
def test_rows_of_a_padded_batch_are_read_as_each_alone(attention: str, dtype: torch.dtype, tolerance: float) -> None:
    model = copy.deepcopy(model_of("Llama", attention)).to(dtype)
    lengths = (LENGTH, 29, 3)
    texts = [ids(seed, length) for seed, length in enumerate(lengths)]
    batch = torch.cat([torch.nn.functional.pad(text, (LENGTH - text.shape[1], 0)) for text in texts])
    mask = torch.tensor([[int(column >= LENGTH - length) for column in range(LENGTH)] for length in lengths])
    for policy in POLICIES:
        together = read(model, policy, batch, [17, 9, 8, *[1] * 7], mask)
        for row, text in enumerate(texts):
            alone = read(model, policy, text, [text.shape[1]])
            assert largest(together[row, -text.shape[1] :] - alone[0]) < tolerance, (policy, row)


def test_the_cache_holds_no_more_than_the_budget_and_its_bytes_say_so() -> None:
    model = model_of("Llama")
    for policy in [name for name in POLICIES if name != "full"]:
        reader = Reader(model, POLICIES[policy], BUDGET, separators=SEPARATORS)
        most = 0
        for token in ids()[0]:
            reader.read(token[None, None])
            (held,) = reader.count_columns()
            keys = {layer.keys.shape[2] for layer in reader.cache.layers}
            assert keys == {held}
            # two layers, keys and values, two heads of 8 numbers of 8 bytes
            assert reader.count_bytes() == 2 * 2 * held * 2 * 8 * 8
            most = max(most, held)
        # the spacing is a whole number, so not every column may be used
        assert BUDGET.columns - 2 <= most <= BUDGET.columns, policy
    reader = Reader(model, POLICIES["full"], BUDGET)
    reader.read(ids())
    assert reader.count_columns() == [LENGTH]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "full"])
def test_a_budget_of_any_shape_is_kept_or_refused(policy: str) -> None:
    """Counted on the plan of the columns alone, which needs no model."""
    kept = 0
    for columns, sinks, window, length in product((6, 14, 25), (0, 2), (None, 1, 2, 5, 9), (20, 61)):
        budget = Budget(columns=columns, length=length, sinks=sinks, window=window)
        try:
            POLICIES[policy].check(budget)
        except UsageError:
            continue
        plan, kept = Plan(POLICIES[policy], budget), kept + 1
        for position in range(length):
            plan.begin(torch.tensor([[position]]), SEPARATORS[position * 7 % VOCAB_SIZE][None, None])
            assert plan.columns is not None
            assert int((plan.columns.positions >= 0).sum()) <= columns, (budget, position)
    assert kept > 15


def test_a_text_longer_than_expected_is_read_too() -> None:
    text = ids(length=3 * LENGTH)
    for policy in POLICIES:
        reader = Reader(model_of("Llama"), POLICIES[policy], BUDGET, separators=SEPARATORS)
        assert reader.read(text, logits_to_keep=2).isfinite().all()


def test_models_of_this_package_are_read_in_their_own_cache_and_plain_ones_under_every_policy() -> None:
    text = torch.randint(0, 19, (1, 33), generator=torch.Generator().manual_seed(1))
    text[:, ::5] = 20  # meta-tokens
    model = tiny_model()
    reader = Reader(model, POLICIES["full"], BUDGET)
    whole = model(text, use_cache=False).logits
    assert largest(torch.cat([reader.read(text[:, :20]), reader.read(text[:, 20:])], 1) - whole) < 1e-10
    assert reader.count_columns() == [33 + 7]  # the second cache counts
    with pytest.raises(UsageError, match="layers of another kind"):
        Reader(model, POLICIES["window"], BUDGET)
    plain = tiny_model(meta_attention_layers=[])
    separators = torch.arange(24) % 3 == 0
    for policy in POLICIES:
        readers = [Reader(plain, POLICIES[policy], BUDGET, separators=separators) for _ in range(2)]
        pieces = [readers[0].read(text[:, i : i + 1]) for i in range(33)]
        assert largest(torch.cat(pieces, 1) - readers[1].read(text)) < 1e-10


def test_a_model_with_a_sliding_window_is_read_in_its_own_cache() -> None:
    fields = {"num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 8, **SHAPE}
    model = randomize(transformers.MistralForCausalLM(transformers.MistralConfig(**fields))).double().eval()
    text, short = ids(), ids(1, 29)
    batch = torch.cat([text, torch.nn.functional.pad(short, (LENGTH - 29, 0))])
    mask = torch.ones_like(batch)
    mask[1, : LENGTH - 29] = 0
    together = read(model, "full", batch, [17, 9, 8, *[1] * 7], mask)
    for row, own in enumerate((text, short)):
        assert largest(together[row, LENGTH - own.shape[1] :] - model(own, use_cache=False).logits[0]) < 1e-10
    reader = Reader(model, POLICIES["full"], BUDGET)
    reader.read(text)
    assert reader.count_columns() == [7]  # and the token to come


@pytest.mark.parametrize("name", MEMORIES)
def test_a_model_in_memory_mode_is_read_in_its_own_cache_whose_columns_are_counted(name: str) -> None:
    model = tiny_model(memory=MEMORIES[name])
    rows = ("x_xxx_xx_xxxx_xxxxx_x_xx", "......xx_xxxx_xxxxx_x_xx")
    batch = tokens(*rows)
    mask = attention_mask_of(batch)
    reader = Reader(model, POLICIES["full"], BUDGET)
    together = torch.cat([reader.read(batch[:, i : i + 5], mask[:, i : i + 5]) for i in range(0, 24, 5)], 1)
    counts = reader.count_columns()
    for row, drawn in enumerate(rows):
        text = batch[row : row + 1, drawn.count(".") :]
        assert largest(together[row, drawn.count(".") :] - model(text, use_cache=False).logits[0]) < 1e-10
        alone = Reader(model, POLICIES["full"], BUDGET)
        alone.read(text)
        assert alone.count_columns() == [counts[row]]
        # the first layer's cache and that of its meta-attention
        layer = alone.cache.layers[0]
        assert counts[row] == layer.keys.shape[2] + layer.num_meta < 24 + 6
    with pytest.raises(UsageError, match="layers of another kind"):
        Reader(model, POLICIES["sinks"], BUDGET)


def refusals() -> Iterator[tuple[Any, str]]:
    yield tiny_model(position_encoding="alibi", meta_attention_layers=[]), "alibi"
    yield tiny_model(position_encoding="t5", meta_attention_layers=[]), "t5"
    sliding = transformers.MistralConfig(**SHAPE, num_key_value_heads=2, intermediate_size=48, sliding_window=8)
    yield transformers.MistralForCausalLM(sliding), "sliding"
    yield (
        transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2)),
        "no position_ids",
    )
    shape = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    neo = transformers.GPTNeoConfig(**shape, attention_types=[[["global", "local"], 1]], window_size=8)
    yield transformers.GPTNeoForCausalLM(neo), "another kind .local"


def test_a_model_whose_columns_cannot_be_dropped_is_refused_in_one_line() -> None:
    for model, found in refusals():
        with pytest.raises(UsageError, match=f"{found}.*policy full"):
            Reader(model, POLICIES["sinks"], BUDGET)


def test_a_budget_without_room_is_refused() -> None:
    model = model_of("Llama")
    for name in ("every", "separators", "pooled"):
        with pytest.raises(UsageError, match="0 columns left"):
            Reader(model, POLICIES[name], Budget(columns=10, length=100, sinks=4, window=6))
    with pytest.raises(UsageError, match="holds the 17 tokens of which one column is made, found a window of 6"):
        Reader(model, POLICIES["pooled"], Budget(columns=16, length=112, sinks=4, window=6))
    with pytest.raises(UsageError, match="more than 4 sinks"):
        Reader(model, POLICIES["sinks"], Budget(columns=4, length=100))


def test_a_policy_is_not_asked_for_columns_that_it_does_not_keep() -> None:
    for name, columns in (("full", 1), ("window", 1), ("sinks", 5)):
        budget = Budget(columns=columns, length=100, window=256)
        Reader(model_of("Llama"), POLICIES[name], budget)
