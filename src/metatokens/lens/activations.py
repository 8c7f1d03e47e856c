"""What the lens hands out: the activations of one forward pass, and each attention as it is about to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metatokens.errors import UsageError
from metatokens.lens.layout import Branch


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


class Captured(Mapping[str, Tensor]):
    """Activations that one forward pass left, by the names of their taps.

    With `at`, each is packed to the selected tokens, (n, ...), in the order of `index`; else as it is, (B, T, ...).
    """

    def __init__(self, names: frozenset[str], at: Tensor | None, dtype: torch.dtype | None, device: str | None) -> None:
        """Wait for the taps of these names."""
        self.names, self.at, self.dtype, self.device = names, at, dtype, device
        self.meta_columns: Tensor | None = None
        """(B, M) int64, the column of each packed meta-token, -1 for padding; None without a tap of meta-attention."""
        self._values: dict[str, Tensor] = {}
        self._indices: dict[str, Tensor] = {}
        self._selections: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def index(self) -> Tensor:
        """(n, 2) int64, row and column of each selected token, where all taps have the same.

        Raises:
            UsageError: Nothing was selected or captured, or `at` holds tokens that only some of the taps have.
        """
        indices = list(self._indices.values())
        if indices and all(index is indices[0] or torch.equal(index, indices[0]) for index in indices):
            return indices[0]
        raise UsageError(
            "index of a capture",
            expected="packed taps of the same tokens",
            found="taps that hold different ones" if indices else "none",
            remedy="ask index_of(name)" if indices else "run the lens under capture(..., at=mask)",
        )

    def index_of(self, name: str) -> Tensor:
        """Return (n, 2) int64, row and column of each selected token of a tap.

        Those of meta-attention leave out tokens that take no part in it.
        """
        self[name]
        return self._indices[name] if self.at is not None else self.index

    def __getitem__(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        raise UsageError(
            f"capture of {name}",
            expected="a tap that was asked for and fired",
            found="no forward pass with meta-tokens" if name in self.names else "one that was not asked for",
            remedy="run the lens within the context" if name in self.names else "add it to the names",
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def store(self, name: str, value: Tensor, columns: Tensor, finish: Callable[[Tensor], Tensor] | None) -> None:
        """Keep a copy of the selected tokens; `finish` is applied to these alone."""
        if name in self._values:
            raise UsageError(
                "capture", expected="one forward pass", found="a second", remedy="open a new capture for each"
            )
        value = value.detach()
        if self.at is not None:
            chosen, self._indices[name] = self._select(self.at, columns)
            value = value[chosen]
        if finish is not None:
            value = finish(value).detach()
        is_copy = self.at is not None or finish is not None
        self._values[name] = value.to(device=self.device, dtype=self.dtype or value.dtype, copy=not is_copy)
        if ".meta_attn." in name:
            self.meta_columns = columns

    def _select(self, at: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens are selected, (B, T) bool, and their (n, 2) rows and columns."""
        for known, chosen, index in self._selections:
            if known is columns:
                return chosen, index
        if at.shape[0] not in (1, len(columns)):
            raise UsageError(
                "at",
                expected=f"(1 or {len(columns)}, T), rows of the batch",
                found=f"{tuple(at.shape)}",
                remedy="give one mask for all rows or one for each",
            )
        inside = (columns >= 0) & (columns < at.shape[1])
        at = at.to(columns.device).expand(len(columns), -1)
        chosen = inside & at.gather(1, columns.clamp(0, at.shape[1] - 1))
        rows, places = chosen.nonzero(as_tuple=True)
        index = torch.stack([rows, columns[rows, places]], dim=1).to(self.device)
        self._selections.append((columns, chosen, index))
        return chosen, index
