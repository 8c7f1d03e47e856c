"""Tiny decoders of every family, plain and grafted, and the slow definitions of what a graft computes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from metatokens.graft import GraftConfig, graft
from tiny_models import randomize

VOCAB_SIZE = 40
LENGTH = 41
CONFIG = GraftConfig(window=6, num_sinks=2, every=3, lora_rank=2)
META = replace(CONFIG, meta_attention=True)
SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 48, **SHAPE}
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, **GROUPED}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8, **GROUPED}),
    "smollm3": ("SmolLM3ForCausalLM", {**GROUPED, **NO_IDS}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 8, **GROUPED, **NO_IDS}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 48,
            "window_size": 16,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {"intermediate_size": 48, **SHAPE}),
}
EIGHT_BILLION = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}
"""The shape of Llama 3 8B."""
# attention of GPT-Neo computes in float32, whatever the model's dtype
TOLERANCES = {"gpt_neo": 1e-4}


def make(family: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a model of a family with weights that matter."""
    name, fields = FAMILIES[family]
    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**fields, **changes})
    torch.manual_seed(0)
    return randomize(model_class(config)).to(dtype).eval()


plain = cache(make)
"""The same, made once: for tests that change nothing about it."""


def trained(family: str, config: GraftConfig = CONFIG, **changes: Any) -> Any:
    """Return a grafted model whose new weights matter, as if it had been trained."""
    model = graft(make(family, **changes), config)
    randomize(model.metatokens_graft)
    return model


def ids(seed: int = 0, length: int = LENGTH, rows: int = 1) -> Tensor:
    """Return (rows, length) random ids."""
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: Any, text: Tensor, chunks: list[int], mask: Tensor | None = None, cache: Any = None) -> Tensor:
    """Return the logits of texts that are read in pieces of these lengths."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits, start = [], 0
    for piece in chunks:
        seen = None if mask is None else mask[:, : start + piece]
        part = model(text[:, start : start + piece], attention_mask=seen, past_key_values=cache, use_cache=True)
        logits.append(part.logits)
        start += piece
    return torch.cat(logits, 1)


# the definitions, slowly ----------------------------------------------------------------------------------------


def is_followed(place: int, config: GraftConfig) -> bool:
    """Tell whether an anchor follows the text token at a place."""
    return place >= config.num_sinks and (place + 1) % config.every == 0


def every_nth(config: GraftConfig, length: int) -> Tensor:
    """Return (T, T): what text sees if every n-th token stays."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(query + 1):
            seen[query, key] = key > query - config.window or key < config.num_sinks or is_followed(key, config)
    return seen


def layout(config: GraftConfig, length: int) -> list[tuple[int, bool]]:
    """Return place and whether it is an anchor, for each column of a text with its anchors."""
    if config.anchors == "every":
        return [(place, is_followed(place, config)) for place in range(length)]
    columns = []
    for place in range(length):
        columns.append((place, False))
        if is_followed(place, config):
            columns.append((place, True))
    return columns


def seen_with_anchors(config: GraftConfig, length: int) -> Tensor:
    """Return (W, W): who sees whom among text and anchors."""
    columns = layout(config, length)
    seen = torch.zeros(len(columns), len(columns), dtype=torch.bool)
    for query, (at, is_anchor) in enumerate(columns):
        for key, (place, is_kept) in enumerate(columns[: query + 1]):
            is_near = place > at - config.window
            if key == query or (is_near and is_kept and config.anchors == "every"):
                sees = True
            elif is_kept:
                sees = config.anchors == "every" or config.reveal == "always" or not is_near
                newest = [n for n, (_, other) in enumerate(columns[: query + 1]) if other]
                sees = sees and (config.memory_limit is None or key in newest[-config.memory_limit :])
            else:
                stands_for = is_anchor and place == at and config.reveal == "evicted"
                sees = place < config.num_sinks or (is_near and not stands_for)
            seen[query, key] = sees
    return seen


def compact_distance(config: GraftConfig, at: int, place: int, *, is_kept: bool) -> int:
    """Return how far a key is from a query at a place of the text, with compact positions."""
    anchors = [followed for followed in range(at + 1) if is_followed(followed, config)]
    # as many steps as there are anchors from the key on, behind a window without those in it
    before = config.window - config.window // config.every - 1
    if is_kept:
        return before + sum(followed >= place for followed in anchors)
    if place > at - config.window:
        return at - place
    remembered = len(anchors[-config.memory_limit :] if config.memory_limit else anchors)
    return before + remembered + config.num_sinks - place


def compact_distances(config: GraftConfig, columns: list[tuple[int, bool]]) -> Tensor:
    """Return (W, W) distances; an anchor is where the token before it is."""

    def is_apart(is_anchor: bool, at: int, place: int) -> bool:
        return is_anchor and (config.anchors == "meta" or place <= at - config.window)

    return torch.tensor(
        [
            [
                compact_distance(config, at, place, is_kept=is_apart(is_anchor, at, place) and key != query)
                for key, (place, is_anchor) in enumerate(columns)
            ]
            for query, (at, _) in enumerate(columns)
        ]
    )


def turn(states: Tensor, model: Any, distances: Tensor) -> Tensor:
    """Return states (..., D) rotated by distances (...)."""
    own = model.base_model.rotary_emb
    angles = distances[..., None] * own.inv_freq.to(states.dtype)
    (first, second), rest = states[..., : 2 * angles.shape[-1]].chunk(2, -1), states[..., 2 * angles.shape[-1] :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@contextmanager
def pairwise(model: Any, distances: Tensor) -> Iterator[None]:
    """Let a model attend to each key at a distance of its own, (T, T), and not at that of its positions."""

    def attend(_: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **__: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
        pairs = query[:, :, :, None].expand(*query.shape[:3], key.shape[2], -1)
        scores = (turn(pairs, model, distances) * key[:, :, None]).sum(-1) * scaling + mask
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("pairwise", attend)
    model.config._attn_implementation = "pairwise"
    try:
        yield
    finally:
        model.config._attn_implementation = "sdpa"


def additive(seen: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a mask (1, 1, T, T) as transformers take it."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def change_by_meta_attention(new: Any, states: list[Tensor], angles: list[tuple[Tensor, Tensor]] | None) -> Tensor:
    """Return what the last of some anchors, each (C,), gets of all of them: one head after another, (C,)."""
    heads, size = new.query.shape[0] // new.head_size, new.head_size
    output = []
    for head in range(heads):
        own, shared = slice(head * size, (head + 1) * size), slice(*(head // new.groups * size + n for n in (0, size)))
        query, keys = new.query[own] @ states[-1], [new.key[shared] @ state for state in states]
        if angles is not None:
            query, keys = (
                turn_by(query, *angles[-1]),
                [turn_by(key, *one) for key, one in zip(keys, angles, strict=True)],
            )
        weights = (torch.stack(keys) @ query / size**0.5).softmax(0)
        output.append(weights @ torch.stack([new.value[shared] @ state for state in states]))
    return new.output @ torch.cat(output)


def turn_by(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (D,) rotated."""
    first, second = states.chunk(2)
    return states * cos + torch.cat([-second, first]) * sin


@contextmanager
def with_meta_attention(
    model: Any, grafted: Any, columns: list[tuple[int, bool]], config: GraftConfig
) -> Iterator[None]:
    """Let a plain model have the meta-attention of a grafted one, anchor by anchor."""
    new, given, handles = grafted.metatokens_graft, [], []
    anchors = [index for index, (_, is_anchor) in enumerate(columns) if is_anchor]
    for index, own in enumerate(new.meta_attn):
        block = new.family.blocks_of(model.base_model)[index]
        first, attention, second = map(block.get_submodule, new.family.around_attention)

        def add(module: Any, _: Any, kwargs: Any, output: Any, own: Any = own, second: Any = second) -> Any:
            out, angles = output[0].clone(), None
            residual = given.pop()
            states = [second(residual[0, at] + output[0][0, at]) for at in anchors]
            if "position_embeddings" in kwargs and getattr(module, "use_rope", True):
                cos, sin = kwargs["position_embeddings"]
                angles = [(cos[0, at], sin[0, at]) for at in anchors]
            for number, at in enumerate(anchors):
                seen = slice(max(0, number + 1 - (config.memory_limit or number + 1)), number + 1)
                out[0, at] += change_by_meta_attention(own, states[seen], angles and angles[seen])
            return (out, *output[1:])

        handles.append(first.register_forward_pre_hook(lambda _, args: given.append(args[0])))
        handles.append(attention.register_forward_hook(add, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


def by_definition(model: Any, grafted: Any, text: Tensor, config: GraftConfig) -> Tensor:
    """Return the logits of text (1, T) by a plain model whose matrices are changed at anchors, one after another."""
    new = grafted.metatokens_graft
    columns = layout(config, text.shape[1])
    embeddings = model.get_input_embeddings()(text)[0]
    rows = torch.stack([embeddings[place] + (new.row if is_anchor else 0) for place, is_anchor in columns])[None]
    handles = []
    for name, matrix in new.family.matrices_of(model.base_model):
        weights = new.up[name.replace(".", "-")] @ new.down[name.replace(".", "-")]

        def change(_: Any, args: Any, output: Tensor, weights: Tensor = weights) -> Tensor:
            out = output.clone()
            for index, (_, is_anchor) in enumerate(columns):
                if is_anchor:
                    out[0, index] += weights @ args[0][0, index]
            return out

        handles.append(matrix.register_forward_hook(change))
    places = torch.tensor([[place for place, _ in columns]])
    mask = additive(seen_with_anchors(config, text.shape[1]))
    distances = nullcontext() if config.positions == "text" else pairwise(model, compact_distances(config, columns))
    with distances, with_meta_attention(model, grafted, columns, config):
        places *= config.positions == "text"  # at position 0 nothing is rotated
        logits = model(inputs_embeds=rows, attention_mask=mask, position_ids=places, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits[:, [index for index, (place, _) in enumerate(columns) if place != columns[index - 1][0]]]


def largest(difference: Tensor) -> float:
    """Return the largest absolute value."""
    return float(difference.detach().abs().max())
