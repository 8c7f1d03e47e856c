"""Attention of a long grafted pass through transformers' attention interface: exact, and as sparse as its mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import AttentionInterface

from metatokens.config.graft import GraftConfig
from metatokens.graft.spreading import policy_of, visible
from metatokens.model.memory import Columns, MemoryMask
from metatokens.model.memory_compact import CompactMask
from metatokens.model.positions import RotaryTables

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


@dataclass(frozen=True, kw_only=True)
class CompactGraftMask(GraftMask, CompactMask):
    """The same with compact positions; takes queries and keys that are not rotated."""

    def _clocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return compact_clocks(self.config, self.queries, self.permuted_keys)

    def _is_near(self, queries: Columns, keys: Columns) -> Tensor:
        # an anchor sees itself in the place of the token before it
        return super()._is_near(queries, keys) | (keys.order == queries.order)


def compact_clocks(config: GraftConfig, queries: Columns, keys: Columns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the clocks of kept keys: of queries and keys (B, Q) and (B, K) towards anchors, then towards sinks.

    The difference of a query's clock and a key's is their distance. Anchors are a step apart, and the newest of those
    whose text has left the window is `window` tokens away, or one more where the window holds an anchor more. A query's
    clock depends on its place in the text alone, so an anchor's is that of the token before it.
    """
    anchors = ((queries.clock + 1) // config.every - config.num_sinks // config.every).clamp(min=0)
    remembered = anchors if config.memory_limit is None else anchors.clamp(max=config.memory_limit)
    before = config.window - config.window // config.every - 1
    return anchors + before, keys.rank, config.num_sinks + remembered + before, keys.clock.clamp(0, config.num_sinks)


class Turn(NamedTuple):
    """Rotation of a decoder's own kind; some kinds rotate the first dimensions of a head alone."""

    tables: RotaryTables

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (B, H, T, D) rotated."""
        width = self.tables.cos.shape[-1]
        turned = self.tables.apply(query_BHTD[..., :width], key_BHTD[..., :width])
        query, key = (
            torch.cat([part, whole[..., width:]], -1)
            for part, whole in zip(turned, (query_BHTD, key_BHTD), strict=True)
        )
        return query, key

    def at(self, index_BM: Tensor) -> Self:
        """Return the same for the tokens at `index_BM` (B, M) of each row."""
        return self._replace(tables=self.tables.at(index_BM))


def rotation_of(decoder: Any, states: Tensor) -> Callable[[Tensor], Turn]:
    """Return what maps positions (B, T) to their rotation in a decoder, in the type of `states`."""

    def rotate(positions: Tensor) -> Turn:
        # the decoder's attention has scaled queries and keys already, as at position 0
        cos, sin = (table / decoder.rotary_emb.attention_scaling for table in decoder.rotary_emb(states, positions))
        return Turn(RotaryTables(cos, sin))

    return rotate


def make_mask(
    config: GraftConfig, queries: Columns, keys: Columns, rotate: Callable[[Tensor], Turn] | None
) -> GraftMask:
    """Return the mask of a pass, with compact positions if `rotate` is given."""
    policy = policy_of(config)
    if rotate is None:
        return GraftMask(policy=policy, queries=queries, keys=keys, config=config)
    return CompactGraftMask(policy=policy, queries=queries, keys=keys, config=config, rotate=rotate)


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
