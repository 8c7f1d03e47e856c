"""Attention of a long grafted pass through transformers' attention interface: exact, and as sparse as its mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AttentionInterface

from metatokens.config.graft import GraftConfig
from metatokens.graft.spreading import visible
from metatokens.model.memory import Columns, MemoryMask

IMPLEMENTATION = "metatokens_graft"
"""The name of this attention, which a model's config has during such a pass alone."""
ARGUMENT = "graft_mask"
"""The keyword under which the mask goes from the decoder to its attentions."""


@dataclass(frozen=True, kw_only=True)
class GraftMask(MemoryMask):
    """The plan of memory mode, with what a graft sees."""

    config: GraftConfig

    def _mask(self, queries: Columns, keys: Columns) -> Tensor:
        return visible(self.config, queries, keys)[:, None]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    graft_mask: GraftMask,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from queries (B, H, Q, D) to keys and values (B, H or fewer, K, D); returns (B, Q, H, D)."""
    del module, attention_mask, kwargs
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return graft_mask.attend(query, key, value, scaling=scaling, dropout=dropout), None


AttentionInterface.register(IMPLEMENTATION, attend)
