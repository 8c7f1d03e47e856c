"""Thoughts after Quiet-STaR (Zelikman et al. 2024): start, n tokens, end; here all of them are meta-tokens.

Start and end have no ids of their own, so that all that knows one meta-token, such as the loss and generation, knows
them too. They are told by counting: of every n + 2 meta-tokens of a row the first is a start and the last an end, and
each has a vector of its own added to its embedding. A cache counts the meta-tokens before a step.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .configuration import CROSS, MetaTokenConfig


def place_in_thought(
    config: MetaTokenConfig, is_meta: Tensor, documents: Tensor | None, past_key_values: Cache | None
) -> Tensor:
    """Return the place of each meta-token in its thought, from 0 to n + 1; -1 at other tokens.

    Args:
        config: with a `thought_length`.
        is_meta: (B, T) bool, False at padding.
        documents: (B or 1, T) int64 where rows hold several, each of which begins with no thought open; or None.
        past_key_values: the cache, or None.

    Returns:
        (B, T) int64.
    """
    assert config.thought_length is not None
    count = is_meta.long().cumsum(-1)
    if documents is not None:
        opens = torch.nn.functional.pad(documents.diff(dim=-1) != 0, (1, 0))
        count = count - torch.where(opens, count - is_meta.long(), 0).cummax(-1).values
    elif past_key_values is not None:
        first = next(i for i in range(config.num_hidden_layers) if config.has_meta_attention(i))
        layer: Any = past_key_values.layers[first]
        if layer.meta_keys is not None:
            count = count + _count_meta_tokens(config, layer)[:, None]
    return torch.where(is_meta, (count - 1) % (config.thought_length + 2), -1)


def _count_meta_tokens(config: MetaTokenConfig, layer: Any) -> Tensor:
    """Return the number of meta-tokens in each row of a layer of the cache, (B,)."""
    if layer.is_compileable:
        slots = torch.arange(layer.meta_columns.shape[1], device=layer.meta_columns.device)
        is_used = slots < layer.meta_count[:, None]
    else:
        is_used = layer.meta_columns >= 0
    counted: Tensor = is_used & layer.meta_marks if config.meta_attention_over in CROSS else is_used
    return counted.sum(-1)
