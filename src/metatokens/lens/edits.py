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

from metatokens.errors import UsageError
from metatokens.lens.layout import Branch

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
    heads: frozenset[int] | None = None
    """None means all, whose mask takes H times less memory."""


def replace(name: str, value: Tensor, *, at: Tensor | None = None) -> Edit:
    """Put a value in place of an activation.

    Args:
        name: of the taps.
        value: one value for all tokens, (C,) or (H, D); or one for each column of the sequence, (B or 1, T, ...); or
            one for each token that `at` selects, (n, ...), in the order in which `Lens.capture` packs them.
        at: (B or 1, T) bool, True at tokens to change; None means all.
    """
    _check_positions(at)
    return Edit(name, lambda old, columns: _merge(old, _take(name, value, columns, old, at), columns, at))


def add(name: str, value: Tensor, *, at: Tensor | None = None) -> Edit:
    """Add a value to an activation; the arguments are those of `replace`."""
    _check_positions(at)
    return Edit(name, lambda old, columns: _merge(old, old + _take(name, value, columns, old, at), columns, at))


def scale(name: str, factor: float, *, at: Tensor | None = None) -> Edit:
    """Multiply an activation; a factor of 0 removes it."""
    return transform(name, lambda old: old * factor, at=at)


def transform(name: str, function: Callable[[Tensor], Tensor], *, at: Tensor | None = None) -> Edit:
    """Put an activation through a function, such as a projection that erases a direction.

    Args:
        name: of the taps.
        function: maps the activation of all tokens at hand, (B, T, ...), to a new tensor of its shape, each token by
            itself; under cached decoding it gets them in other portions.
        at: (B or 1, T) bool, True at tokens to change; None means all.
    """
    _check_positions(at)
    return Edit(name, lambda old, columns: _merge(old, function(old).to(old), columns, at))


def cut_edges(
    layers: Iterable[int] | None,
    *,
    query: Tensor,
    key: Tensor,
    branch: Branch = "attn",
    heads: Iterable[int] | None = None,
) -> EdgeCut:
    """Cut every edge from a query of one set to a key of another, but for a token's edge to itself.

    Args:
        layers: in which layers; None means all.
        query: (B or 1, T) bool, True at queries of the set.
        key: (B or 1, T) bool, True at keys of the set.
        branch: of which attention.
        heads: of which heads; None means all.
    """
    _check_positions(query)
    _check_positions(key)

    def pattern(query_columns: Tensor, key_columns: Tensor) -> Tensor:
        return (_at_columns(query, query_columns)[:, :, None]) & (_at_columns(key, key_columns)[:, None, :])

    return cut_pattern(layers, pattern, branch=branch, heads=heads)


def cut_older_edges(layers: Iterable[int] | None, *, is_meta: Tensor, num_kept: int) -> EdgeCut:
    """Cut what a meta-token reads, by meta-attention, from more than `num_kept` meta-tokens back.

    Args:
        layers: in which layers; None means all.
        is_meta: (B or 1, T) bool, True at meta-tokens.
        num_kept: how many of the nearest earlier meta-tokens stay in sight.
    """
    _check_positions(is_meta)
    ordinal = is_meta.long().cumsum(-1)

    def pattern(query_columns: Tensor, key_columns: Tensor) -> Tensor:
        distance = _at_columns(ordinal, query_columns)[:, :, None] - _at_columns(ordinal, key_columns)[:, None, :]
        return distance > num_kept

    return cut_pattern(layers, pattern, branch="meta_attn")


def cut_pattern(
    layers: Iterable[int] | None, pattern: EdgePattern, *, branch: Branch = "attn", heads: Iterable[int] | None = None
) -> EdgeCut:
    """Cut the edges that a function of the columns names."""
    of_layers = None if layers is None else frozenset(layers)
    return EdgeCut(of_layers, branch, pattern, None if heads is None else frozenset(heads))


def _check_positions(at: Tensor | None) -> None:
    if at is None or (at.dtype == torch.bool and at.ndim == 2):
        return
    raise UsageError(
        "positions of an edit",
        expected="a mask (B or 1, T) of bool",
        found=f"{tuple(at.shape)} of {str(at.dtype).removeprefix('torch.')}",
        remedy="write it as input_ids == id, or mask[None]",
    )


def _at_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return (B or 1, T) values at columns (B, n); zero or False beyond the last and at -1."""
    if values.shape[0] not in (1, len(columns)):
        raise UsageError(
            "positions of an edit",
            expected=f"(1 or {len(columns)}, T), rows of the batch",
            found=f"{tuple(values.shape)}",
            remedy="give one mask for all rows or one for each",
        )
    inside = (columns >= 0) & (columns < values.shape[-1])
    values = values.to(columns.device).expand(len(columns), -1)
    taken = values.gather(1, columns.clamp(0, values.shape[-1] - 1))
    return torch.where(inside, taken, torch.zeros_like(taken))


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
        return value[_at_columns(rank, columns).clamp(min=0)]
    if value.ndim != old.ndim:
        raise _misfit(name, value, f"a value for all tokens, {tuple(old.shape[2:])}, or for each, (B or 1, T, ...)")
    chosen = columns if at is None else torch.where(_at_columns(at, columns), columns, -1)
    if int(chosen.max()) >= value.shape[1] or value.shape[0] not in (1, len(columns)):
        raise _misfit(name, value, "a value for each column of the sequence, or packed ones with `at`")
    index = columns.clamp(0, value.shape[1] - 1)[(...,) + (None,) * (value.ndim - 2)]
    return value.expand(len(columns), *value.shape[1:]).gather(1, index.expand(-1, -1, *value.shape[2:]))


def _misfit(name: str, value: Tensor, expected: str) -> UsageError:
    return UsageError(
        f"value for {name}",
        expected=expected,
        found=f"{tuple(value.shape)}",
        remedy="capture it with the same `at`, or without any",
    )


def _merge(old: Tensor, new: Tensor, columns: Tensor, at: Tensor | None) -> Tensor:
    if at is None:
        return new.expand_as(old).clone()
    chosen = _at_columns(at, columns)[(...,) + (None,) * (old.ndim - 2)]
    return torch.where(chosen, new, old)
