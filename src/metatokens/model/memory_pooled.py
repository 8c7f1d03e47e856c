"""Pooled anchors of memory mode: a meta-token has the mean keys and values of the text that it stands for.

That text is what lies between it and the anchor before, within its window; without any, it keeps its own. Nothing of an
anchor is learned then, so this is the control of what meta-tokens learn to hold. `memory_reference.py` is the
definition. Keys are averaged as the cache holds them: rotated by their positions, unless these are "compact".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .memory import Columns, MemoryPolicy


@dataclass(frozen=True)
class Pools:
    """What the anchors among T new tokens average over K columns: those of the cache and the new ones."""

    num_past: int
    """Columns of the cache."""
    of_column: Tensor
    """(B, K) int64: the pool that a column belongs to; the last one, T, is of columns in none."""
    of_anchor: Tensor
    """(B, T) int64: the pool of a new token, if it is an anchor."""
    sizes: Tensor
    """(B, T + 1) int64: columns in each pool."""
    is_pooled: Tensor
    """(B, T) bool: anchors with a pool that is not empty."""

    def fill(self, key: Tensor, value: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        """Return new keys and values (B, H, T, D) with means at the anchors.

        Args:
            key: (B, H, T, D).
            value: (B, H, T, D).
            layer: of the cache before it takes them; None without a cache.
        """
        if not self.num_past:
            return self._fill(key, key), self._fill(value, value)
        return (
            self._fill(key, torch.cat([layer.keys, key], dim=2)),
            self._fill(value, torch.cat([layer.values, value], dim=2)),
        )

    def _fill(self, new: Tensor, columns: Tensor) -> Tensor:
        batch, heads, _, width = new.shape
        index = self.of_column[:, None, :, None].expand_as(columns)
        sums = new.new_zeros(batch, heads, self.sizes.shape[1], width).scatter_add(2, index, columns)
        means = sums / self.sizes.clamp(min=1)[:, None, :, None]
        own = means.gather(2, self.of_anchor[:, None, :, None].expand_as(new))
        return torch.where(self.is_pooled[:, None, :, None], own.to(new.dtype), new)


def find_pools(policy: MemoryPolicy, new: Columns, past: Columns | None) -> Pools:
    """Return the pools of new tokens behind the columns of a cache, which are None before anything was read."""
    batch, num_new = new.shape
    columns = new if past is None else past.join(new)
    first = new.rank[:, :1]
    of_anchor = new.rank - first
    # the clock of each pool's anchor; text behind the last anchor has none, and no one asks for its mean
    slots = torch.where(new.is_anchor, of_anchor, num_new)
    clocks = new.clock.new_zeros(batch, num_new + 1).scatter(1, slots, new.clock)
    pool = columns.rank - first
    in_window = columns.clock > clocks.gather(1, pool.clamp(min=0)) - policy.window
    of_column = torch.where(columns.is_text & (pool >= 0) & in_window, pool, num_new)
    sizes = torch.zeros_like(clocks).scatter_add(1, of_column, torch.ones_like(of_column))
    is_pooled = new.is_anchor & (sizes.gather(1, of_anchor) > 0)
    return Pools(columns.shape[1] - num_new, of_column, of_anchor, sizes, is_pooled)
