"""The residual stream of a forward pass, and which of its tokens are meta-tokens, text or padding.

Layers count from 0, the state before the first block, to L, the state after the last, before the final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatokens.errors import UsageError
from metatokens.lens.lens import Lens


def find_meta_tokens(lens: Lens, input_ids: Tensor) -> Tensor:
    """Tell which ids are the model's meta-token, in the shape of the ids; none for a model without one."""
    meta_token_id = getattr(lens.model.config, "meta_token_id", None)
    if meta_token_id is None:
        return torch.zeros_like(input_ids, dtype=torch.bool)
    is_meta: Tensor = input_ids == meta_token_id
    return is_meta


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Tell which tokens are no padding, (B, T) bool."""
    return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def residual_names(lens: Lens) -> list[str]:
    """Return the taps of the L + 1 states, in their order."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(len(lens.layout.blocks)))]


def capture_residuals(
    lens: Lens, input_ids: Tensor, *, attention_mask: Tensor | None = None, at: Tensor | None = None
) -> list[Tensor]:
    """Return the L + 1 states of one forward pass, float32: (B, T, C), or (n, C) of the tokens in `at`, row by row.

    Args:
        lens: on the model.
        input_ids: (B, T).
        attention_mask: (B, T), 0 at padding.
        at: (B, T) bool; None keeps all.
    """
    names = residual_names(lens)
    with lens.capture(names, at=at, dtype=torch.float32) as captured:
        lens(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    return [captured[name] for name in names]


def mean_of_last(embeddings_BTC: Tensor, text_BT: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Average the embeddings of the last `window` text tokens strictly before each position.

    Args:
        embeddings_BTC: (B, T, C).
        text_BT: (B, T) bool, True at text tokens; neither meta-tokens nor padding.
        window: how many, at least 1.

    Returns:
        Means (B, T, C) float64, and (B, T) bool that tells where so many text tokens stand before the position;
        elsewhere the mean is of what there is, or 0.
    """
    if window < 1:
        raise UsageError("window", expected="at least 1 token", found=str(window), remedy="average over some tokens")
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
