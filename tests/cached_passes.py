"""A sequence that is fed to a model in pieces over a cache, and what tells how: the pieces and the caches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from tiny_models import attention_mask_of

PIECES = {
    "token_by_token": [1] * 12,
    "prompt_then_tokens": [8, 1, 1, 1, 1],
    "chunks_then_tokens": [5, 4, 1, 1, 1],
    "chunked": [5, 4, 3],
    "at_once": [12],
}
CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}


def feed(
    model: Any, ids: Tensor, cache: Cache, pieces: Sequence[int], *, start: int = 0, masked: bool = True
) -> Tensor:
    """Return the logits of the pieces, one after another, over what the cache holds."""
    logits = []
    for length in pieces:
        stop = start + length
        mask = attention_mask_of(ids)[:, :stop] if masked else None
        logits.append(model(ids[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        start = stop
    return torch.cat(logits, dim=1)


def uncached(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of the whole sequence at once."""
    return model(ids, attention_mask=attention_mask_of(ids), use_cache=False).logits
