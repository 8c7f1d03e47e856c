"""Edits of activations and of attention edges, for `Lens.edit`.

An edit names the taps that it changes and is a pure function of the activation: it returns a new tensor and leaves the
old one as it is. Positions are columns of the whole sequence, (B, T) or (1, T), even where a cache holds most of it, so
an edit means the same under cached decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from metatokens.lens.layout import Branch
from metatokens.lens.positions import at_columns, check_positions

EdgePattern = Callable[[Tensor, Tensor], Tensor]
"""Maps columns of queries (B, Q) and of keys (B, K) to bool (B, Q, K), True where an edge is cut. A column is -1 where
a row of packed meta-tokens has none."""


@dataclass(frozen=True)
class Edit:
    """A change of the activations whose names match."""

    name: str
    """Name of a tap, or a pattern such as `blocks.*.hook_resid_post`."""
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
        name: Of the taps.
        value: One value for all tokens, (C,) or (H, D); or one for each column of the sequence, (B or 1, T, ...); or
            one for each token that `at` selects, (n, ...), in the order in which `Lens.capture` packs them.
        at: (B or 1, T) bool, True at tokens to change; None means all.
    """
    check_positions(at)
    return Edit(name, lambda old, columns: _merge(old, _take(name, value, columns, old, at), columns, at))


def scale(name: str, factor: float, *, at: Tensor | None = None) -> Edit:
    """Multiply an activation; a factor of 0 removes it."""
    return transform(name, lambda old: old * factor, at=at)


def transform(name: str, function: Callable[[Tensor], Tensor], *, at: Tensor | None = None) -> Edit:
    """Put an activation through a function, such as a projection that erases a direction.

    Args:
        name: Of the taps.
        function: Maps an activation (B, T, ...) to a new tensor of its shape, each token by itself; cached decoding
            hands it fewer tokens at a time.
        at: (B or 1, T) bool, True at tokens to change; None means all.
    """
    check_positions(at)
    return Edit(name, lambda old, columns: _merge(old, function(old).to(old), columns, at))


def cut_edges(layers: Iterable[int] | None, *, query: Tensor, key: Tensor, branch: Branch = "attn") -> EdgeCut:
    """Cut every edge from a query of one set to a key of another, except a token's edge to itself.

    Args:
        layers: In which layers; None means all.
        query: (B or 1, T) bool, True at queries of the set.
        key: (B or 1, T) bool, True at keys of the set.
        branch: Of which attention.
    """
    check_positions(query)
    check_positions(key)

    def pattern(query_columns: Tensor, key_columns: Tensor) -> Tensor:
        return at_columns(query, query_columns)[:, :, None] & at_columns(key, key_columns)[:, None, :]

    return EdgeCut(None if layers is None else frozenset(layers), branch, pattern)


def cut_older_edges(layers: Iterable[int] | None, *, is_meta: Tensor, num_kept: int) -> EdgeCut:
    """Cut what a meta-token reads, through meta-attention, from more than `num_kept` meta-tokens back.

    Args:
        layers: In which layers; None means all.
        is_meta: (B or 1, T) bool, True at meta-tokens.
        num_kept: How many of the nearest earlier meta-tokens stay in sight.
    """
    check_positions(is_meta)
    ordinal = is_meta.long().cumsum(-1)

    def pattern(query_columns: Tensor, key_columns: Tensor) -> Tensor:
        distance = at_columns(ordinal, query_columns)[:, :, None] - at_columns(ordinal, key_columns)[:, None, :]
        return distance > num_kept

    return EdgeCut(None if layers is None else frozenset(layers), "meta_attn", pattern)


def _take(name: str, value: Tensor, columns: Tensor, old: Tensor, at: Tensor | None) -> Tensor:
    """Return the value for each token of an activation, to broadcast against it."""
    value = value.to(old)
    if value.ndim == old.ndim - 2:
        return value
    if value.ndim == old.ndim - 1 and at is not None:
        selected = at.to(columns.device).expand(len(columns), -1)
        num_selected = int(selected.sum())
        if len(value) != num_selected:
            raise _misfit(name, value, f"{num_selected} values, one for each token that `at` selects")
        if not num_selected:
            return old
        rank = selected.flatten().cumsum(0).view(selected.shape) - 1
        return value[at_columns(rank, columns).clamp(min=0)]
    if value.ndim != old.ndim:
        raise _misfit(name, value, f"a value for all tokens, {tuple(old.shape[2:])}, or for each, (B or 1, T, ...)")
    chosen = columns if at is None else torch.where(at_columns(at, columns), columns, -1)
    if int(chosen.max()) >= value.shape[1] or value.shape[0] not in (1, len(columns)):
        raise _misfit(name, value, "a value for each column of the sequence, or packed ones with `at`")
    index = columns.clamp(0, value.shape[1] - 1)[(...,) + (None,) * (value.ndim - 2)]
    return value.expand(len(columns), *value.shape[1:]).gather(1, index.expand(-1, -1, *value.shape[2:]))


def _misfit(name: str, value: Tensor, expected: str) -> ValueError:
    return ValueError(f"the value for {name} is {tuple(value.shape)}, expected {expected}")


def _merge(old: Tensor, new: Tensor, columns: Tensor, at: Tensor | None) -> Tensor:
    if at is None:
        return new.expand_as(old).clone()
    chosen = at_columns(at, columns)[(...,) + (None,) * (old.ndim - 2)]
    return torch.where(chosen, new, old)
