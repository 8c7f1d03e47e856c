"""Attention masks with edges taken out, in the format of the backend that gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metatokens.errors import UsageError
from metatokens.lens.edits import EdgeCut


def cut_mask(mask: Any, cuts: Sequence[EdgeCut], query_columns: Tensor, key_columns: Tensor) -> Tensor:
    """Return an attention mask without the cut edges; a token's edge to itself stays, so that no row is emptied.

    Args:
        mask: None for plain causal attention, or (B or 1, 1 or H, Q, K), bool (True = keep) or additive.
        cuts: Of this attention.
        query_columns: (B, Q) int64.
        key_columns: (B, K) int64; -1 at padding.

    Returns:
        (B, 1 or H, Q, K), of the dtype of the mask; bool where there was none.

    Raises:
        UsageError: A mask that is no tensor.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        raise UsageError(
            "attention mask of a model with cut edges",
            expected="a tensor of queries by keys",
            found=type(mask).__name__,
            remedy='call model.set_attn_implementation("sdpa"); landmark attention has no such mask',
        )
    queries, keys = query_columns[:, None, :, None], key_columns[:, None, None, :]
    keep = torch.ones_like(queries == keys)
    for cut in cuts:
        keep = keep & ~cut.pattern(query_columns, key_columns)[:, None]
    keep |= queries == keys
    if mask is None:
        return keep & (keys <= queries) & (keys >= 0)
    return _narrow(mask, keep)


def window_mask(mask: Any, window: int, columns: Tensor) -> Tensor:
    """Return the mask (B or 1, 1 or H, T, T) of an attention that sees its last `window` keys alone."""
    distance = columns[:, None, :, None] - columns[:, None, None, :]
    near = (distance >= 0) & (distance < window)
    return near if mask is None else _narrow(mask, near)


def _narrow(mask: Tensor, keep: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask & keep
    return torch.where(keep, mask, torch.finfo(mask.dtype).min)
