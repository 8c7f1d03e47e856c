"""What the lens hands out: the activations of one forward pass, and each attention as it is about to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metatokens.errors import UsageError
from metatokens.lens.layout import Branch
from metatokens.lens.positions import at_columns

BLOCK_SCORES = 2**22
"""Scores at a time, at most, except for a single row: 16 MB."""


class ScoreBlock(NamedTuple):
    """Scores of some queries over the keys up to the last of them."""

    scores: Tensor
    """(B, H, r, K) float32 or better."""
    visible: Tensor
    """(1 or B, 1 or H, r, K) bool."""
    rows: Tensor
    """(r,) indices of the queries."""


@dataclass(frozen=True)
class AttentionCall:
    """What one attention is about to compute, for `Lens.observe`."""

    layer: int
    branch: Branch
    query_BHTD: Tensor
    """Rotated; without a cache."""
    key_BHTD: Tensor
    mask: Any
    """None for plain causal attention, bool (True = keep) or additive, (B or 1, 1 or H, T, T)."""
    scaling: float
    columns: Tensor
    """(B, T) int64: the column in the sequence of each token; -1 where a row of packed meta-tokens has none."""

    def score_blocks(
        self, *, rows: Tensor | None = None, heads: slice = slice(None), block_scores: int = BLOCK_SCORES
    ) -> Iterator[ScoreBlock]:
        """Yield the causal scores, block of queries by block of queries, so that no square array is stored.

        Args:
            rows: (Q,) rising indices of the queries; None takes all.
            heads: which heads.
            block_scores: Scores at a time, at most, except for a single row.

        Raises:
            UsageError: An attention backend whose mask is no tensor.
        """
        mask = self._tensor_mask(heads)
        precise = torch.promote_types(self.query_BHTD.dtype, torch.float32)
        query, key = self.query_BHTD[:, heads].to(precise), self.key_BHTD[:, heads].to(precise)
        everything = torch.arange(query.shape[-2], device=query.device)
        rows_at_a_time = max(1, block_scores // key[..., 0].numel())
        for chosen in (everything if rows is None else rows.to(query.device)).split(rows_at_a_time):
            num_keys = int(chosen.max()) + 1
            scores = query[:, :, chosen] @ key[:, :, :num_keys].transpose(-1, -2) * self.scaling
            visible = (everything[:num_keys] <= chosen[:, None])[None, None]
            if mask is not None and mask.dtype == torch.bool:
                visible = visible & mask[:, :, chosen, :num_keys]
            elif mask is not None:
                bias = mask[:, :, chosen, :num_keys]
                visible = visible & (bias > torch.finfo(mask.dtype).min / 2)
                scores = scores + bias
            yield ScoreBlock(scores, visible, chosen)

    def _tensor_mask(self, heads: slice) -> Tensor | None:
        if self.mask is None:
            return None
        if isinstance(self.mask, Tensor):
            return self.mask if self.mask.shape[1] == 1 else self.mask[:, heads]
        raise UsageError(
            "attention implementation",
            expected="eager or sdpa, whose masks can be read",
            found=type(self.mask).__name__,
            remedy='call model.set_attn_implementation("sdpa")',
        )


class Captured(Mapping[str, Tensor]):
    """Activations that one forward pass left, by the names of their taps.

    Without `at` they are as the model made them, (B, T, ...); with it they are packed to the selected tokens, (n, ...),
    row by row. A tap that did not fire has no key: those of meta-attention are silent without meta-tokens.
    """

    def __init__(self, names: frozenset[str], at: Tensor | None, dtype: torch.dtype | None) -> None:
        """Wait for the taps of these names."""
        self.names, self.at, self.dtype = names, at, dtype
        self.meta_columns: Tensor | None = None
        """(B, M) int64, the column of each packed meta-token, -1 for padding; None without a tap of meta-attention."""
        self._values: dict[str, Tensor] = {}
        self._indices: dict[str, Tensor] = {}

    def index_of(self, name: str) -> Tensor:
        """Return (n, 2) int64, row and column of each selected token of a tap.

        Those of meta-attention leave out tokens that take no part in it.

        Raises:
            ValueError: A capture without `at`, which selects nothing.
        """
        self[name]
        if self.at is None:
            raise ValueError("a capture without `at` keeps all tokens as they are and has no index")
        return self._indices[name]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        if name in self.names:
            raise KeyError(f"{name} has not fired: no forward pass yet, or one without meta-tokens")
        raise KeyError(f"{name} is not among the captured names")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def store(self, name: str, value: Tensor, columns: Tensor) -> None:
        """Keep a copy of the selected tokens of an activation (B, T, ...) whose columns are (B, T)."""
        if name in self._values:
            raise ValueError("a capture keeps one forward pass; open a new one for each")
        value = value.detach()
        if self.at is not None:
            rows, places = at_columns(self.at, columns).nonzero(as_tuple=True)
            self._indices[name] = torch.stack([rows, columns[rows, places]], dim=1)
            value = value[rows, places]
        self._values[name] = value.to(self.dtype or value.dtype, copy=self.at is None)
        if ".meta_attn." in name:
            self.meta_columns = columns
