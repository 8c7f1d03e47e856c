"""Masks over the columns of a sequence, and what they say of the tokens at hand: all, cached steps or packed ones."""

from __future__ import annotations

import torch
from torch import Tensor


def check_positions(at: Tensor | None) -> None:
    """Raise ValueError unless this is None or a mask (B or 1, T) of bool."""
    if at is not None and (at.dtype != torch.bool or at.ndim != 2):
        dtype = str(at.dtype).removeprefix("torch.")
        raise ValueError(
            f"positions are a mask (B or 1, T) of bool, such as input_ids == id, not {tuple(at.shape)} {dtype}"
        )


def at_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Return (B or 1, T) values at columns (B, n); zero or False beyond the last column and at -1.

    Raises:
        ValueError: The number of rows is neither 1 nor that of the batch.
    """
    if values.shape[0] not in (1, len(columns)):
        raise ValueError(f"positions {tuple(values.shape)} are neither for all rows nor for each of {len(columns)}")
    inside = (columns >= 0) & (columns < values.shape[-1])
    values = values.to(columns.device).expand(len(columns), -1)
    taken = values.gather(1, columns.clamp(0, values.shape[-1] - 1))
    return torch.where(inside, taken, torch.zeros_like(taken))
