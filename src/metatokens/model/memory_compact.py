"""Compact positions of memory mode: no distance grows with the text, so a text may be longer than the training's.

A key in the window stands at its ordinary distance. A kept one is counted among the kept alone: an anchor at the number
of anchors from the query back to it, a sink in front of the anchors that are remembered. The three groups of keys have
rotations of their own, for the query too, and one softmax over all of them (the same as merging three attentions by
their log-sum-exp). So the cache holds keys that are not rotated yet.

Source of the idea: positions within the cache, as in StreamingLLM (Xiao et al. 2023, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .memory import Columns, MemoryMask, MemoryPolicy, attend_to_scores, take_columns
from .positions import Rotary


def compact_clocks(policy: MemoryPolicy, queries: Columns, keys: Columns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the clocks of kept keys: of queries and keys (B, Q) and (B, K) towards anchors, then towards sinks.

    The difference of a query's clock and a key's is their distance, counted among the kept tokens.
    """
    anchors = queries.rank + queries.is_anchor.long()
    remembered = anchors if policy.memory_limit is None else anchors.clamp(max=policy.memory_limit)
    return anchors, keys.rank, policy.num_sinks + remembered, keys.clock.clamp(min=0, max=policy.num_sinks)


def largest_distance(policy: MemoryPolicy, queries: Columns) -> int:
    """Return the largest distance of queries (B, Q) towards a kept token, a sink, which the positions must hold."""
    _, _, to_sinks, _ = compact_clocks(policy, queries, queries)
    return int(to_sinks.max())


@dataclass(frozen=True)
class CompactMask(MemoryMask):
    """Who sees whom, and at what distance; takes queries and keys that are not rotated."""

    rotate: Callable[[Tensor], Rotary] | None = None
    """From positions (B, T) to the rotation of T tokens."""

    @cached_property
    def _rotations(self) -> list[tuple[Rotary, Rotary]]:
        """Of queries and permuted keys: in the window, towards anchors, towards sinks."""
        assert self.rotate is not None
        to_anchors, of_anchors, to_sinks, of_sinks = self._clocks()
        pairs = (
            (self.queries.positions, self.permuted_keys.positions),
            (to_anchors, of_anchors),
            (to_sinks, of_sinks),
        )
        return [(self.rotate(of_query), self.rotate(of_key)) for of_query, of_key in pairs]

    def _clocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return compact_clocks(self.policy, self.queries, self.permuted_keys)

    def _is_near(self, queries: Columns, keys: Columns) -> Tensor:
        """Tell which keys stand at their ordinary distance; the tensors of both broadcast together."""
        return (keys.clock > queries.clock - self.policy.window) & keys.is_text

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float = 0.0) -> Tensor:
        """Attend chunk by chunk, as `MemoryMask.attend` does."""
        key, value = (take_columns(tensor, self.permutation) for tensor in (key, value))
        rotated = [(of_query.apply(query, query)[0], of_key.apply(key, key)[1]) for of_query, of_key in self._rotations]
        queries = zip(*(self.split(of_query) for of_query, _ in rotated), strict=True)
        keys = zip(*(self.visits(of_key) for _, of_key in rotated), strict=True)
        outputs = []
        for chunk, own, visited, values in zip(self.chunks, queries, keys, self.visits(value), strict=True):
            asking = self.queries.part(chunk.start, chunk.stop).map(lambda tensor: tensor[:, None, :, None])
            columns = chunk.visit_columns(self.permuted_keys).map(lambda tensor: tensor[:, None, None])
            window, anchors, sinks = (
                torch.matmul(q, k.transpose(2, 3)) * scaling for q, k in zip(own, visited, strict=True)
            )
            scores = torch.where(self._is_near(asking, columns), window, torch.where(columns.is_sink, sinks, anchors))
            outputs.append(attend_to_scores(scores, chunk.mask, values, dropout=dropout))
        return torch.cat(outputs, dim=2).transpose(1, 2)
