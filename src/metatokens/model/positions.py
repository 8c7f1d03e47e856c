"""Position encodings: RoPE with transformers' own frequencies and scalings, and the ALiBi bias.

Learned positions are an embedding of the model; "none" needs nothing. Every function works on explicit positions, so
packed meta-attention sees the distances that its tokens have in the whole sequence.
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (B or 1, T, D)."""


class MetaTokenRotaryEmbedding(LlamaRotaryEmbedding):
    """cos and sin of the positions, from transformers' ROPE_INIT_FUNCTIONS (default, linear, dynamic, yarn ...).

    Its name and its `original_inv_freq` make `from_pretrained` refill the buffers, which are not saved.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device but stay exact: in bfloat16, far positions would turn by whole radians too much."""
        exact = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if not exact[0].is_meta:
            self.inv_freq, self.original_inv_freq = (tensor.to(self.inv_freq.device) for tensor in exact)
        return self


def rotate(query_BHTD: Tensor, key_BHTD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions; without rotary positions return them unchanged."""
    if rotary is None:
        return query_BHTD, key_BHTD
    query_BHTD, key_BHTD = apply_rotary_pos_emb(query_BHTD, key_BHTD, *rotary)
    return query_BHTD, key_BHTD


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the H slopes of ALiBi (Press et al. 2022, section 3; the authors' code where H is no power of two)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-8 * (head + 1) / (2 * power)) for head in range(2 * power)]
    return slopes + between[0::2][: num_heads - power]


def add_alibi(mask: Tensor, query_positions: Tensor, key_positions: Tensor, slopes: Tensor) -> Tensor:
    """Fold the ALiBi bias -slope * distance into an attention mask.

    Args:
        mask: (B or 1, 1, Q, K), bool with True = keep, or float and additive.
        query_positions: (B or 1, Q) integer positions.
        key_positions: (B or 1, K) integer positions.
        slopes: (H,), in the dtype of the queries.

    Returns:
        Additive mask (B or 1, H, Q, K) in the dtype of `slopes`. A masked entry holds the lowest finite number, so a
        row without any key stays finite.
    """
    distance = (query_positions[:, :, None] - key_positions[:, None, :])[:, None]
    bias = -slopes[:, None, None] * distance
    lowest = torch.finfo(slopes.dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, lowest)
    return torch.where(mask == 0, bias, lowest)
