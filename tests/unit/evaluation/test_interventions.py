"""What is changed at the meta-tokens is what its definition says, elsewhere nothing is, and nothing stays behind."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList
from transformers.cache_utils import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cached_passes import CACHES, PIECES, feed, uncached
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import (
    KINDS,
    Intervention,
    MeanEmbedding,
    NoMetaAttention,
    NoPositionEdges,
    TokenEmbedding,
    ZeroEmbedding,
    ZeroPosition,
    intervene,
    parse_intervention,
)
from metatokens.generation.decoding import MetaTokenSchedule, PeriodicSchedule
from metatokens.lens import Lens, edits
from metatokens.model import MetaTokenForCausalLM
from pairwise import all_pairs
from tiny_models import BACKENDS, META, NUM_TEXT_TOKENS, PAD, assert_close, attention_mask_of, tiny_model, tokens

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {"default": {"rope_type": "default", "rope_theta": 10_000.0}, "yarn": YARN}
COUNTS = np.arange(1, NUM_TEXT_TOKENS + 1) ** 2
EVERY_KIND: dict[str, Intervention] = {
    "zero_embedding": ZeroEmbedding(),
    "mean_embedding": MeanEmbedding(),
    "token_embedding": TokenEmbedding(token_id=3),
    "zero_position": ZeroPosition(),
    "no_position_edges": NoPositionEdges(),
    "no_meta_attention": NoMetaAttention(),
}
BATCHES = {
    "ragged": ("x_xxx_xx_xxx", "xxxxxxxxxxxx", "____xxxx_xx_"),
    "left_padded": ("....x_xx_x__", "xx_xxxxxxx_x"),
    "right_padded": ("x_xx_xxx....", "_xxxxxxxxx_x"),
    "late_meta_tokens": ("xxxxxxxx____", "xxxxxxxxxxx_"),
}
WAYS = ("uncached", "token_by_token", "chunked")
TOLERANCE = 1e-10  # in float64


def rotations(model: MetaTokenForCausalLM, num_tokens: int) -> tuple[Tensor, float]:
    """Return one (D, D) matrix a position, in float64 from the model's float32 angles, and YaRN's temperature."""
    config = model.config
    frequencies, scaling = 1e4 ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim), 1.0
    if config.rope_parameters["rope_type"] == "yarn":
        frequencies, scaling = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    angles = torch.arange(num_tokens)[:, None].float() * frequencies
    cos, sin = (table.mul(scaling).double() for table in (angles.cos(), angles.sin()))
    return torch.stack(
        [
            torch.diag(c.repeat(2)) + torch.diag(s, -len(s)) - torch.diag(s, len(s))
            for c, s in zip(cos, sin, strict=True)
        ]
    ), scaling


@torch.no_grad()
def slow_logits(
    model: MetaTokenForCausalLM,
    row: Tensor,
    *,
    embedding: Tensor | None = None,
    position: str = "kept",
    without_meta_attention: tuple[int, ...] = (),
) -> Tensor:
    """Return the logits (T, V) of one row without padding, by one softmax for each query and each head."""
    config, decoder = model.config, model.model
    is_meta, num_tokens = (row == META).tolist(), len(row)
    hidden = decoder.embed_tokens.weight[row].clone()
    if embedding is not None:
        hidden[row == META] = embedding.to(hidden)
    turn, scaling = torch.eye(config.head_dim).double().repeat(num_tokens, 1, 1), 1.0
    if config.position_encoding == "learned":
        places = decoder.embed_positions.weight[:num_tokens].clone()
        places[torch.tensor(is_meta) & (position == "zero")] = 0
        hidden = hidden + places
    elif config.position_encoding == "rope":
        turn, scaling = rotations(model, num_tokens)
        if position == "zero":
            turn[row == META] = scaling * torch.eye(config.head_dim).double()

    def attend(attention: Any, normed: Tensor, queries: list[int], visible: list[bool]) -> Tensor:
        heads = [
            projection(normed).view(num_tokens, -1, config.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        result = torch.zeros_like(normed)
        for i in queries:
            seen = [j for j in range(i + 1) if visible[j]]
            output = []
            for head in range(config.num_attention_heads):
                query, key, value = (tensor[:, head] for tensor in heads)
                scores = [
                    scaling**2 * query[i] @ key[j]
                    if position == "no_edges" and (is_meta[i] or is_meta[j])
                    else (turn[i] @ query[i]) @ (turn[j] @ key[j])
                    for j in seen
                ]
                weights = (torch.stack(scores) / config.head_dim**0.5).softmax(-1)
                output.append(weights @ value[seen])
            result[i] = attention.o_proj(torch.cat(output))
        return result

    metas = [i for i in range(num_tokens) if is_meta[i]]
    for index, layer in enumerate(decoder.layers):
        hidden = hidden + attend(
            layer.self_attn, layer.input_layernorm(hidden), list(range(num_tokens)), [True] * num_tokens
        )
        if layer.meta_attn is not None and index not in without_meta_attention:
            hidden = hidden + attend(layer.meta_attn, layer.meta_layernorm(hidden), metas, is_meta)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))


@torch.no_grad()
def fast_logits(model: MetaTokenForCausalLM, ids: Tensor, pieces: str = "uncached", cache: Any = None) -> Tensor:
    if pieces == "uncached":
        return uncached(model, ids)
    return feed(model, ids, DynamicCache(config=model.config) if cache is None else cache, PIECES[pieces])


def assert_equal_to_definition(model: MetaTokenForCausalLM, ids: Tensor, logits: Tensor, **definition: Any) -> None:
    for row, found in zip(ids, logits, strict=True):
        real = row != PAD
        assert_close(found[real], slow_logits(model, row[real], **definition), TOLERANCE)


@all_pairs(batch=BATCHES, pieces=WAYS, backend=BACKENDS, rope=ROPES)
def test_edges_without_positions_equal_the_definition(batch: str, pieces: str, backend: str, rope: str) -> None:
    model = tiny_model(rope_parameters=ROPES[rope], attn_implementation=backend, dtype=torch.float64)
    ids = tokens(*BATCHES[batch])
    with intervene(model, (NoPositionEdges(),)):
        logits = fast_logits(model, ids, pieces)
    assert_equal_to_definition(model, ids, logits, position="no_edges")


@all_pairs(batch=BATCHES, rope=ROPES, pieces=("uncached", "chunked"))
def test_zeroed_rotation_equals_the_definition(batch: str, rope: str, pieces: str) -> None:
    model = tiny_model(rope_parameters=ROPES[rope], dtype=torch.float64)
    ids = tokens(*BATCHES[batch])
    with intervene(model, (ZeroPosition(),)):
        logits = fast_logits(model, ids, pieces)
    assert_equal_to_definition(model, ids, logits, position="zero")


@pytest.mark.parametrize("pieces", ["uncached", "chunked"])
@pytest.mark.parametrize("batch", BATCHES)
def test_zeroed_learned_positions_equal_the_definition(batch: str, pieces: str) -> None:
    model = tiny_model(position_encoding="learned", dtype=torch.float64)
    ids = tokens(*BATCHES[batch])
    with intervene(model, (ZeroPosition(),)):
        logits = fast_logits(model, ids, pieces)
    assert_equal_to_definition(model, ids, logits, position="zero")


def expected_embedding(model: MetaTokenForCausalLM, kind: str) -> Tensor:
    weight = model.model.embed_tokens.weight.detach()
    if kind == "mean_embedding":
        return torch.stack([weight[i] for i, count in enumerate(COUNTS) for _ in range(count)]).mean(0)
    return weight[3] if kind == "token_embedding" else torch.zeros_like(weight[0])


@all_pairs(
    kind=("zero_embedding", "mean_embedding", "token_embedding"),
    encoding=("rope", "learned", "none"),
    pieces=("uncached", "chunked"),
)
def test_replaced_embeddings_equal_the_definition(kind: str, encoding: str, pieces: str) -> None:
    model = tiny_model(position_encoding=encoding, dtype=torch.float64)
    ids = tokens(*BATCHES["left_padded"])
    with intervene(model, (EVERY_KIND[kind],), COUNTS):
        logits = fast_logits(model, ids, pieces)
    assert_equal_to_definition(model, ids, logits, embedding=expected_embedding(model, kind))


@pytest.mark.parametrize("layers", [None, (0,), (2,)])
@pytest.mark.parametrize("pieces", WAYS)
def test_meta_attention_switched_off_equals_the_definition(layers: tuple[int, ...] | None, pieces: str) -> None:
    model = tiny_model(num_hidden_layers=3, meta_attention_layers=[0, 2], dtype=torch.float64)
    ids = tokens(*BATCHES["ragged"])
    with intervene(model, (NoMetaAttention(layers=layers),)):
        logits = fast_logits(model, ids, pieces)
    assert_equal_to_definition(model, ids, logits, without_meta_attention=layers or (0, 2))


def test_meta_attention_switched_off_is_the_model_built_without_it_to_the_bit() -> None:
    model, plain = tiny_model(), tiny_model(meta_attention_layers="none")
    plain.load_state_dict(model.state_dict(), strict=False)
    ids = tokens(*BATCHES["ragged"])
    with intervene(model, (NoMetaAttention(),)):
        assert torch.equal(fast_logits(model, ids), fast_logits(plain, ids))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("pieces", ["token_by_token", "chunked"])
def test_interventions_compose_in_one_pass_and_over_either_cache(pieces: str, kind: str) -> None:
    model = tiny_model(rope_parameters=YARN, dtype=torch.float64)
    ids = tokens(*BATCHES["ragged"])
    with intervene(model, (NoMetaAttention(layers=(1,)), MeanEmbedding(), NoPositionEdges()), COUNTS):
        logits = fast_logits(model, ids, pieces, CACHES[kind](model.config))
    embedding = expected_embedding(model, "mean_embedding")
    assert_equal_to_definition(
        model, ids, logits, embedding=embedding, position="no_edges", without_meta_attention=(1,)
    )


def test_edges_without_positions_equal_the_definition_in_a_model_of_pause_tokens() -> None:
    model = tiny_model(meta_attention_layers="none", dtype=torch.float64)
    ids = tokens(*BATCHES["ragged"])
    with intervene(model, (NoPositionEdges(),)):
        logits = fast_logits(model, ids, "chunked")
    assert_equal_to_definition(model, ids, logits, position="no_edges")


def test_definition_without_any_intervention_is_the_model() -> None:
    # otherwise an equality above could hold between two functions that are both not the model's
    model = tiny_model(rope_parameters=YARN, dtype=torch.float64)
    ids = tokens(*BATCHES["left_padded"])
    assert_equal_to_definition(model, ids, fast_logits(model, ids))


def test_every_kind_changes_the_logits_in_its_own_way() -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens(*BATCHES["ragged"])
    results = [fast_logits(model, ids)[2]]
    for intervention in EVERY_KIND.values():
        with intervene(model, (intervention,), COUNTS):
            results.append(fast_logits(model, ids)[2])
    distances = [(a - b).abs().max() for i, a in enumerate(results) for b in results[:i]]
    assert min(distances) > 1e-2
    assert set(KINDS) == set(EVERY_KIND)


@all_pairs(kind=EVERY_KIND, pieces=WAYS, backend=BACKENDS, rope=ROPES)
def test_without_a_meta_token_every_kind_is_the_identity_to_the_bit(
    kind: str, pieces: str, backend: str, rope: str
) -> None:
    model = tiny_model(rope_parameters=ROPES[rope], attn_implementation=backend)
    ids = tokens("xxxxxxxxxxxx", "...xxxxxxxxx")
    for cache in CACHES.values():
        expected = fast_logits(model, ids, pieces, cache(model.config))
        with intervene(model, (EVERY_KIND[kind],), COUNTS):
            assert torch.equal(fast_logits(model, ids, pieces, cache(model.config)), expected)


def test_zeroed_learned_positions_are_the_identity_to_the_bit_without_a_meta_token() -> None:
    model, ids = tiny_model(position_encoding="learned"), tokens("xxxxxxxxxxxx", "...xxxxxxxxx")
    expected = fast_logits(model, ids)
    with intervene(model, (ZeroPosition(),)):
        assert torch.equal(fast_logits(model, ids), expected)


def test_no_intervention_is_the_identity_for_any_model() -> None:
    torch.manual_seed(0)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2)).eval()
    for model in (tiny_model(), other):
        ids = tokens(*BATCHES["ragged"])
        expected = fast_logits(model, ids)
        with intervene(model, ()):
            assert torch.equal(fast_logits(model, ids), expected)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_embeddings_as_inputs_give_what_their_ids_give(kind: str) -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens(*BATCHES["left_padded"])
    inputs = {"attention_mask": attention_mask_of(ids), "use_cache": False}
    embeds = model.model.embed_tokens(ids).detach()
    with intervene(model, (EVERY_KIND[kind],), COUNTS):
        expected = model(ids, **inputs).logits
        found = model(inputs_embeds=embeds, meta_token_mask=ids == META, **inputs).logits
        assert_close(found, expected, TOLERANCE)
    assert torch.equal(embeds, model.model.embed_tokens(ids))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_embeddings_alone_are_known_for_meta_tokens_as_the_model_knows_them(kind: str) -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens("x_xxx_xx", "xx_xxxx_")
    with intervene(model, (EVERY_KIND[kind],), COUNTS):
        found = model(inputs_embeds=model.model.embed_tokens.weight[ids]).logits
        assert_close(found, model(ids).logits, TOLERANCE)


def test_meta_indices_alone_tell_where_embeddings_are_of_meta_tokens() -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens("x_xxx_xx", "xx_xxxx_")
    indices = (ids == META).nonzero()[:, 1].view(2, -1)
    with intervene(model, (ZeroEmbedding(), NoPositionEdges())):
        found = model(inputs_embeds=model.model.embed_tokens.weight[ids], meta_indices=indices).logits
        assert_close(found, model(ids).logits, TOLERANCE)


def test_positional_arguments_and_the_decoder_alone_are_understood() -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens(*BATCHES["left_padded"])
    with intervene(model.model, (ZeroEmbedding(), ZeroPosition())):
        found = model.model(ids, attention_mask_of(ids)).last_hidden_state
        assert_close(model.lm_head(found), fast_logits(model, ids), TOLERANCE)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_generation_with_scheduled_meta_tokens_follows_the_changed_model(kind: str) -> None:
    model = tiny_model(dtype=torch.float64)
    prompt = tokens("xxxxx", "..xxx")  # no meta-token yet: the first comes when the cache is already there
    schedule = MetaTokenSchedule(PeriodicSchedule(text_tokens=3), meta_token_id=META, pad_token_id=PAD)
    with intervene(model, (EVERY_KIND[kind],), COUNTS):
        result = model.generate(
            prompt,
            attention_mask=attention_mask_of(prompt),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([schedule]),
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = result.sequences
        expected = fast_logits(model, ids)[:, prompt.shape[1] - 1 : -1]
    assert (ids == META).sum() >= 4
    assert_close(torch.stack(result.logits, dim=1), expected.float(), 1e-5)  # `generate` makes float32 of them
    assert (fast_logits(model, ids)[:, prompt.shape[1] - 1 : -1] - expected).abs().max() > 1e-2


def test_beams_share_a_prompt_under_edges_without_positions() -> None:
    model, prompt = tiny_model(dtype=torch.float64), tokens("x_xx_xx")
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    with intervene(model, (NoPositionEdges(),)):
        cached = model.generate(prompt, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


def state_of(model: MetaTokenForCausalLM) -> dict[str, Any]:
    hooks = {
        (name, kind): list(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")
    }
    hooks["always"] = [list(module._forward_hooks_always_called) for module in model.modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {"hooks": hooks, "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()}}


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_nothing_is_left_behind(kind: str, raises: bool) -> None:
    model, ids = tiny_model(), tokens(*BATCHES["ragged"])
    before, expected = state_of(model), fast_logits(model, ids)
    state = state_of(model)  # a first forward pass may install hooks of transformers
    with intervene(model, (EVERY_KIND[kind],), COUNTS):
        fast_logits(model, ids)
        if raises:
            with pytest.raises(ValueError, match="longer than the model"):
                model(ids.repeat(1, 6))
            # nor does the pass that raised lend its meta-tokens to what calls a module on its own
            embeds = model.model.embed_tokens(ids)
            assert torch.equal(embeds, model.model.embed_tokens.weight[ids])
    after = state_of(model)
    assert after["hooks"] == state["hooks"]
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor)
    assert torch.equal(fast_logits(model, ids), expected)


def test_hooks_go_when_the_block_is_left_by_an_error() -> None:
    model, ids = tiny_model(), tokens(*BATCHES["ragged"])
    expected = fast_logits(model, ids)
    with pytest.raises(ZeroDivisionError), intervene(model, (ZeroEmbedding(), NoPositionEdges(), NoMetaAttention())):
        _ = 1 / 0
    assert torch.equal(fast_logits(model, ids), expected)


def test_blocks_may_end_in_any_order_and_each_takes_its_own_away() -> None:
    model, ids = tiny_model(), tokens(*BATCHES["ragged"])
    expected = fast_logits(model, ids)
    with intervene(model, (NoMetaAttention(),)):
        without_attention = fast_logits(model, ids)
    first, second = intervene(model, (ZeroEmbedding(),)), intervene(model, (NoMetaAttention(),))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(fast_logits(model, ids), without_attention)
    second.__exit__(None, None, None)
    assert torch.equal(fast_logits(model, ids), expected)


def test_lens_and_intervention_edit_one_model_at_once_in_any_order() -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens(*BATCHES["ragged"])
    lens, kinds = Lens(model), (ZeroEmbedding(), NoPositionEdges())
    silence = [edits.scale(f"blocks.{layer}.hook_meta_out", 0) for layer in range(model.config.num_hidden_layers)]
    before = state_of(model)["hooks"]
    with intervene(model, (*kinds, NoMetaAttention())):
        expected = model(ids).logits
    for outer, inner in (
        (intervene(model, kinds), lens.edit(*silence)),
        (lens.edit(*silence), intervene(model, kinds)),
    ):
        outer.__enter__()
        inner.__enter__()
        with lens.capture(["embed.hook_embed"], at=ids == META) as captured:
            assert_close(lens(ids).logits, expected, TOLERANCE)
        assert not captured["embed.hook_embed"].any()
        outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
        assert state_of(model)["hooks"] == before


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_model_in_training_mode_is_changed_like_one_in_evaluation_mode(kind: str) -> None:
    model, ids = tiny_model(), tokens(*BATCHES["ragged"])  # without dropout
    with intervene(model, (EVERY_KIND[kind],), COUNTS):
        expected = fast_logits(model, ids)
        assert torch.equal(fast_logits(model.train(), ids), expected)


def test_cache_filled_before_the_block_is_refused_where_its_keys_cannot_serve() -> None:
    model, ids = tiny_model(), tokens("x_xxx_xx_xxx")
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], past_key_values=cache)
    with intervene(model, (NoPositionEdges(),)), pytest.raises(UsageError, match="fill the cache within"):
        model(ids[:, 6:], past_key_values=cache)


def test_cache_that_the_model_makes_of_text_alone_takes_meta_tokens_later() -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens("xxxxxxxx_x_x")
    with intervene(model, (NoPositionEdges(),)):
        first = model(ids[:, :7])
        second = model(ids[:, 7:], past_key_values=first.past_key_values)
        found = torch.cat([first.logits, second.logits], dim=1)
        assert_close(found, model(ids, use_cache=False).logits, TOLERANCE)


@torch.no_grad()
def test_copy_of_a_cache_goes_on_like_the_cache() -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens("x_xxx_xxxxxx")
    with intervene(model, (NoPositionEdges(),)):
        cache = copy.deepcopy(model(ids[:, :7]).past_key_values)
        found = model(ids[:, 7:], past_key_values=cache).logits
        assert_close(found, model(ids, use_cache=False).logits[:, 7:], TOLERANCE)


def test_mean_weighs_tokens_by_their_counts_and_leaves_out_the_absent() -> None:
    model, ids = tiny_model(dtype=torch.float64), tokens("x_xx")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan  # a token that the text does not have may hold anything
    counts = torch.zeros(10)
    counts[2], counts[5] = 3, 1
    weight = model.model.embed_tokens.weight
    with intervene(model, (MeanEmbedding(),), counts):
        found = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[0]
    assert_close(found[0, 1], 0.75 * weight[2] + 0.25 * weight[5], 1e-12)


@pytest.mark.parametrize(
    ("interventions", "counts", "changes", "message"),
    [
        ((ZeroPosition(),), None, {"position_encoding": "xpos"}, "xpos, under which a position also scales"),
        ((NoPositionEdges(),), None, {"position_encoding": "xpos"}, "xpos, under which a position also scales"),
        ((ZeroPosition(),), None, {"position_encoding": "alibi"}, "alibi, under which a token carries no position"),
        ((ZeroPosition(),), None, {"position_encoding": "none"}, "expected position_encoding rope or learned"),
        ((NoPositionEdges(),), None, {"position_encoding": "learned"}, "use zero_position"),
        ((NoPositionEdges(),), None, {"attn_implementation": "flex_attention"}, "eager or sdpa"),
        ((NoMetaAttention(),), None, {"meta_attention_layers": "none"}, "expected a model with meta-attention"),
        ((NoMetaAttention(layers=(1,)),), None, {"meta_attention_layers": [0]}, r"layers out of \[0\]"),
        ((TokenEmbedding(token_id=META),), None, {}, f"below {META}, found id {META}"),
        ((ZeroEmbedding(), MeanEmbedding()), COUNTS, {}, "at most one that changes the embedding"),
        ((ZeroPosition(), NoPositionEdges()), None, {}, "zero_position and no_position_edges"),
    ],
)
def test_intervention_that_does_not_fit_is_a_usage_error(interventions, counts, changes, message) -> None:
    model = tiny_model(**changes)
    with pytest.raises(UsageError, match=message), intervene(model, interventions, counts):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "needs token_counts"),
        (np.zeros(4), "not all zero"),
        ([1, -1], "not negative"),
        ([1.0, np.inf], "finite"),
        (np.ones(META + 1), f"not id {META}"),
    ],
)
def test_counts_that_are_no_mean_of_text_tokens_are_a_value_error(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), intervene(tiny_model(), (MeanEmbedding(),), counts):
        raise AssertionError("the block must not run")


def test_model_of_another_kind_is_a_usage_error() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UsageError, match="found GPT2LMHeadModel"), intervene(other, (ZeroEmbedding(),)):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((kind, EVERY_KIND[kind]) for kind in EVERY_KIND if kind != "token_embedding"),
        ("token_embedding=12", TokenEmbedding(token_id=12)),
        ("no_meta_attention=0,3", NoMetaAttention(layers=(0, 3))),
    ],
)
def test_intervention_is_read_from_text(text: str, expected: Intervention) -> None:
    assert parse_intervention(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero_embeding", "did you mean zero_embedding"),
        ("token_embedding", "token_embedding=ID"),
        ("token_embedding=-1", "token_embedding=ID"),
        ("zero_position=3", "found 'zero_position=3'"),
        ("no_meta_attention=", "no_meta_attention"),
        ("", "name one of them"),
    ],
)
def test_text_that_is_no_intervention_is_a_usage_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_intervention(text)
