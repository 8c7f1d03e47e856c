"""Memory mode: a token sees a window of text, the first tokens (sinks), and the anchors that were kept of the rest.

What leaves the window leaves the cache (`memory_cache.py`); an anchor stays. Anchors are the meta-tokens, or as
controls every n-th token of text, or means of text in the meta-tokens' place. `memory_reference.py` is the definition;
the forms here visit only the columns that a query may see, and tests hold them equal:

- `MemoryMask.dense`: the pairs as one mask, for short passes and for backends that return attention weights;
- `MemoryMask.attend`: chunks of queries over [sinks and anchors | band of text], forward and backward;
- `MemoryMask.flex`: the same permutation of the keys as a block mask, for flex attention on a GPU.

Everything is told by counting the tokens of a row without its padding, so neither padding nor evicted columns matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .position_bias import PositionBias, add_bias

CHUNK = 128  # queries that attend together: their window is one band of keys


@dataclass(frozen=True, kw_only=True)
class MemoryPolicy:
    """What is kept, and when text sees it; the fields of `memory` in a model's config."""

    window: int
    """Tokens of text that a query sees, itself among them."""
    num_sinks: int = 4
    """First tokens of the text, which stay visible for ever."""
    anchors: Literal["meta", "every", "pooled"] = "every"
    """What is kept of evicted text: its meta-tokens, every n-th token of text, or the meta-tokens with the mean keys
    and values of their text (`memory_pooled.py`)."""
    every: int = 9
    """n, for the anchors "every"."""
    reveal: Literal["evicted", "always"] = "evicted"
    """Whether text sees a meta-token only once the text before it has left the window; meta-tokens always see it."""
    memory_limit: int | None = None
    """Newest anchors that are remembered; None means all."""
    positions: Literal["all", "text", "compact"] = "all"
    """What positions count: all tokens; text alone, so that a meta-token has the position of the token before it; or
    "compact", in which kept tokens are counted among themselves (`memory_compact.py`)."""
    layers: Literal["all", "odd"] | Sequence[int] = "all"
    """Blocks in memory mode; the others see everything."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: for one that is out of range.
        """
        lowest = {"window": 1, "num_sinks": 0, "every": 1, "memory_limit": 1}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= least):
                raise ValueError(f"memory.{name} must be a whole number of at least {least}, not {value!r}")
        choices = {
            "anchors": ("meta", "every", "pooled"),
            "reveal": ("evicted", "always"),
            "positions": ("all", "text", "compact"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"memory.{name} must be one of {allowed}, not {getattr(self, name)!r}")

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """Return the policy of a config's `memory`.

        Raises:
            ValueError: for an unknown, missing or wrong field.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"memory has no {', '.join(unknown)}; it has {', '.join(known)}")
        if "window" not in values:
            raise ValueError("memory needs a window, in tokens of text")
        return cls(**values)

    def applies_to(self, layer_index: int) -> bool:
        """Tell whether block `layer_index` is in memory mode."""
        if isinstance(self.layers, str):
            return self.layers == "all" or layer_index % 2 == 1
        return layer_index in self.layers


@dataclass(frozen=True)
class Columns:
    """What is known of tokens, (B, K) each: columns of keys or queries, in the order in which they were read."""

    order: Tensor
    """int64: place among all tokens read, padding included; -1 where a row has no token in this column."""
    clock: Tensor
    """int64: tokens of text up to this one, minus one; an anchor between two of them has the clock of the first."""
    rank: Tensor
    """int64: anchors before this token."""
    is_real: Tensor
    """bool: not padding."""
    is_sink: Tensor
    """bool: one of the first tokens of the text."""
    is_anchor: Tensor
    """bool."""
    is_text: Tensor
    """bool: seen within the window. All real tokens but the meta-tokens, if these are the anchors."""
    positions: Tensor
    """int64: position ids."""

    @property
    def shape(self) -> tuple[int, int]:
        """B and K."""
        return self.order.shape[0], self.order.shape[1]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Columns:
        """Return the result of a function of each tensor."""
        return Columns(**{field.name: fn(getattr(self, field.name)) for field in fields(self)})

    def part(self, start: int, stop: int) -> Columns:
        """Return the columns [start, stop)."""
        return self.map(lambda tensor: tensor[:, start:stop])

    def take(self, index: Tensor) -> Columns:
        """Return the columns at `index` (B, K'); where it is negative there is no token."""
        taken = self.map(lambda tensor: tensor.gather(1, index.clamp(min=0)))
        gone = index < 0
        nothing = {"order": -1, "clock": -1}
        return Columns(
            **{
                field.name: getattr(taken, field.name).masked_fill(gone, nothing.get(field.name, 0))
                for field in fields(self)
            }
        )

    def join(self, later: Columns) -> Columns:
        """Return these columns and later ones behind them."""
        return Columns(
            **{
                field.name: torch.cat([getattr(self, field.name), getattr(later, field.name)], dim=1)
                for field in fields(self)
            }
        )

    def put(self, slots: Tensor, new: Columns) -> Columns:
        """Return these columns with new ones (B, G) in place of those at `slots` (B, G)."""
        return Columns(
            **{
                field.name: getattr(self, field.name).scatter(1, slots, getattr(new, field.name))
                for field in fields(self)
            }
        )

    @property
    def is_kept(self) -> Tensor:
        """Which columns stay when text is evicted, before any limit."""
        return self.is_sink | self.is_anchor


class Counts(NamedTuple):
    """What was read so far, (B,) int64 each but the first."""

    num_read: int
    """Tokens, padding included."""
    num_text: Tensor
    num_anchors: Tensor


def describe_tokens(
    policy: MemoryPolicy,
    is_meta: Tensor,
    is_real: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    before: Counts | None = None,
) -> Columns:
    """Return what is known of T new tokens.

    Args:
        policy: decides which are anchors and sinks.
        is_meta: (B, T) bool.
        is_real: (B, T) bool, False at padding; None means that all are real.
        position_ids: (B or 1, T) int64; by default as the policy counts them.
        before: what was read before them.
    """
    is_real = torch.ones_like(is_meta) if is_real is None else is_real.expand_as(is_meta)
    if before is None:
        zeros = is_meta.new_zeros(len(is_meta), dtype=torch.long)
        before = Counts(0, zeros, zeros)
    is_text = is_real & ~is_meta if policy.anchors != "every" else is_real
    clock = before.num_text[:, None] + is_text.long().cumsum(-1) - 1
    is_sink = is_text & (clock < policy.num_sinks)
    is_anchor = (
        is_real & is_meta if policy.anchors != "every" else is_text & ~is_sink & ((clock + 1) % policy.every == 0)
    )
    rank = before.num_anchors[:, None] + is_anchor.long().cumsum(-1) - is_anchor.long()
    order = (torch.arange(is_meta.shape[1], device=is_meta.device) + before.num_read).expand(is_meta.shape)
    if position_ids is None:
        position_ids = clock.clamp(min=0) if policy.positions == "text" else order
    return Columns(order, clock, rank, is_real, is_sink, is_anchor, is_text, position_ids.expand(is_meta.shape))


def count_tokens(columns: Columns, before: Counts | None = None) -> Counts:
    """Return the counts after these new columns were read."""
    text, anchors = columns.is_text.sum(-1), columns.is_anchor.sum(-1)
    if before is None:
        return Counts(columns.shape[1], text, anchors)
    return Counts(before.num_read + columns.shape[1], before.num_text + text, before.num_anchors + anchors)


def sees(policy: MemoryPolicy, query: Columns, key: Columns) -> Tensor:
    """Tell of pairs of tokens, whose tensors are of any shape and broadcast together, whether the query sees the key.

    Every query sees itself, padding too, so that no row of a mask is empty.
    """
    in_window = key.clock > query.clock - policy.window
    is_seen = (key.is_text & in_window) | key.is_sink
    is_remembered = key.is_anchor
    if policy.memory_limit is not None:
        newest = query.rank + query.is_anchor.long()
        is_remembered = is_remembered & (key.rank >= newest - policy.memory_limit)
    if policy.reveal == "evicted" and policy.anchors != "every":
        is_remembered = is_remembered & (~in_window | query.is_anchor)
    is_past = key.is_real & (key.order <= query.order)
    return ((is_seen | is_remembered) & is_past) | (key.order == query.order)


def see(policy: MemoryPolicy, queries: Columns, keys: Columns) -> Tensor:
    """Tell which queries (B, Q) see which keys (B, K): (B, Q, K) bool."""
    return sees(policy, queries.map(lambda tensor: tensor[:, :, None]), keys.map(lambda tensor: tensor[:, None]))


def count_pairs(policy: MemoryPolicy, num_positions: int, num_meta: int) -> int:
    """Count the pairs that attention visits over T positions, with M evenly spaced meta-tokens."""
    is_meta = torch.zeros(1, num_positions, dtype=torch.bool)
    is_meta[0, torch.arange(1, num_meta + 1) * num_positions // max(num_meta, 1) - 1] = True
    columns = describe_tokens(policy, is_meta)
    total = 0
    for start in range(0, num_positions, CHUNK):
        queries = columns.part(start, start + CHUNK)
        total += int(see(policy, queries, columns).sum())
    return total


def count_columns(policy: MemoryPolicy, num_positions: int, num_meta: int) -> tuple[int, int]:
    """Return the columns that a cache keeps of T positions, M of them meta-tokens: sinks and window; anchors beyond."""
    num_text = num_positions - num_meta if policy.anchors != "every" else num_positions
    limit = num_text + num_meta if policy.memory_limit is None else policy.memory_limit
    of_text = min(num_text, policy.num_sinks + policy.window)
    if policy.anchors != "every":
        return of_text, min(num_meta, limit)
    evicted_until = max(num_text - policy.window, policy.num_sinks)
    num_sinks = policy.num_sinks // policy.every
    in_window = num_text // policy.every - min(evicted_until, num_text) // policy.every
    beyond = max(evicted_until // policy.every - num_sinks, 0)
    return of_text, max(0, min(in_window + beyond, limit) - in_window) if num_text > of_text else 0


def stay(policy: MemoryPolicy, columns: Columns, counts: Counts) -> Tensor:
    """Tell which columns (B, K) a token that is read after `counts` may still see."""
    is_recent = columns.is_text & (columns.clock >= counts.num_text[:, None] - policy.window)
    is_remembered = columns.is_anchor
    if policy.memory_limit is not None:
        is_remembered = is_remembered & (columns.rank >= counts.num_anchors[:, None] - policy.memory_limit)
    return columns.is_real & (is_recent | columns.is_sink | is_remembered)


class _Chunk(NamedTuple):
    """Queries that attend together, and the permuted keys that at least one of them sees."""

    start: int
    stop: int
    num_kept: int
    """Keys [0, num_kept) are visited: sinks and anchors."""
    band_start: int
    band_stop: int
    """And keys [band_start, band_stop): the text of the window."""
    mask: Any = None
    """(B, 1, queries, keys) bool, or (B, H, queries, keys) additive with a bias."""

    def visit(self, states: Tensor) -> Tensor:
        """Return the visited columns of permuted keys or values (B, H, K, D)."""
        if self.num_kept == self.band_start:
            return states[:, :, : self.band_stop]
        return torch.cat([states[:, :, : self.num_kept], states[:, :, self.band_start : self.band_stop]], dim=2)

    def visit_columns(self, keys: Columns) -> Columns:
        """Return what is known of the visited columns of permuted keys."""
        return keys.part(0, self.num_kept).join(keys.part(self.band_start, self.band_stop))


class _Visits(torch.autograd.Function):
    """What each chunk visits, whose gradient is summed in place: a slice's own would be one of all keys each time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, chunks: Sequence[_Chunk]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.chunks = states.shape, chunks
        return tuple(chunk.visit(states) for chunk in chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for chunk, gradient in zip(ctx.chunks, gradients, strict=True):
            total[:, :, : chunk.num_kept] += gradient[:, :, : chunk.num_kept]
            total[:, :, chunk.band_start : chunk.band_stop] += gradient[:, :, chunk.num_kept :]
        return total, None


@dataclass(frozen=True)
class MemoryMask:
    """Who sees whom in one forward pass; made once for all layers in memory mode."""

    policy: MemoryPolicy
    queries: Columns
    keys: Columns
    """Of the cache and of this pass, whose tokens are the last columns."""
    bias: PositionBias | None = None
    """What positions add to the scores."""
    chunk: int = CHUNK
    """Queries that attend together."""

    def sees_all_before(self) -> bool:
        """Tell of the first tokens of a text whether each sees all before it, as in plain causal attention."""
        counts, policy = count_tokens(self.keys), self.policy
        most_text, most_anchors = torch.stack([counts.num_text.max(), counts.num_anchors.max()]).tolist()
        if policy.memory_limit is not None and most_anchors > policy.memory_limit and policy.anchors != "every":
            return False
        is_hiding = policy.anchors != "every" and policy.reveal == "evicted" and most_anchors > 0
        return bool(most_text <= policy.window and not is_hiding)

    def dense(self) -> Tensor:
        """Return (B, 1, Q, K) bool, True = sees; with a bias (B, H, Q, K), additive."""
        return self._mask(self.queries, self.keys)

    def _mask(self, queries: Columns, keys: Columns) -> Tensor:
        mask = see(self.policy, queries, keys)[:, None]
        if self.bias is None:
            return mask
        return add_bias(mask, queries.positions, keys.positions, self.bias)

    @cached_property
    def permutation(self) -> Tensor:
        """(B, K) int64: sinks and anchors first, then the rest, both in the order in which they were read."""
        return (~self.keys.is_kept).to(torch.int8).argsort(dim=-1, stable=True)

    @cached_property
    def permuted_keys(self) -> Columns:
        """The keys' columns in that order."""
        return self.keys.take(self.permutation)

    @cached_property
    def chunks(self) -> list[_Chunk]:
        """The plan: what each chunk of queries visits."""
        num_queries, num_keys = self.queries.shape[1], self.keys.shape[1]
        starts = torch.arange(0, num_queries, self.chunk, device=self.keys.order.device)
        stops = (starts + self.chunk).clamp(max=num_queries)
        first = num_keys - num_queries
        kept_until = self.keys.is_kept.long().cumsum(-1)
        rest_until = (~self.keys.is_kept).long().cumsum(-1)
        num_kept = kept_until[:, -1:]
        last = first + stops - 1
        # the clock never falls along a row, so a window starts at one column
        oldest = self.queries.clock[:, starts] - self.policy.window + 1
        opens = torch.searchsorted(self.keys.clock.contiguous(), oldest)
        before = torch.where(opens > 0, rest_until.gather(1, (opens - 1).clamp(min=0)), 0)
        bounds = torch.stack(
            [
                starts,
                stops,
                kept_until[:, last].amax(0),
                (num_kept + before).amin(0),
                (num_kept + rest_until[:, last]).amax(0),
            ]
        )
        plan = []
        for start, stop, kept, band_start, band_stop in bounds.T.tolist():
            band_start = max(band_start, kept)  # noqa: PLW2901 - rows with fewer anchors have text among the kept
            band_stop = max(band_stop, band_start)  # noqa: PLW2901
            chunk = _Chunk(start, stop, kept, band_start, band_stop)
            mask = self._mask(self.queries.part(start, stop), chunk.visit_columns(self.permuted_keys))
            plan.append(chunk._replace(mask=mask))
        return plan

    def visits(self, states: Tensor) -> Iterable[Tensor]:
        """Return the columns of permuted keys or values (B, H, K, D) that each chunk visits."""
        if torch.is_grad_enabled() and states.requires_grad:
            visited: tuple[Tensor, ...] = _Visits.apply(states, self.chunks)  # type: ignore[no-untyped-call]
            return visited
        return (chunk.visit(states) for chunk in self.chunks)  # one at a time, for the peak of prefill

    def split(self, query: Tensor) -> tuple[Tensor, ...]:
        """Return the queries (B, H, Q, D) of each chunk."""
        return torch.split(query, [chunk.stop - chunk.start for chunk in self.chunks], dim=2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float = 0.0) -> Tensor:
        """Attend chunk by chunk: queries (B, H, Q, D) over keys and values (B, H, K, D); returns (B, Q, H, D).

        With gradients on a CPU the products are explicit, since the backward pass of sdpa's kernel is slower there.
        """
        key, value = (take_columns(tensor, self.permutation) for tensor in (key, value))
        explicit = torch.is_grad_enabled() and query.device.type == "cpu"
        outputs = []
        visited = zip(self.chunks, self.split(query), self.visits(key), self.visits(value), strict=True)
        for chunk, queries, keys, values in visited:
            if explicit:
                own = _attend_explicitly(queries, keys, values, chunk.mask, scaling=scaling, dropout=dropout)
            else:
                own = nn.functional.scaled_dot_product_attention(
                    queries, keys, values, attn_mask=chunk.mask, scale=scaling, dropout_p=dropout
                )
            outputs.append(own)
        return torch.cat(outputs, dim=2).transpose(1, 2)

    @cached_property
    def flex(self) -> Any:
        """The block mask over the permuted keys: the anchors are a dense staircase, the rest is a band."""
        from torch.nn.attention.flex_attention import create_block_mask

        if self.bias is not None:
            raise ValueError('a position_encoding that adds to the scores needs attn_implementation "eager" or "sdpa"')
        queries, keys, policy = self.queries, self.permuted_keys, self.policy

        def of_pair(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del head
            one, other = queries.map(lambda tensor: tensor[batch, query]), keys.map(lambda tensor: tensor[batch, key])
            return sees(policy, one, other)

        batch, num_queries = queries.shape
        return create_block_mask(of_pair, batch, None, num_queries, keys.shape[1], device=queries.order.device)


def take_columns(states: Tensor, index: Tensor) -> Tensor:
    """Return the columns at `index` (B, K') of keys or values (B, H, K, D); a negative index takes any column."""
    return torch.take_along_dim(states, index.clamp(min=0)[:, None, :, None], dim=2)


def _attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, dropout: float
) -> Tensor:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    return attend_to_scores(scores, mask, value, dropout=dropout)


def attend_to_scores(scores: Tensor, mask: Tensor, value: Tensor, *, dropout: float) -> Tensor:
    """Return the mean of values (B, H, K, D) by scores (B, H, Q, K) under a mask, bool or additive: (B, H, Q, D)."""
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    # the softmax of a half-precision row loses mass, so it is computed in float32
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=precision).to(value.dtype)
    if dropout:
        weights = nn.functional.dropout(weights, p=dropout)
    return torch.matmul(weights, value)
