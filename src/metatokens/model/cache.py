"""Cache layers that hold the keys and values of both attentions of a block.

A subclass with a `_layer_type` registers itself with transformers, so `DynamicCache(config=...)`, `StaticCache` and
`generate` build these from `config.layer_types`. The inherited part caches every token; the meta part only meta-tokens.
`get_seq_length` stays the number of tokens, so masks and positions of transformers keep working.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, StaticLayer

# meta columns appended between two searches for gaps; each search waits for the device
COLUMNS_BETWEEN_SEARCHES = 16
# share of its columns for which a cache has room when it is copied, so that a column is copied eight times on average
ROOM = 1 / 8


class _Room:
    """Columns with free ones behind them, into which new ones are written."""

    def __init__(self, old: Tensor | None, new: Tensor) -> None:
        """Copy old columns (B, H, K, D), and make room for these new ones and some more."""
        num_old = 0 if old is None else old.shape[-2]
        num_all = num_old + new.shape[-2]
        self._columns = new.new_empty((*new.shape[:2], num_all + int(ROOM * num_all) + 1, new.shape[-1]))
        self._num_used = num_old
        if old is not None:
            self._columns[..., :num_old, :] = old

    def takes(self, old: Tensor | None, new: Tensor) -> bool:
        """Tell whether the old columns lie here, nothing was appended to them elsewhere, and the new ones fit."""
        return (
            old is not None
            and old.data_ptr() == self._columns.data_ptr()
            and old.shape[-2] == self._num_used
            and old.shape[:2] == self._columns.shape[:2]
            and self._num_used + new.shape[-2] <= self._columns.shape[-2]
            and self._columns.is_inference() == torch.is_inference_mode_enabled()
        )

    def append(self, new: Tensor) -> Tensor:
        """Return all columns."""
        num_all = self._num_used + new.shape[-2]
        self._columns[..., self._num_used : num_all, :] = new
        self._num_used = num_all
        return self._columns[..., :num_all, :]


class RoomyLayer(DynamicLayer):
    """Appends in place, where its base class copies the whole cache in every step. It has the same columns."""

    keys: Tensor | None
    values: Tensor | None
    _rooms: tuple[_Room, _Room] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, D) and return all of them."""
        needs_gradient = key_states.requires_grad or value_states.requires_grad
        if torch.compiler.is_compiling() or needs_gradient or (self.keys is not None and self.keys.requires_grad):
            self._rooms = None
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pairs = [
            (old if old is not None and old.numel() else None, new)
            for old, new in ((self.keys, key_states), (self.values, value_states))
        ]
        if self._rooms is None or not all(room.takes(*pair) for room, pair in zip(self._rooms, pairs, strict=True)):
            self._rooms = _Room(*pairs[0]), _Room(*pairs[1])
        self.keys, self.values = (room.append(new) for room, (_, new) in zip(self._rooms, pairs, strict=True))
        return self.keys, self.values


def with_room(cache: DynamicCache) -> DynamicCache:
    """Let the plain layers of a cache that is still empty append in place; returns the cache."""
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class MetaDynamicLayer(RoomyLayer):
    """Grows with the sequence. A meta column is shared by the rows of the batch.

    `meta_columns` (B, M) holds the token column of each cached meta-token, or -1 where a row has none; it gives the
    validity mask, the positions and an exact `crop`. Rows that get their meta-tokens at different steps leave gaps in
    one another's columns. The gaps are closed from time to time, so the cache holds hardly more columns than the row
    with the most meta-tokens needs.

    Where every token is held, `meta_marks` (B, M) bool may tell which of them are meta-tokens.
    """

    _layer_type = "meta_attention"

    def __init__(self, **kwargs: Any) -> None:
        """Start empty."""
        super().__init__(**kwargs)
        self.meta_keys: Tensor | None = None
        self.meta_values: Tensor | None = None
        self.meta_columns: Tensor | None = None
        self.meta_marks: Tensor | None = None

    @property
    def num_meta(self) -> int:
        """Number of meta columns."""
        return 0 if self.meta_columns is None else self.meta_columns.shape[-1]

    def update_meta(
        self, keys_BHMD: Tensor, values_BHMD: Tensor, columns_BM: Tensor, marks_BM: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append meta-tokens and return all cached meta keys and values, (B, H, M, D)."""
        num_old = self.num_meta
        if marks_BM is not None:
            self.meta_marks = marks_BM if self.meta_marks is None else torch.cat([self.meta_marks, marks_BM], dim=-1)
        if self.meta_keys is not None and self.meta_values is not None and self.meta_columns is not None:
            keys_BHMD = torch.cat([self.meta_keys, keys_BHMD], dim=-2)
            values_BHMD = torch.cat([self.meta_values, values_BHMD], dim=-2)
            columns_BM = torch.cat([self.meta_columns, columns_BM], dim=-1)
        self.meta_keys, self.meta_values, self.meta_columns = keys_BHMD, values_BHMD, columns_BM
        is_due = num_old // COLUMNS_BETWEEN_SEARCHES < self.num_meta // COLUMNS_BETWEEN_SEARCHES
        if is_due and not torch.compiler.is_compiling():
            self._close_gaps()
        # the mask of this step was made for the columns before any gap was closed
        return keys_BHMD, values_BHMD

    def _close_gaps(self) -> None:
        """Move the meta-tokens of each row to the last columns, in their order, and drop those that no row needs."""
        assert self.meta_columns is not None
        assert self.meta_keys is not None
        assert self.meta_values is not None
        is_meta = self.meta_columns >= 0
        num_needed = int(is_meta.sum(-1).max())
        if num_needed == self.num_meta:
            return
        order = is_meta.to(torch.int8).argsort(dim=-1, stable=True)[:, self.num_meta - num_needed :]
        self.meta_columns = self.meta_columns.gather(1, order)
        index = order[:, None, :, None]
        self.meta_keys = torch.take_along_dim(self.meta_keys, index, dim=2)
        self.meta_values = torch.take_along_dim(self.meta_values, index, dim=2)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.meta_keys = self.meta_values = self.meta_columns = self.meta_marks = None

    def offload(self) -> None:
        """Move to host memory."""
        super().offload()
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device."""
        super().prefetch()
        self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._map(lambda tensor: tensor[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens and the meta-tokens among them."""
        super().crop(tokens_to_remove)
        self._crop_meta()

    def _crop_meta(self) -> None:
        if self.meta_columns is None:
            return
        columns = self.meta_columns.masked_fill(self.meta_columns >= self.get_seq_length(), -1)
        used = (columns >= 0).any(0).nonzero()
        num_kept = int(used.max()) + 1 if len(used) else 0
        self.meta_columns = columns[:, :num_kept]
        assert self.meta_keys is not None
        assert self.meta_values is not None
        self.meta_keys, self.meta_values = self.meta_keys[..., :num_kept, :], self.meta_values[..., :num_kept, :]
        if self.meta_marks is not None:
            self.meta_marks = self.meta_marks[:, :num_kept]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.meta_keys is not None and self.meta_values is not None and self.meta_columns is not None:
            self.meta_keys, self.meta_values = fn(self.meta_keys), fn(self.meta_values)
            self.meta_columns = fn(self.meta_columns)
        if self.meta_marks is not None:
            self.meta_marks = fn(self.meta_marks)


class MetaStaticLayer(StaticLayer):
    """Fixed addresses, for torch.compile: each row has a write pointer and a spare slot for tokens that are not meta.

    The meta part has room for the worst case, a sequence of nothing but meta-tokens.
    """

    _layer_type = "meta_attention"
    _META_PARTS = ("meta_keys", "meta_values", "meta_columns", "meta_marks", "meta_count")

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        """Note the capacity; tensors are allocated with the first keys."""
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.meta_capacity = max_cache_len
        self.meta_keys: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the text part and the meta part."""
        super().lazy_initialization(key_states, value_states)
        slots = self.meta_capacity + 1
        shape = (self.batch_size, self.num_heads, slots)
        self.meta_keys = torch.zeros((*shape, self.k_head_dim), dtype=key_states.dtype, device=self.device)
        self.meta_values = torch.zeros((*shape, self.v_head_dim), dtype=value_states.dtype, device=self.device)
        self.meta_columns = torch.zeros((self.batch_size, slots), dtype=torch.long, device=self.device)
        self.meta_marks = torch.zeros_like(self.meta_columns, dtype=torch.bool)
        self.meta_count = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        if not torch.compiler.is_compiling():
            for tensor in (getattr(self, name) for name in self._META_PARTS):
                torch._dynamo.mark_static_address(tensor)

    def meta_slots(self, columns_BM: Tensor) -> Tensor:
        """Return the slots (B, M) that new meta-tokens will take; the spare slot where the column is -1."""
        count_B = torch.zeros_like(columns_BM[:, 0]) if self.meta_keys is None else self.meta_count
        slots = count_B[:, None] + torch.arange(columns_BM.shape[1], device=columns_BM.device)
        return torch.where(columns_BM >= 0, slots, self.meta_capacity)

    def update_meta(
        self, keys_BHMD: Tensor, values_BHMD: Tensor, columns_BM: Tensor, marks_BM: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write meta-tokens to their slots and return all slots, (B, H, capacity + 1, D)."""
        assert self.meta_keys is not None
        slots_BM = self.meta_slots(columns_BM)
        index = slots_BM[:, None, :, None]
        self.meta_keys.scatter_(2, index.expand_as(keys_BHMD), keys_BHMD)
        self.meta_values.scatter_(2, index.expand_as(values_BHMD), values_BHMD)
        self.meta_columns.scatter_(1, slots_BM, columns_BM)
        if marks_BM is not None:
            self.meta_marks.scatter_(1, slots_BM, marks_BM)
        self.meta_count.add_((columns_BM >= 0).sum(-1))
        return self.meta_keys, self.meta_values

    def reset(self) -> None:
        """Zero everything and keep the addresses."""
        super().reset()
        if self.meta_keys is not None:
            for name in self._META_PARTS:
                getattr(self, name).zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens and the meta-tokens among them; static layers need transformers 5.24 for it."""
        super().crop(tokens_to_remove)
        if self.meta_keys is not None:
            is_used = torch.arange(self.meta_capacity + 1, device=self.device) < self.meta_count[:, None]
            is_kept = is_used & (self.meta_columns < self.get_seq_length())
            self.meta_count.copy_(is_kept.sum(-1))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        if self.meta_keys is not None:
            for name in self._META_PARTS:
                tensor = getattr(self, name)
                setattr(self, name, tensor.index_select(0, beam_idx.to(tensor.device)))
