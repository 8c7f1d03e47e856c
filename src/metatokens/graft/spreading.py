"""Where the anchors stand between the tokens of a text, and who sees whom.

An anchor follows every n-th token of text, at the position of that token, so positions of the text never shift. It is
read in the same pass as the token before it. Rows count their text without padding, so an anchor may be due in some
rows of a batch only; the others get a column of padding at the left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metatokens.config.graft import GraftConfig
from metatokens.model.memory import Columns, Counts, MemoryPolicy, describe_tokens, see


def policy_of(config: GraftConfig) -> MemoryPolicy:
    """Return the policy of memory mode by which the cache of a graft drops columns."""
    return MemoryPolicy(
        window=config.window,
        num_sinks=config.num_sinks,
        anchors=config.anchors,
        every=config.every,
        reveal=config.reveal,
        memory_limit=config.memory_limit,
        positions=config.positions,
    )


@dataclass(frozen=True)
class Spread:
    """T columns of input spread over W columns with anchors between them."""

    source: Tensor
    """(B, W) int64: the column of the input that each is a copy of."""
    is_anchor: Tensor
    """(B, W) bool."""
    text_columns: Tensor
    """(B, T) int64: where each column of the input has gone."""
    tokens: Columns
    """What is known of the W columns."""

    def apply(self, inputs: Tensor) -> Tensor:
        """Return the W columns of T: (B, T, ...) to (B, W, ...)."""
        return _take(inputs, self.source)

    def undo(self, outputs: Tensor) -> Tensor:
        """Return what belongs to the input: (B, W, ...) to (B, T, ...)."""
        return _take(outputs, self.text_columns)


def spread(
    config: GraftConfig, is_real: Tensor, *, position_ids: Tensor | None = None, before: Counts | None = None
) -> Spread:
    """Put the anchors between T new columns of input.

    Args:
        config: of the graft.
        is_real: (B, T) bool, False at padding.
        position_ids: (B or 1, T) int64; None counts the text of each row.
        before: what was read before.
    """
    num_columns = is_real.shape[1]
    if config.anchors == "every":
        columns = torch.arange(num_columns, device=is_real.device).expand(is_real.shape)
        is_meta = torch.zeros_like(is_real)
        tokens = describe_tokens(policy_of(config), is_meta, is_real, position_ids=position_ids, before=before)
        return Spread(columns, tokens.is_anchor, columns, tokens)
    read = 0 if before is None else before.num_text[:, None]
    place = is_real.long().cumsum(-1) + read - 1
    is_due = is_real & ((place + 1) % config.every == 0) & (place >= config.num_sinks)
    ends = (1 + is_due.long()).cumsum(-1)
    width = max(int(ends[:, -1].max()), num_columns)
    # rows with fewer anchors begin with padding
    gap = width - ends[:, -1:]
    text_columns = gap + ends - 1 - is_due.long()
    columns = torch.arange(width, device=is_real.device).expand(len(is_real), width)
    # the input column of the last text column at or before this one
    source = torch.searchsorted(text_columns, columns.contiguous(), right=True) - 1
    is_filling = source < 0
    source = source.clamp(min=0)
    is_anchor = ~is_filling & (text_columns.gather(1, source) != columns)
    positions = place.clamp(min=0) if position_ids is None else position_ids.expand(is_real.shape)
    tokens = describe_tokens(
        policy_of(config),
        is_anchor,
        is_real.gather(1, source) & ~is_filling,
        position_ids=positions.gather(1, source),
        before=before,
    )
    return Spread(source, is_anchor, text_columns, tokens)


def places_of(config: GraftConfig, tokens: Columns) -> Tensor:
    """Return (B, W) int64: the place of each column among the text and the anchors of its row, -1 at padding."""
    places = tokens.clock
    if config.anchors == "meta":
        places = places + tokens.rank + tokens.is_anchor.long()
    return places.masked_fill(~tokens.is_real, -1)


def visible(config: GraftConfig, queries: Columns, keys: Columns) -> Tensor:
    """Tell which queries (B, Q) see which keys (B, K): (B, Q, K) bool.

    With reveal "evicted" an anchor sees what the token before it sees, with itself in that token's place. An untrained
    graft, whose anchors are copies, is thereby exactly the model that keeps every n-th token.
    """
    pairs = see(policy_of(config), queries, keys)
    if config.reveal == "always" or config.anchors == "every":
        return pairs
    clock, key_clock = queries.clock[:, :, None], keys.clock[:, None]
    is_doubled = (keys.is_anchor[:, None] & (key_clock > clock - config.window)) | (
        keys.is_text[:, None] & (key_clock == clock)
    )
    is_itself = keys.order[:, None] == queries.order[:, :, None]
    return pairs & ~(queries.is_anchor[:, :, None] & is_doubled & ~is_itself)


def _take(states: Tensor, columns: Tensor) -> Tensor:
    index = columns.reshape(*columns.shape, *[1] * (states.ndim - 2))
    return torch.take_along_dim(states.expand(len(columns), *states.shape[1:]), index, dim=1)
