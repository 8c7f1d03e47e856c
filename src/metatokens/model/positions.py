"""Position encodings: RoPE with transformers' own frequencies and scalings, xPos, and the ALiBi bias.

Learned positions are an embedding of the model; "none" needs nothing. Every function works on explicit positions, so
packed meta-attention sees the distances that its tokens have in the whole sequence.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from .compatibility import LlamaRotaryEmbedding, apply_rotary_pos_emb

XPOS_GAMMA = 0.4  # Sun et al. 2022, section 3.2
# positions per power of zeta, as in microsoft/torchscale@main:torchscale/component/xpos_relative_position.py
XPOS_SCALE_BASE = 512


class Rotary(Protocol):
    """How positions enter the queries and keys of T tokens; an attention knows nothing else of RoPE."""

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys, (B, H, T, any width), whose products are the scores.

        Keys may be wider than queries, for the sake of later queries: the surplus is cached and not attended to.
        """

    def at(self, index_BM: Tensor) -> Self:
        """Return the same for the tokens at `index_BM` (B, M) of each row."""


class RotaryTables(NamedTuple):
    """RoPE. A tuple, so that whatever moves or casts a layer's inputs finds the tensors in it."""

    cos: Tensor
    """(B or 1, T, D)."""
    sin: Tensor
    """(B or 1, T, D)."""

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by their positions; the shapes stay."""
        query_BHTD, key_BHTD = apply_rotary_pos_emb(query_BHTD, key_BHTD, self.cos, self.sin)
        return query_BHTD, key_BHTD

    def at(self, index_BM: Tensor) -> Self:
        """Return the tables (B, M, D) of the tokens at `index_BM`."""
        return self._replace(cos=_take_positions(self.cos, index_BM), sin=_take_positions(self.sin, index_BM))


class XposTables(NamedTuple):
    """RoPE with a score that decays with the distance, by a rate of its own for each pair of dimensions."""

    rotation: RotaryTables
    scale: Tensor
    """(B or 1, T, D): zeta to the power of the position, float32 or wider."""

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate, then multiply queries and divide keys by the scale; the shapes stay."""
        query_BHTD, key_BHTD = self.rotation.apply(query_BHTD, key_BHTD)
        scale = self.scale[:, None]
        return (query_BHTD * scale).to(query_BHTD.dtype), (key_BHTD / scale).to(key_BHTD.dtype)

    def at(self, index_BM: Tensor) -> Self:
        """Return the tables of the tokens at `index_BM`."""
        return self._replace(rotation=self.rotation.at(index_BM), scale=_take_positions(self.scale, index_BM))


def _take_positions(table: Tensor, index: Tensor) -> Tensor:
    """Gather rows of a table, (B or 1, T, D), at (B, M)."""
    table = table.expand(index.shape[0], -1, -1)
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


class MetaTokenRotaryEmbedding(LlamaRotaryEmbedding):
    """cos and sin of the positions, from transformers' ROPE_INIT_FUNCTIONS (default, linear, dynamic, yarn ...).

    Its name and its `original_inv_freq` make `from_pretrained` refill the buffers, which are not saved.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor
    max_seq_len_cached: int | Tensor
    original_max_seq_len: int

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device but stay exact: in bfloat16, far positions would turn by whole radians too much."""
        exact = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        if not exact[0].is_meta:
            self.inv_freq, self.original_inv_freq = (tensor.to(self.inv_freq.device) for tensor in exact)
        return self

    def forward(self, hidden: Tensor, position_ids: Tensor) -> RotaryTables:
        """Return the tables of positions (B or 1, T), in the dtype of `hidden`."""
        if self.rope_type == "dynamic" and self.max_seq_len_cached > self.original_max_seq_len:
            # transformers keeps the frequencies of the longest batch so far; here they follow from this one alone
            self.inv_freq, self.max_seq_len_cached = self.original_inv_freq, self.original_max_seq_len
        return RotaryTables(*super().forward(hidden, position_ids))


class XposRotaryEmbedding(MetaTokenRotaryEmbedding):
    """xPos (Sun et al. 2022): RoPE whose pair d of a score decays as zeta_d^(distance / 512).

    zeta_d = (2 d / D + 0.4) / 1.4. Each side has its part, the query zeta^(t / 512) and the key zeta^(-t / 512), with t
    counted from the middle of the window, which keeps both within range. torchscale counts from the middle of each
    call; here the middle is fixed, so that keys of a cache stay right. Scores do not depend on it.

    At the ends of the window the two parts are far from one, and must not leave the range of the number format: float16
    has room for 3,966 positions, bfloat16 and float32 for 35,694.
    """

    def forward(self, hidden: Tensor, position_ids: Tensor) -> XposTables:  # type: ignore[override] # another table
        """Return the tables of positions (B or 1, T), in the dtype of `hidden`."""
        self._check_range(hidden)
        rotation = super().forward(hidden, position_ids)
        pairs = self.inv_freq.shape[0]
        zeta = (torch.arange(pairs, device=hidden.device) / pairs + XPOS_GAMMA) / (1 + XPOS_GAMMA)
        power = (position_ids - self.original_max_seq_len // 2) / XPOS_SCALE_BASE
        scale = zeta ** power[..., None]
        precision = torch.promote_types(hidden.dtype, torch.float32)
        return XposTables(rotation, torch.cat([scale, scale], dim=-1).to(precision))

    def _check_range(self, hidden: Tensor) -> None:
        """Raise ValueError where a product of a late query and an early key leaves the range of the number format."""
        dtype, device = hidden.dtype, hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # each side reaches (1 / zeta_0)^(window / 2 / 512), and masked products hold that of both
        base = (1 + XPOS_GAMMA) / XPOS_GAMMA
        longest = int(-math.log(torch.finfo(dtype).tiny) / math.log(base) * XPOS_SCALE_BASE)
        if self.original_max_seq_len > longest:
            raise ValueError(
                f'position_encoding "xpos" over {self.original_max_seq_len} positions leaves the range of {dtype}, '
                f"which has room for {longest}: use a wider dtype or a shorter window"
            )


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
    return (mask + bias).clamp(min=lowest)
