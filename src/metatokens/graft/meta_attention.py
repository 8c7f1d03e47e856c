"""Meta-attention of a graft: in each block a second attention, among the anchors alone, whose output starts at zero.

As in the package's own model (`metatokens.model.meta_attention`) it stands behind the self-attention, with projections
of its own, and what comes of it is added to the anchors. Here the norm in front of it is the frozen one that the block
has in front of its feed-forward part, heads are grouped as those of the base, and there are no biases. Anchors are
packed, so no mask over text exists; they are rotated by their own positions where the base rotates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metatokens.model.cache import MetaDynamicLayer
from metatokens.model.positions import RotaryTables

Places = tuple[Tensor, Tensor]
"""(A,) rows and (A,) columns of A anchors, row by row."""


class Pack(NamedTuple):
    """The anchors of a pass, at the left of M columns of their own; made once for all blocks."""

    anchors: Places
    """Among the W columns of the pass."""
    places: Places
    """Among the M columns."""
    order: Tensor
    """(B, M) int64: place of each among all tokens read, -1 where a row has no such anchor."""
    pairs: Tensor
    """(B, 1, M, K) bool: who sees whom of the K anchors in the cache and in this pass."""

    def take(self, states: Tensor) -> Tensor:
        """Return the anchors of states (B or 1, W, ...): (B, M, ...), zero where a row has none."""
        rows = states.expand(len(self.order), *states.shape[1:])[self.anchors]
        return rows.new_zeros(*self.order.shape, *rows.shape[1:]).index_put(self.places, rows)


def pack_anchors(
    is_anchor: Tensor, order: Tensor, anchors: Places, *, cached: Tensor | None, limit: int | None
) -> Pack:
    """Return the pack of the anchors of a pass, of which there is at least one.

    Args:
        is_anchor: (B, W) bool.
        order: (B, W) int64, place of each column among all tokens read.
        anchors: where `is_anchor` is True.
        cached: (B, P) int64, the order of those in the cache, -1 where a row has none.
        limit: how many of the newest an anchor sees, itself among them; None means all.
    """
    places = anchors[0], is_anchor.long().cumsum(-1)[anchors] - 1
    num_new = int(places[1].max()) + 1
    new = order.new_full((len(order), num_new), -1).index_put(places, order[anchors])
    known = new if cached is None else torch.cat([cached, new], dim=1)
    pairs = (known >= 0)[:, None] & (known[:, None] <= new[:, :, None])
    if limit is not None:
        rank = (known >= 0).long().cumsum(-1)
        pairs &= rank[:, -num_new:, None] - rank[:, None] < limit
    # a row of a mask without any True has no softmax, so that a place without an anchor sees itself
    pairs[:, :, -num_new:] |= torch.eye(num_new, dtype=torch.bool, device=order.device)
    return Pack(anchors, places, new, pairs[:, None])


class AnchorAttention(nn.Module):
    """The projections of one block.

    Attributes:
        query: (heads * D, C).
        key: (key heads * D, C).
        value: (key heads * D, C).
        output: (C, heads * D), zero at the start.
    """

    def __init__(self, config: Any, generator: torch.Generator, factory: dict[str, Any]) -> None:
        """Draw them for a decoder's config; on the meta device nothing is drawn."""
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.head_size = getattr(config, "head_dim", None) or width // heads
        self.groups = heads // (getattr(config, "num_key_value_heads", None) or heads)

        def draw(num_heads: int) -> nn.Parameter:
            shape = num_heads * self.head_size, width
            if torch.device(factory["device"]).type == "meta":
                return nn.Parameter(torch.empty(shape, **factory))
            return nn.Parameter((torch.randn(shape, generator=generator) / width**0.5).to(**factory))

        self.query, self.key, self.value = draw(heads), draw(heads // self.groups), draw(heads // self.groups)
        self.output = nn.Parameter(torch.zeros(width, heads * self.head_size, **factory))

    def forward(
        self, hidden: Tensor, pack: Pack, *, rotary: tuple[Tensor, Tensor] | None, layer: MetaDynamicLayer | None
    ) -> Tensor:
        """Return the change of the anchors, (A, C).

        Args:
            hidden: (B, M, C), the packed anchors behind the norm.
            pack: where they are.
            rotary: cos and sin (B or 1, W, D) of the whole pass, where the base rotates.
            layer: of the cache, to which they are added.
        """
        query, key, value = (
            nn.functional.linear(hidden, weight.to(hidden.dtype)).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for weight in (self.query, self.key, self.value)
        )
        if rotary is not None:
            query, key = RotaryTables(*map(pack.take, rotary)).apply(query, key)
        if layer is not None:
            key, value = layer.update_meta(key, value, pack.order)
        key, value = (states.repeat_interleave(self.groups, dim=1) for states in (key, value))
        heads = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=pack.pairs)
        attended = heads.transpose(1, 2)[pack.places].flatten(1)
        return nn.functional.linear(attended, self.output.to(attended.dtype))
