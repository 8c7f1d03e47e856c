"""Edits of activations and of attention edges, for `Lens.edit`.

An edit names the taps that it changes and is a pure function of the activation: it returns a new tensor and writes
into none. Positions are columns of the whole sequence, (B, T) or (1, T), also where a cache holds most of it, so an
edit means the same under cached decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from metatokens.analysis.layout import Branch

EdgePattern = Callable[[Tensor, Tensor], Tensor]
"""Maps columns of queries (B, Q) and of keys (B, K) to bool (B, Q, K), True where an edge is cut. A column is -1 where
a row of packed meta-tokens has none."""


@dataclass(frozen=True)
class Edit:
    """A change of the activations whose names match."""

    name: str
    """Name of a tap, or a pattern as `blocks.*.hook_resid_post`."""
    change: Callable[[Tensor, Tensor], Tensor]
    """Maps an activation (B, T, ...) and the columns (B, T) of its tokens to the new activation."""


@dataclass(frozen=True)
class EdgeCut:
    """Edges of an attention that carry nothing; the softmax runs over the others. A token always sees itself."""

    layers: frozenset[int] | None
    """None means all."""
    branch: Branch
    pattern: EdgePattern


def replace(name: str, value: Tensor, *, at: Tensor | None = None) -> Edit:
    """Put a value in place of an activation.

    Args:
        name: of the taps.
        value: one value for all tokens, (C,) or (H, D), or one for each column of the sequence, (B or 1, T, ...).
        at: (B or 1, T) bool, True at tokens to change; None means all.
    """
    return Edit(name, lambda old, columns: _merge(old, _take(value, columns, old), columns, at))


def add(name: str, value: Tensor, *, at: Tensor | None = None) -> Edit:
    """Add a value to an activation; the arguments are those of `replace`."""
    return Edit(name, lambda old, columns: _merge(old, old + _take(value, columns, old), columns, at))


def scale(name: str, factor: float, *, at: Tensor | None = None) -> Edit:
    """Multiply an activation; a factor of 0 removes it."""
    return Edit(name, lambda old, columns: _merge(old, old * factor, columns, at))


def cut_edges(layers: Iterable[int] | None, *, query: Tensor, key: Tensor, branch: Branch = "attn") -> EdgeCut:
    """Cut every edge from a query of one set to a key of another, but for a token's edge to itself.

    Args:
        layers: in which layers; None means all.
        query: (B or 1, T) bool, True at queries of the set.
        key: (B or 1, T) bool, True at keys of the set.
        branch: of which attention.
    """

    def pattern(query_columns: Tensor, key_columns: Tensor) -> Tensor:
        return (_at_columns(query, query_columns)[:, :, None]) & (_at_columns(key, key_columns)[:, None, :])

    return cut_pattern(layers, pattern, branch=branch)


def cut_older_edges(layers: Iterable[int] | None, *, is_meta: Tensor, num_kept: int) -> EdgeCut:
    """Cut what a meta-token reads, by meta-attention, from more than `num_kept` meta-tokens back.

    Args:
        layers: in which layers; None means all.
        is_meta: (B or 1, T) bool, True at meta-tokens.
        num_kept: how many of the nearest earlier meta-tokens stay in sight.
    """
    ordinal = is_meta.long().cumsum(-1)

    def pattern(query_columns: Tensor, key_columns: Tensor) -> Tensor:
        distance = _at_columns(ordinal, query_columns)[:, :, None] - _at_columns(ordinal, key_columns)[:, None, :]
        return distance > num_kept

    return cut_pattern(layers, pattern, branch="meta_attn")


def cut_pattern(layers: Iterable[int] | None, pattern: EdgePattern, *, branch: Branch = "attn") -> EdgeCut:
    """Cut the edges that a function of the columns names."""
    return EdgeCut(None if layers is None else frozenset(layers), branch, pattern)


def _at_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return (B or 1, T) values at columns (B, n); zero or False beyond the last and at -1."""
    inside = (columns >= 0) & (columns < values.shape[-1])
    taken = values.expand(columns.shape[0], -1).gather(1, columns.clamp(0, values.shape[-1] - 1))
    return torch.where(inside, taken, torch.zeros_like(taken))


def _take(value: Tensor, columns: Tensor, old: Tensor) -> Tensor:
    """Return the value for each token of an activation, to broadcast against it."""
    if value.ndim < old.ndim:
        return value.to(old)
    index = columns.clamp(0, value.shape[1] - 1)[(...,) + (None,) * (value.ndim - 2)]
    return value.expand(columns.shape[0], *value.shape[1:]).gather(1, index.expand(-1, -1, *value.shape[2:])).to(old)


def _merge(old: Tensor, new: Tensor, columns: Tensor, at: Tensor | None) -> Tensor:
    if at is None:
        return new.expand_as(old).clone()
    chosen = _at_columns(at, columns)[(...,) + (None,) * (old.ndim - 2)]
    return torch.where(chosen, new, old)
