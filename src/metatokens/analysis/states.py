"""The residual stream of a forward pass, and which of its tokens are meta-tokens, text or padding.

Layers count from 0, the state before the first block, to L, the state after the last, before the final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metatokens.analysis.lens import Lens


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
