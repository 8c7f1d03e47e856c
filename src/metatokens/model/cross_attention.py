"""Dual cross-attention in place of meta-attention: LeMeViT's (Jiang et al. 2024), made causal.

`meta_attention_over: cross`: a meta-token reads the text before it, and a text token reads the meta-tokens before it.
With "gather" only the meta-tokens read. Nobody reads itself: what a token holds passes by the residual. A row that sees
nothing gets nothing. `reference.py` is the dense definition; tests hold the two equal.

No direction needs a T x T mask: M rows of queries read T columns, and T rows read M columns. All tokens are projected
once, by the four projections of meta-attention, so the parameters are those of "meta". LeMeViT has projections of its
own for each side, and puts dual cross-attention in the place of self-attention.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import Cache

from .configuration import MetaTokenConfig
from .masks import TokenLayout, combine_masks, is_kept, is_traced, take_pairs, to_additive
from .meta_attention import MetaAttention, find_members, refuse_paged_cache
from .position_bias import add_bias
from .positions import Rotary


class Direction(NamedTuple):
    """Some rows that read some columns."""

    rows: Tensor | None
    """(B, Q) int64: indices in this forward's sequence, unique in each row of the batch; None means all."""
    columns: Tensor | None
    """(B, K) int64, those in the cache first; None means all."""
    mask: Tensor
    """(B, 1 or H, Q, K) in the format of the backend; a row that sees nothing sees everything here."""
    sees: Tensor
    """(B, 1 or H, Q) bool: False at such rows."""


class CrossPack(NamedTuple):
    """Who reads whom; made once per forward pass for all layers. A tuple for the reason that `MetaPack` gives."""

    directions: tuple[Direction, ...]
    """No row sees something in two of them."""
    sees: Tensor
    """(B, T) bool: the rows that see something."""
    rotary: Rotary | None
    columns: Tensor
    """(B, T) int64: column of each token in the cache."""
    is_meta: Tensor
    """(B, T) bool."""

    def without_positions(self) -> Self:
        """Return the same for a block without positions."""
        return self._replace(rotary=None)

    def add_both(self, hidden_BTC: Tensor, update_BTC: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum of the first two, plus `attend` of it."""
        total = hidden_BTC + update_BTC
        return total + attend(total).to(total.dtype)


class CrossAttention(MetaAttention):
    """Both directions, with one set of projections."""

    def forward(  # type: ignore[override] # another pack
        self, hidden: Tensor, pack: CrossPack, past_key_values: Cache | None = None
    ) -> tuple[Tensor, None]:
        """Return the update (B, T, C) of all rows, zero where a row sees nothing, and no weights."""
        query, key, value = self.project(hidden, pack.rotary)
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            key, value = layer.update_meta(key, value, pack.columns, pack.is_meta)
            if layer.is_compileable:
                # every token took a slot, so slots are columns, and the spare slot is unused
                key, value = key[:, :, : layer.meta_capacity], value[:, :, : layer.meta_capacity]
        num_rows, num_tokens = pack.columns.shape
        read = value.new_zeros((num_rows, num_tokens, value.shape[1] * value.shape[3]))
        for rows, columns, mask, sees in pack.directions:
            output, _ = self.weigh_values(_take(query, rows), _take(key, columns), _take(value, columns), mask)
            output = torch.where(sees.transpose(1, 2)[..., None], output, 0).flatten(2)
            if rows is None:
                read = read + output
                continue
            # unique indices: exact and deterministic
            places = rows + torch.arange(num_rows, device=rows.device)[:, None] * num_tokens
            read = read.flatten(0, 1).index_add(0, places.flatten(), output.flatten(0, 1)).view_as(read)
        return torch.where(pack.sees[..., None], self.o_proj(read), 0), None


def _take(states_BHTD: Tensor, index: Tensor | None) -> Tensor:
    """Return the tokens at (B, K), all if None."""
    return states_BHTD if index is None else torch.take_along_dim(states_BHTD, index[:, None, :, None], dim=2)


def pack_across(
    config: MetaTokenConfig,
    hidden: Tensor,
    *,
    meta_token_mask: Tensor,
    meta_indices: Tensor | None,
    rotary: Rotary | None,
    layout: TokenLayout,
    past_key_values: Cache | None,
    always: bool,
) -> CrossPack | None:
    """Find who reads whom; the arguments are those of `pack_meta_tokens`.

    Where shapes must not depend on values, with a static cache or in a graph, one attention of all rows over all
    columns does the work of both directions.

    Returns:
        None when no row has a meta-token and no cache must learn of the text.

    Raises:
        ValueError: for an attention backend that takes no mask of queries by keys.
    """
    refuse_paged_cache(config)
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f'meta_attention_over "{config.meta_attention_over}" needs attn_implementation "eager" or "sdpa", not '
            f'"{config._attn_implementation}"'
        )
    is_meta = meta_token_mask.expand(hidden.shape[:2])
    view = _View.of(config, hidden, is_meta, layout, past_key_values)
    goes_back = config.meta_attention_over == "cross"
    directions: list[Direction] = []
    if view.is_static or (is_traced() and meta_indices is None):
        differ = is_meta[..., None] != view.is_meta[:, None]
        directions.append(view.direct(None, None, differ if goes_back else differ & is_meta[..., None]))
    else:
        new = old = find_members(is_meta, meta_indices, keep_shape=False, always=always)
        if past_key_values is not None:
            old = find_members(view.is_meta, None, keep_shape=False, always=always)
        elif new is None:
            return None
        if new is not None:
            rows, valid = new
            is_row = is_meta.gather(1, rows) if valid is None else valid
            directions.append(view.direct(rows, None, is_row[..., None] & ~view.is_meta[:, None]))
        if old is not None and goes_back:
            columns, valid = old
            is_column = view.is_meta.gather(1, columns) if valid is None else valid
            directions.append(view.direct(None, columns, ~is_meta[..., None] & is_column[:, None]))
    sees = torch.zeros_like(is_meta)
    for direction in directions:
        some = direction.sees.any(1)
        sees = sees | (some if direction.rows is None else torch.zeros_like(sees).scatter(1, direction.rows, some))
    return CrossPack(tuple(directions), sees, rotary, view.columns, is_meta)


class _View(NamedTuple):
    """The T tokens of a forward pass and all K columns, those in the cache first."""

    config: MetaTokenConfig
    layout: TokenLayout
    dtype: torch.dtype
    columns: Tensor
    """(B, T) int64: of the tokens."""
    is_meta: Tensor
    """(B, K) bool."""
    key_positions: Tensor | None
    """(B, K) int64, for a bias."""
    is_static: bool

    @classmethod
    def of(
        cls,
        config: MetaTokenConfig,
        hidden: Tensor,
        is_meta: Tensor,
        layout: TokenLayout,
        past_key_values: Cache | None,
    ) -> Self:
        """Gather what masks are made from; is_meta is (B, T)."""
        num_rows, num_tokens = is_meta.shape
        columns = torch.arange(num_tokens, device=is_meta.device).expand(num_rows, -1)
        seen: int | Tensor = 0
        is_static = False
        if past_key_values is not None:
            seen = past_key_values.get_seq_length()
            columns = columns + seen
            first = next(i for i in range(config.num_hidden_layers) if config.has_meta_attention(i))
            layer: Any = past_key_values.layers[first]
            is_static = layer.is_compileable
            if is_static:
                shape = num_rows, layer.meta_capacity
                marks = is_meta.new_zeros(shape) if layer.meta_keys is None else layer.meta_marks[:, : shape[1]]
                is_meta = marks.scatter(1, columns, is_meta)
            elif layer.meta_marks is not None:
                is_meta = torch.cat([layer.meta_marks, is_meta], dim=-1)
        positions = None
        if layout.bias is not None:
            positions = layout.key_positions(is_meta.shape[1], seen).expand(num_rows, -1)
        return cls(config, layout, hidden.dtype, columns, is_meta, positions, is_static)

    def direct(self, rows: Tensor | None, columns: Tensor | None, kinds: Tensor) -> Direction:
        """Return the direction of these rows and columns; `kinds` (B, Q, K) bool tells which pairs may meet at all."""
        layout, (num_rows, num_columns) = self.layout, self.is_meta.shape
        queries, keys = (
            torch.arange(number, device=kinds.device).expand(num_rows, -1) if index is None else index
            for index, number in ((rows, self.columns.shape[1]), (columns, num_columns))
        )
        mask = kinds & (keys[:, None] < self.columns.gather(1, queries)[..., None])
        if layout.attention_mask is not None and not layout.has_pairs:
            given = layout.attention_mask.bool()
            is_real = torch.nn.functional.pad(given, (0, num_columns - given.shape[1]))
            mask = mask & is_real.gather(1, keys)[:, None]
        if layout.documents is not None:
            documents = layout.documents.expand(num_rows, -1)
            mask = mask & (documents.gather(1, queries)[..., None] == documents.gather(1, keys)[:, None])
        mask = mask[:, None]
        if layout.has_pairs:
            mask = combine_masks(mask, take_pairs(layout.attention_mask, queries, keys))
        sees = is_kept(mask).any(-1)
        mask = mask.masked_fill(~sees[..., None], True if mask.dtype == torch.bool else 0)
        if layout.bias is not None and self.key_positions is not None:
            places = layout.positions.expand(num_rows, -1).gather(1, queries)
            mask = add_bias(mask, places, self.key_positions.gather(1, keys), layout.bias)
        elif self.config._attn_implementation == "eager":
            mask = to_additive(mask, self.dtype)
        return Direction(rows, columns, mask, sees)
