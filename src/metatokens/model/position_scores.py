"""Position encodings with weights of their own in each attention: Transformer-XL's and DAPE.

Both work on what the attention has anyway: explicit positions for the one, the mask with its bias for the other. So
caches, padding and packed meta-attention need to know nothing of them.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn


class Sinusoids(NamedTuple):
    """Sines and cosines of the positions of T tokens, for `RelativeKeys`; a tuple, see `RotaryTables`."""

    sin: Tensor
    """(B or 1, T, C / 2)."""
    cos: Tensor
    """(B or 1, T, C / 2)."""

    def apply(self, query_BHTD: Tensor, key_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as they are: an attention's `RelativeKeys` enter the positions."""
        return query_BHTD, key_BHTD

    def at(self, index_BM: Tensor) -> Self:
        """Return the same for the tokens at `index_BM` (B, M) of each row."""
        return self._replace(
            **{
                name: torch.take_along_dim(table.expand(len(index_BM), -1, -1), index_BM[..., None], dim=1)
                for name, table in self._asdict().items()
            }
        )


class SinusoidEmbedding(nn.Module):
    """The sinusoids of Transformer-XL, whose frequencies are those of Vaswani et al. 2017."""

    def __init__(self, config: Any) -> None:
        """Take the width of the model."""
        super().__init__()
        self.num_frequencies = config.hidden_size // 2

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Sinusoids:
        """Return the sinusoids of positions (B or 1, T), in the dtype of `hidden`."""
        precision = torch.promote_types(hidden.dtype, torch.float32)
        exponents = torch.arange(self.num_frequencies, device=hidden.device, dtype=precision) / self.num_frequencies
        angles = position_ids[..., None] * 10_000.0**-exponents
        return Sinusoids(angles.sin().to(hidden.dtype), angles.cos().to(hidden.dtype))


class RelativeKeys(nn.Module):
    """Transformer-XL's relative encoding (Dai et al. 2019, section 3.3).

    The score of a query and a key at distance d is (q + u) k + (q + v) W r(d), with the sines and cosines r(d) of the
    distance, (C,). Those of a difference are products of those of its two ends, so the second term is one, too, of a
    vector of the query's and a vector of the key's position alone. Here both terms are one product of wider queries and
    keys, D + C in place of D, which every backend and cache takes.
    """

    def __init__(self, config: Any) -> None:
        """Create u and v, at zero, and W."""
        super().__init__()
        heads, width = config.num_attention_heads, config.hidden_size
        self.content_bias = nn.Parameter(torch.zeros(heads, config.head_dim))
        self.distance_bias = nn.Parameter(torch.zeros(heads, config.head_dim))
        self.distance_proj = nn.Linear(width, heads * config.head_dim, bias=False)

    def forward(self, query: Tensor, key: Tensor, tables: Sinusoids) -> tuple[Tensor, Tensor]:
        """Return queries and keys (B, H, T, D + C) of those (B, H, T, D), at the positions of `tables`."""
        heads, size = self.content_bias.shape
        weights = self.distance_proj.weight.view(heads, size, -1)
        asked = (query + self.distance_bias[:, None]) @ weights
        # a sin(i - j) + b cos(i - j) = (a sin i + b cos i) cos j + (b sin i - a cos i) sin j
        of_sin, of_cos = asked.chunk(2, dim=-1)
        sin, cos = tables.sin[:, None].to(query.dtype), tables.cos[:, None].to(query.dtype)
        places = torch.cat([of_sin * sin + of_cos * cos, of_cos * sin - of_sin * cos], dim=-1)
        own = torch.cat([cos, sin], dim=-1).expand(*key.shape[:3], -1)
        return torch.cat([query + self.content_bias[:, None], places], -1), torch.cat([key, own], -1)


class AdaptiveBias(nn.Module):
    """DAPE (Zheng et al. 2024, section 3): a map over heads of a pair's scores and static bias, added to both.

    Two layers, 2 H to H to H, with a leaky rectifier between them.
    """

    def __init__(self, config: Any) -> None:
        """Create the map."""
        super().__init__()
        heads = config.num_attention_heads
        self.up_proj = nn.Linear(2 * heads, heads)
        self.down_proj = nn.Linear(heads, heads)

    def forward(self, scores: Tensor, bias: Tensor) -> Tensor:
        """Return what is added, (B, H, Q, K), to scores (B, H, Q, K) with a bias (B or 1, H, Q, K)."""
        both = torch.cat([scores, bias.expand_as(scores)], dim=1).movedim(1, -1)
        up, down = (
            (layer.weight.to(both.dtype), layer.bias.to(both.dtype)) for layer in (self.up_proj, self.down_proj)
        )
        inner = nn.functional.leaky_relu(nn.functional.linear(both, *up))
        return nn.functional.linear(inner, *down).movedim(-1, 1)
