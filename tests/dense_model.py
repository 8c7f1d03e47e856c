"""The whole model once more, in plain matrices of all pairs: the definition that position encodings are held to.

It shares no code with the package but its weights. Padding, packing, caches and backends are not in it: a row has its
positions, its pairs and nothing else.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from tiny_models import META, PAD


class Turn(NamedTuple):
    """What multiplies the pairs of dimensions (d, d + D / 2) of each token."""

    of_query: Tensor
    """(B, 1 or H, T, D / 2) complex."""
    of_key: Tensor
    """As `of_query`."""


def dense_logits(
    model: Any,
    ids: Tensor,
    *,
    turn_of: Callable[[int], Turn | None] = lambda _: None,
    added: Tensor | None = None,
    bias: Tensor | None = None,
    sees: Tensor | None = None,
    meta_token_id: int = META,
    pad_token_id: int = PAD,
) -> Tensor:
    """Return the logits (B, T, V), meaningless at padding.

    Args:
        model: a `MetaTokenForCausalLM` whose meta-attention is over its meta-tokens.
        ids: (B, T) int64, with these ids of meta-token and padding.
        turn_of: from a layer to the rotation in both of its attentions, None for none.
        added: (B, T, C) or None, what is added to the embeddings.
        bias: (B or 1, H, T, T) or None, what is added to all scores.
        sees: (T, T) bool or None, which pairs self-attention is limited to.
    """
    decoder = model.model
    columns = torch.arange(ids.shape[1])
    causal = (columns[:, None] >= columns) & (ids != pad_token_id)[:, None]
    of_text = causal if sees is None else causal & sees
    is_meta = ids == meta_token_id
    of_meta = causal & is_meta[:, None] & is_meta[..., None]
    hidden = decoder.embed_tokens.weight[ids]
    hidden = hidden if added is None else hidden + added
    for layer, block in enumerate(decoder.layers):
        for attention, norm, seen in (
            (block.self_attn, block.input_layernorm, of_text),
            (block.meta_attn, lambda x: layer_norm(x, x.shape[-1:]), of_meta),
        ):
            if attention is not None:
                hidden = hidden + _attend(attention, norm(hidden), seen, turn_of(layer), bias)
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    logits: Tensor = decoder.norm(hidden) @ model.lm_head.weight.T
    return logits


def _attend(attention: Any, hidden: Tensor, seen: Tensor, turn: Turn | None, bias: Tensor | None) -> Tensor:
    heads = attention.config.num_attention_heads
    query, key, value = (
        projection(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if turn is not None:
        query, key = _turned(query, turn.of_query), _turned(key, turn.of_key)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = scores if bias is None else scores + bias
    weights = scores.masked_fill(~seen[:, None], -1e300).softmax(-1) * seen.any(-1)[:, None, :, None]
    output: Tensor = attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
    return output * seen.any(-1)[..., None]


def _turned(states: Tensor, factors: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    product = torch.complex(first, second) * factors
    return torch.cat([product.real, product.imag], dim=-1)


def turn_at(model: Any, positions: Tensor) -> Turn:
    """Return the rotation at positions (B, T) of a model with rope, xpos or fourier."""
    tables = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), positions)
    cos, sin = getattr(tables, "rotation", tables)
    cos, sin = (table if table.ndim == 4 else table[:, None] for table in (cos, sin))
    turn = torch.complex(*(table[..., : table.shape[-1] // 2].double() for table in (cos, sin)))
    if not hasattr(tables, "scale"):
        return Turn(turn, turn)
    scale = tables.scale[:, None, :, : turn.shape[-1]].double()
    return Turn(turn * scale, turn / scale)


def count_tokens(ids: Tensor) -> Tensor:
    """Return how many tokens stand before each, (B, T), without padding."""
    return ((ids != PAD).long().cumsum(-1) - 1).clamp(min=0)
