"""A grafted decoder is the plain one when off, every-n-th when untrained, and its definition when trained."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from grafted_models import (
    CONFIG,
    FAMILIES,
    GROUPED,
    LENGTH,
    META,
    TOLERANCES,
    VOCAB_SIZE,
    additive,
    by_definition,
    compact_distance,
    every_nth,
    ids,
    is_followed,
    largest,
    make,
    pairwise,
    plain,
    read,
    trained,
)
from metatokens.errors import UsageError
from metatokens.graft import GraftConfig, graft, switched_off, ungraft
from metatokens.graft.families import FAMILIES as KNOWN

CONFIGS = {
    "evicted": CONFIG,
    "always": replace(CONFIG, reveal="always", num_sinks=0, window=4),
    "limited": replace(CONFIG, memory_limit=2),
    "every": replace(CONFIG, anchors="every"),
    "every, limited": replace(CONFIG, anchors="every", memory_limit=2),
}
COMPACT = {name: replace(config, positions="compact") for name, config in CONFIGS.items()}
ROTATED = [family for family in FAMILIES if family not in ("gpt2", "gpt_neo")]
ROTATIONS = 1e-5  # transformers computes their angles in float32
SCALED = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 16}
CHUNKS = {"at once": [LENGTH], "chunks, then one by one": [17, 9, 8, *[1] * 7], "one by one": [1] * LENGTH}


def test_every_family_has_a_test() -> None:
    assert FAMILIES.keys() == KNOWN.keys()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_graft_is_the_plain_model_when_off_and_every_nth_when_untrained(family: str) -> None:
    text, base, tolerance = ids(rows=2), plain(family), TOLERANCES.get(family, 1e-10)
    full = base(text, use_cache=False).logits
    expected = base(
        text,
        attention_mask=additive(every_nth(CONFIG, LENGTH)),
        position_ids=torch.arange(LENGTH)[None],
        use_cache=False,
    ).logits
    assert largest(full - expected) > 1e-3  # or the mask would not matter
    model = graft(make(family), CONFIG)
    assert largest(model(text, use_cache=False).logits - expected) < tolerance
    with switched_off(model):
        assert torch.equal(model(text, use_cache=False).logits, full)
    ungraft(model)
    assert torch.equal(model(text, use_cache=False).logits, full)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_columns_that_are_really_dropped_give_the_logits_of_the_mask(family: str) -> None:
    text, model, tolerance = ids(), trained(family), TOLERANCES.get(family, 1e-10)
    expected = model(text, use_cache=False).logits
    assert largest(expected - graft(make(family), CONFIG)(text, use_cache=False).logits) > 1e-3
    assert largest(read(model, text, CHUNKS["chunks, then one by one"]) - expected) < tolerance


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_trained_graft_is_its_definition(family: str, name: str) -> None:
    text, config = ids(3), CONFIGS[name]
    model = trained(family, config)
    expected = by_definition(plain(family), model, text, config)
    for chunks in CHUNKS.values():
        assert largest(read(model, text, chunks) - expected) < 1e-10


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in ROTATED), ("llama", {"rope_parameters": SCALED})]
)
@torch.no_grad()
def test_with_compact_positions_an_untrained_graft_is_every_nth_with_these(
    family: str, changes: dict[str, Any]
) -> None:
    config, text, base = COMPACT["evicted"], ids(), make(family, **changes)
    distances = [
        [
            compact_distance(config, at, place, is_kept=is_followed(place, config) and place <= at - 6)
            for place in range(LENGTH)
        ]
        for at in range(LENGTH)
    ]
    with pairwise(base, torch.tensor(distances)):
        expected = base(
            text,
            attention_mask=additive(every_nth(config, LENGTH)),
            position_ids=torch.zeros(1, LENGTH, dtype=torch.long),
            use_cache=False,
        ).logits
    model = graft(make(family, **changes), config)
    assert largest(model(text, use_cache=False).logits - expected) < ROTATIONS
    assert largest(graft(make(family, **changes), CONFIG)(text, use_cache=False).logits - expected) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", COMPACT)
def test_a_trained_graft_with_compact_positions_is_its_definition_beyond_the_positions_of_the_model(
    family: str, name: str
) -> None:
    text, config = ids(3), COMPACT[name]
    model = trained(family, config, max_position_embeddings=24)
    expected = by_definition(plain(family), model, text, config)
    for chunks in CHUNKS.values():
        assert largest(read(model, text, chunks) - expected) < ROTATIONS
    # a pass of more than one chunk of queries
    long, model = ids(4, 200), trained(family, config)
    assert largest(model(long, use_cache=False).logits - read(model, long, [50] * 4)) < ROTATIONS


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", CONFIG),
        ("gpt2", CONFIG),
        ("gpt_neo", CONFIG),
        ("llama", COMPACT["limited"]),
        ("llama", CONFIGS["every"]),
        ("llama", META),
        ("gpt2", replace(META, memory_limit=2)),
        ("gpt_neo", META),
        ("llama", replace(META, memory_limit=2, anchors="every")),
    ],
)
def test_rows_of_a_padded_batch_are_read_as_each_alone(family: str, config: GraftConfig) -> None:
    model, lengths = trained(family, config), (LENGTH, 29, 3)
    texts = [ids(seed, length) for seed, length in enumerate(lengths)]
    batch = torch.cat([torch.nn.functional.pad(text, (LENGTH - text.shape[1], 0)) for text in texts])
    mask = torch.tensor([[int(column >= LENGTH - length) for column in range(LENGTH)] for length in lengths])
    together = read(model, batch, CHUNKS["chunks, then one by one"], mask)
    for row, text in enumerate(texts):
        alone = read(model, text, [text.shape[1]])
        assert largest(together[row, LENGTH - text.shape[1] :] - alone[0]) < TOLERANCES.get(family, 1e-10)


def test_the_cache_holds_sinks_window_and_anchors_and_its_length_is_that_of_the_text() -> None:
    model, cache, text = trained("llama"), DynamicCache(), ids()
    for place in range(LENGTH):
        read(model, text[:, place : place + 1], [1], cache=cache)
        assert cache.get_seq_length() == place + 1
        num_anchors = sum((earlier + 1) % 3 == 0 for earlier in range(2, place + 1))
        held = {layer.keys.shape[2] for layer in cache.layers}
        assert held == {min(place + 1, 2 + 6) + num_anchors}


@torch.no_grad()
def test_a_model_in_float32_is_read_piece_by_piece_under_autocast() -> None:
    text, model = ids(), trained("llama").float()
    expected = model(text, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = read(model, text, CHUNKS["chunks, then one by one"])
    assert 0 < largest(found - expected) < 0.05 * largest(expected)


def test_generate_continues_prompts_of_a_batch_as_each_alone() -> None:
    model, length = trained("llama"), 20
    texts = [ids(5, length), ids(6, 13)]
    batch = torch.cat([torch.nn.functional.pad(text, (length - text.shape[1], 0)) for text in texts])
    mask = torch.tensor([[1] * length, [0] * 7 + [1] * 13])
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, text in enumerate(texts):
        expected = text
        for _ in range(12):  # without a cache
            newest = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, newest], 1)
        assert together[row, length - text.shape[1] :].tolist() == expected[0].tolist()
    chunked = model.generate(batch, attention_mask=mask, prefill_chunk_size=6, **options)
    assert chunked.tolist() == together.tolist()
    beams = [
        model.generate(texts[0], num_beams=3, use_cache=use_cache, **options).tolist() for use_cache in (True, False)
    ]
    assert beams[0] == beams[1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_long_pass_attends_chunk_by_chunk_as_by_one_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, model = ids(4, 300, rows=2), trained(family)
    mask = torch.ones_like(text)
    mask[1, :50] = 0
    results, seen = [], []
    for longest in (128, 10_000):  # by the plan, and then by one mask
        monkeypatch.setattr("metatokens.graft.grafting.CHUNK", longest)
        hook = model.base_model.register_forward_pre_hook(
            lambda decoder, *_, **__: seen.append(decoder.config._attn_implementation), with_kwargs=True
        )
        model.zero_grad()
        logits = model(text, attention_mask=mask, use_cache=False).logits
        logits[mask.bool()].square().mean().backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.metatokens_graft.parameters()])
        cached = read(model, text, [140, 160], mask)
        assert model.config._attn_implementation == "sdpa"
        results.append((logits[mask.bool()], gradients, cached[mask.bool()]))
        hook.remove()
    assert seen == ["metatokens_graft"] * 3 + ["sdpa"] * 3
    for fast, slow in zip(*results, strict=True):
        assert largest(fast - slow) < 1e-10
        assert largest(slow) > 1e-3


def test_only_the_new_parameters_are_trained_and_the_loss_is_that_of_the_text() -> None:
    model, text = graft(make("llama"), CONFIG).train(), ids()
    outputs = model(text, labels=text, output_hidden_states=True)
    losses = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], text[0, 1:])
    assert largest(losses - outputs.loss) < 1e-5  # transformers takes the loss in float32
    assert {states.shape[1] for states in outputs.hidden_states} == {LENGTH}
    outputs.loss.backward()
    trained_names = {name.split(".")[0] for name, one in model.named_parameters() if one.grad is not None}
    assert trained_names == {"metatokens_graft"}
    added = model.metatokens_graft
    assert added.row.grad.norm() > 0
    # those of the last layer change no anchor that another token sees
    for name, parameter in added.up.items():
        is_read = "layers-0" in name or "k_proj" in name or "v_proj" in name
        assert (parameter.grad.norm() > 0) == is_read, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_tuple_holds_what_an_output_by_name_does(family: str) -> None:
    model, options = trained(family), {"output_hidden_states": True, "use_cache": False}
    named = model.base_model(ids(), **options)
    last, hidden_states = model.base_model(ids(), return_dict=False, **options)
    assert torch.equal(last, named.last_hidden_state)
    assert len(hidden_states) == len(named.hidden_states) > 1
    for states, expected in zip(hidden_states, named.hidden_states, strict=True):
        assert states.shape[1] == LENGTH
        assert torch.equal(states, expected)


def test_a_copy_of_a_grafted_model_has_hooks_of_its_own() -> None:
    model, text = trained("gpt_neo", dtype=torch.float32), ids()
    twin = copy.deepcopy(model)
    expected = model(text, use_cache=False).logits
    with torch.no_grad():
        for parameter in model.metatokens_graft.parameters():
            parameter.zero_()
    assert torch.equal(twin(text, use_cache=False).logits, expected)
    assert largest(model(text, use_cache=False).logits - expected) > 1e-3


def refused_models() -> Iterator[tuple[Any, str]]:
    t5 = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    yield transformers.T5ForConditionalGeneration(t5), "an encoder-decoder"
    mamba = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1)
    yield transformers.MambaForCausalLM(mamba), "the architecture mamba"
    yield make("mistral", sliding_window=8), "layers that see less than the past"
    quantised = make("llama")
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    yield quantised, "quantised weights"
    yield make("llama", attn_implementation="flex_attention"), "attention by flex_attention"


def test_compact_positions_need_rotations_that_do_not_depend_on_the_length_and_room_for_the_anchors() -> None:
    refused = {
        "the positions of gpt2": make("gpt2"),
        "the positions of gpt_neo": make("gpt_neo"),
        "layers without positions": make("smollm3", no_rope_layer_interval=2),
        "rotation of the type dynamic": make("llama", rope_parameters={**SCALED, "rope_type": "dynamic"}),
    }
    for found, model in refused.items():
        with pytest.raises(UsageError, match=f'positions "compact".*found {found}'):
            graft(model, COMPACT["evicted"])
        graft(model, CONFIG)  # and nothing was left behind
    cache, text = DynamicCache(), ids()
    model = trained("llama", COMPACT["evicted"], max_position_embeddings=18)
    read(model, text[:, :-4], [LENGTH - 4], cache=cache)
    with pytest.raises(UsageError, match=r"at most the 18 positions.*found 19.*memory_limit"):
        read(model, text[:, -4:], [4], cache=cache)
    assert cache.get_seq_length() == LENGTH - 4


def test_a_model_that_cannot_be_grafted_is_refused_in_one_line() -> None:
    for model, found in refused_models():
        with pytest.raises(UsageError, match=f"found {found}"):
            graft(model)
    model = graft(make("llama"))
    with pytest.raises(UsageError, match="found a grafted one"):
        graft(model)
    with pytest.raises(UsageError, match="found a plain one"):
        ungraft(make("llama"))
    with pytest.raises(UsageError, match=f"tokenizer.*{VOCAB_SIZE} ids.*found {VOCAB_SIZE + 1}"):
        graft(make("llama"), tokenizer=range(VOCAB_SIZE + 1))


def test_a_call_that_a_graft_cannot_serve_is_refused_in_one_line() -> None:
    model, text = graft(make("llama", max_position_embeddings=LENGTH), CONFIG), ids()
    base, filled = plain("llama"), DynamicCache()
    base(text, past_key_values=filled)
    own = DynamicCache()
    model(text[:, :9], past_key_values=own)
    calls: dict[str, dict[str, Any]] = {
        "a mask of another form": {"attention_mask": torch.ones(1, 1, LENGTH, LENGTH)},
        "position_ids that start anew": {"position_ids": torch.arange(LENGTH)[None] % 20},
        "found output_attentions": {"output_attentions": True},
        "filled without the graft": {"past_key_values": filled},
        "a StaticCache": {"past_key_values": StaticCache(config=model.config, max_cache_len=50)},
        f"at most the {LENGTH} positions.*found {LENGTH + 9}": {"past_key_values": own},
    }
    for message, arguments in calls.items():
        with pytest.raises(UsageError, match=message):
            model(text, **arguments)
    with pytest.raises(UsageError, match="going back"):
        own.crop(-2)
    with switched_off(model), pytest.raises(UsageError, match="while the graft is switched off"):
        model(text[:, :3], past_key_values=own)
    other = graft(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), GraftConfig(window=3))
    with pytest.raises(UsageError, match="another window"):
        other(text, past_key_values=own)
    # and a call that failed leaves nothing behind
    assert model(text).logits.shape == (1, LENGTH, VOCAB_SIZE)
