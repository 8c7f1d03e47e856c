"""Position encodings that add to the scores what depends on the distance alone: ALiBi and T5's relative bias.

A bias is a function of explicit distances, so packed meta-attention sees those that its tokens have in the whole
sequence. Both attentions of every layer share it.
"""

import math
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

NUM_BUCKETS = 32  # T5's defaults (Raffel et al. 2020, section 2.1)
FAR = 128
KERPLE_LEAST = 0.01  # as in the authors' code


class PositionBias(Protocol):
    """What is added to the scores of pairs of tokens; a tuple of tensors, see `RotaryTables`."""

    def __call__(self, distance: Tensor) -> Tensor:
        """Return the bias (B, H, ...) of distances (B, H or 1, ...), int64, from a query back to a key.

        Distances to keys that are yet to come are negative, and get some finite number.
        """

    def to(self, target: Any) -> Self:
        """Return the same on another device."""


class AlibiBias(NamedTuple):
    """ALiBi: minus the distance, at a slope of its own for each head."""

    slopes: Tensor
    """(H,)."""

    def __call__(self, distance: Tensor) -> Tensor:
        """Return the bias (B, H, ...) of distances (B, H or 1, ...)."""
        return -_by_head(self.slopes, distance) * distance

    def to(self, target: Any) -> Self:
        """Return the same on another device."""
        return self._replace(slopes=self.slopes.to(target))


class KerpleBias(NamedTuple):
    """Kerple's logarithmic kernel (Chi et al. 2022, section 4): minus r log(1 + s distance), with r and s learned."""

    weights: Tensor
    """(2, H): r and s, which count as 0.01 if they are less."""

    def __call__(self, distance: Tensor) -> Tensor:
        """Return the bias (B, H, ...) of distances (B, H or 1, ...)."""
        factor, rate = (_by_head(values.clamp(min=KERPLE_LEAST), distance) for values in self.weights)
        return -factor * torch.log1p(rate * distance.clamp(min=0))

    def to(self, target: Any) -> Self:
        """Return the same on another device."""
        return self._replace(weights=self.weights.to(target))


class KerpleKernel(nn.Module):
    """The weights of `KerpleBias`."""

    def __init__(self, num_heads: int) -> None:
        """Create r and s of each head."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, num_heads))

    def forward(self, dtype: torch.dtype) -> KerpleBias:
        """Return the bias in a dtype."""
        return KerpleBias(self.weight.to(dtype))


class BucketBias(NamedTuple):
    """T5's relative bias: a learned number for each head and bucket of distances.

    A distance below half of the buckets has its own. The others share buckets that widen with the logarithm, the last
    one from 128 on without end.
    """

    table: Tensor
    """(buckets, H)."""

    def __call__(self, distance: Tensor) -> Tensor:
        """Return the bias (B, H, ...) of distances (B, H or 1, ...)."""
        num_buckets, num_heads = self.table.shape
        head = _by_head(torch.arange(num_heads, device=distance.device), distance)
        return self.table[bucket_of(distance, num_buckets), head]

    def to(self, target: Any) -> Self:
        """Return the same on another device."""
        return self._replace(table=self.table.to(target))


def bucket_of(distance: Tensor, num_buckets: int = NUM_BUCKETS) -> Tensor:
    """Return the bucket of each distance (...) int64; a negative one, to a token to come, counts as 0."""
    distance, exact = distance.clamp(min=0), num_buckets // 2
    # in float64, since a logarithm that is an epsilon low would move a whole distance
    share = (distance.clamp(min=1).double() / exact).log() / math.log(FAR / exact)
    far = exact + (share * (num_buckets - exact) + 1e-9).long()
    return torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


def _by_head(values: Tensor, distance: Tensor) -> Tensor:
    """Return one number a head, (H,), in a form that broadcasts over (B, H, ...)."""
    return values.view(-1, *[1] * (distance.ndim - 2))


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the H slopes of ALiBi (Press et al. 2022, section 3; the authors' code if H is not a power of two)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-8 * (head + 1) / (2 * power)) for head in range(2 * power)]
    return slopes + between[0::2][: num_heads - power]


def add_bias(mask: Tensor, query_positions: Tensor, key_positions: Tensor, bias: PositionBias) -> Tensor:
    """Fold a bias into an attention mask.

    Args:
        mask: (B or 1, 1, Q, K), bool with True = keep, or float and additive.
        query_positions: (B or 1, Q) integer positions.
        key_positions: (B or 1, K) integer positions.
        bias: in the dtype of the queries.

    Returns:
        Additive mask (B or 1, H, Q, K) in the dtype of `bias`. A masked entry holds the lowest finite number, so a
        row without any key stays finite.
    """
    added = bias(query_positions[:, None, :, None] - key_positions[:, None, None, :])
    lowest = torch.finfo(added.dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, added, lowest)
    return (mask + added).clamp(min=lowest)
