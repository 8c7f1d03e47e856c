"""The residual stream of a forward pass.

Layers count from 0, the state before the first block, to L, the state after the last, before the final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatokens.lens.lens import Lens


def residual_names(lens: Lens) -> list[str]:
    """Return the taps of the L + 1 states, in their order."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(len(lens.layout.blocks)))]


def capture_residuals(lens: Lens, input_ids: Tensor, *, at: Tensor | None = None) -> list[Tensor]:
    """Return the L + 1 states of one forward pass, float32: (B, T, C), or (n, C) of the tokens in `at`, row by row.

    Args:
        lens: On the model.
        input_ids: (B, T).
        at: (B, T) bool; None keeps all.
    """
    names = residual_names(lens)
    with lens.capture(names, at=at, dtype=torch.float32) as captured:
        lens.run(input_ids)
    return [captured[name] for name in names]


def mean_of_last(embeddings_BTC: Tensor, text_BT: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Average the embeddings of the last `window` text tokens strictly before each position.

    Args:
        embeddings_BTC: (B, T, C).
        text_BT: (B, T) bool, True at text tokens; neither meta-tokens nor padding.
        window: How many, at least 1.

    Returns:
        Means (B, T, C) float64, and (B, T) bool, True where a whole window stands before the position; elsewhere the
        mean is over the tokens that are there, or 0 without any.
    """
    if window < 1:
        raise ValueError(f"a mean needs a window of at least 1 token, not {window}")
    num_rows, num_positions, width = embeddings_BTC.shape
    ordinals = text_BT.long().cumsum(1)
    before = ordinals - text_BT.long()  # text tokens strictly before each position
    # sums[b, j] is the sum over the first j text tokens of the row
    sums = embeddings_BTC.new_zeros((num_rows, num_positions + 1, width), dtype=torch.float64)
    rows, positions = text_BT.nonzero(as_tuple=True)
    sums[rows, ordinals[rows, positions]] = embeddings_BTC[rows, positions].double()
    sums = sums.cumsum(1)
    row_index = torch.arange(num_rows, device=text_BT.device)[:, None]
    taken = before.clamp(max=window)
    means = (sums[row_index, before] - sums[row_index, before - taken]) / taken.clamp(min=1)[..., None]
    return means, before >= window
