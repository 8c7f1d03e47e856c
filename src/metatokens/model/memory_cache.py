"""The cache of memory mode: columns of old text are really dropped, sinks, anchors and the window stay.

`MemoryState` knows the columns that are left, once for all layers; the first layer in memory mode carries out what
transformers does to a cache (reorder, select, crop), and the others follow. In a step of decoding new columns take the
places of those that leave, so the window is a ring and nothing is copied. `get_seq_length` stays the number of tokens
read, so masks and positions of transformers keep working.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, StaticLayer, logging

from .cache import MetaDynamicLayer
from .memory import CHUNK, Columns, Counts, MemoryPolicy, count_tokens, see, stay, take_columns

logger = logging.get_logger(__name__)

MEMORY_LAYER = "memory_attention"


class MemoryState:
    """The columns of a cache in memory mode, one for all of its layers."""

    def __init__(self, policy: MemoryPolicy) -> None:
        """Start empty."""
        self.policy = policy
        self.records_past = False
        """Evict only when `crop` tells how many of the newest tokens stay, as assisted generation needs it."""
        self.columns: Columns | None = None
        self.counts: Counts | None = None
        self.index: Tensor | None = None
        """(B, K') int64: where the columns that are left stood before the last change, -1 where a row has none."""
        self.slots: Tensor | None = None
        """(B, G) int64: the old columns whose places the first G of the last new ones took; None: all were appended."""
        self.sorting: Tensor | None = None
        """(B, K) int64: how the old columns were put into the order of reading before new ones were appended."""
        self._is_sorted = True
        self._lost: Counts | None = None
        """Of the newest columns that were evicted: their clock and rank, plus one."""

    @property
    def num_read(self) -> int:
        """Tokens read, padding included."""
        return 0 if self.counts is None else self.counts.num_read

    def read(self, new: Columns) -> Columns:
        """Take new columns; returns all that their queries may attend to. What they leave behind goes with `index`."""
        self._forget_changes()
        self.counts = count_tokens(new, self.counts)
        if self._take_places(new):
            assert self.columns is not None
            return self.columns
        if self.columns is not None and not self._is_sorted:
            self.sorting, self._is_sorted = self.columns.order.argsort(dim=-1, stable=True), True
            self.columns = self.columns.take(self.sorting)
        joined = new if self.columns is None else self.columns.join(new)
        self.columns = joined
        if not self.records_past:
            self._evict()
        return joined

    def _take_places(self, new: Columns) -> bool:
        """Put new columns in the places of those that leave, the rest behind; False if their queries still see these.

        The chunks of a mask need columns in the order of reading, so this is for passes of few tokens.
        """
        if self.columns is None or self.records_past or self.policy.positions == "compact":
            return False
        if new.shape[1] > CHUNK or torch.is_grad_enabled():
            return False
        assert self.counts is not None
        columns = self.columns
        gone = columns.is_real & ~stay(self.policy, columns, self.counts)
        num_gone = gone.sum(-1)
        is_needed = gone & (columns.is_anchor | see(self.policy, new, columns).any(1))
        leaves_at_once = ~stay(self.policy, new, self.counts)
        most, least, is_hindered = torch.stack(
            [num_gone.max(), num_gone.min(), is_needed.any() | leaves_at_once.any()]
        ).tolist()
        if most != least or most > new.shape[1] or is_hindered:
            return False
        self._note_lost(columns, gone)
        if most:
            slots = gone.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
            self.slots, self._is_sorted = slots, False
            columns = columns.put(slots, new.part(0, most))
        else:
            self.slots = gone.new_zeros((len(gone), 0), dtype=torch.long)
        self.columns = columns.join(new.part(most, new.shape[1]))
        return True

    def _forget_changes(self) -> None:
        self.index = self.slots = self.sorting = None

    def crop(self, num_removed: int) -> None:
        """Forget the newest tokens, and evict what the rest leaves behind.

        Raises:
            ValueError: if the remaining tokens would need text that is gone.
        """
        self._forget_changes()
        if self.columns is None or self.counts is None:
            return
        num_removed = min(self.num_read, num_removed)
        remaining = self.num_read - num_removed
        is_removed = self.columns.order >= remaining
        counts = Counts(
            remaining,
            self.counts.num_text - (self.columns.is_text & is_removed).sum(-1),
            self.counts.num_anchors - (self.columns.is_anchor & is_removed).sum(-1),
        )
        self._check(counts, num_removed)
        self.counts = counts
        self._evict(is_removed)

    def _check(self, counts: Counts, num_removed: int) -> None:
        if self._lost is None:
            return
        limit = self.policy.memory_limit
        is_gone = (self._lost.num_text > (counts.num_text - self.policy.window).clamp(min=0)).any()
        if limit is not None:
            is_gone |= (self._lost.num_anchors > (counts.num_anchors - limit).clamp(min=0)).any()
        if is_gone:
            raise ValueError(
                f"the cache cannot go back by {num_removed} tokens: the text before them has left the window of "
                f"{self.policy.window} and was evicted; call cache.activate_past_recording() before reading them"
            )

    def _evict(self, is_removed: Tensor | None = None) -> None:
        assert self.columns is not None
        assert self.counts is not None
        columns = self.columns
        remains = torch.ones_like(columns.is_real) if is_removed is None else ~is_removed
        stays = stay(self.policy, columns, self.counts) & remains
        gone = columns.is_real & remains & ~stays
        if self.policy.memory_limit is not None and bool((gone & columns.is_anchor).any()):
            logger.warning_once(
                f"the memory is full: the oldest anchors are forgotten, and the newest {self.policy.memory_limit} stay "
                "(memory.memory_limit)"
            )
        self._note_lost(columns, gone)
        if bool(stays.all()):
            return
        num_left = int(stays.sum(-1).max())
        # the columns of a row stand at the right, in their order
        order = stays.to(torch.int8).argsort(dim=-1, stable=True)[:, columns.shape[1] - num_left :]
        self.index = torch.where(stays.gather(1, order), order, -1)
        self.columns = columns.take(self.index)

    def _note_lost(self, columns: Columns, gone: Tensor) -> None:
        zeros = torch.zeros_like(columns.clock[:, :1])

        def newest(of: Tensor, which: Tensor) -> Tensor:
            return torch.cat([zeros, torch.where(which, of + 1, 0)], dim=1).amax(-1)

        lost = Counts(0, newest(columns.clock, gone & columns.is_text), newest(columns.rank, gone & columns.is_anchor))
        if self._lost is not None:
            lost = Counts(0, *(torch.maximum(a, b) for a, b in zip(lost[1:], self._lost[1:], strict=True)))
        self._lost = lost

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of rows to everything that is known of them."""
        self._forget_changes()
        if self.columns is None or self.counts is None:
            return
        self.columns = self.columns.map(fn)
        self.counts, self._lost = (
            counts and Counts(counts.num_read, fn(counts.num_text), fn(counts.num_anchors))
            for counts in (self.counts, self._lost)
        )

    def reset(self) -> None:
        """Forget everything."""
        self.columns = self.counts = self._lost = None
        self._forget_changes()
        self._is_sorted = True

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all that is known, by name; nothing must have been read with `records_past`."""
        assert self.columns is not None
        assert self.counts is not None
        assert self._lost is not None
        counts = {"num_text": self.counts.num_text, "num_anchors": self.counts.num_anchors}
        lost = {"lost_text": self._lost.num_text, "lost_anchors": self._lost.num_anchors}
        columns = {field.name: getattr(self.columns, field.name) for field in fields(Columns)}
        return {**columns, "num_read": torch.tensor(self.num_read), **counts, **lost}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `to_tensors` returned."""
        self.columns = Columns(**{field.name: tensors[field.name] for field in fields(Columns)})
        self.counts = Counts(int(tensors["num_read"]), tensors["num_text"], tensors["num_anchors"])
        self._lost = Counts(0, tensors["lost_text"], tensors["lost_anchors"])
        self._is_sorted = False  # which is not known

    @staticmethod
    def names() -> list[str]:
        """Return the names of the tensors that `to_tensors` returns."""
        counted = ("num_read", "num_text", "num_anchors", "lost_text", "lost_anchors")
        return [*(field.name for field in fields(Columns)), *counted]


class MemoryDynamicLayer(MetaDynamicLayer):
    """Keys and values of the columns that are left, and those of meta-attention, which are all kept."""

    _layer_type = MEMORY_LAYER
    keys: Tensor
    values: Tensor
    state: MemoryState | None = None
    """Shared by all layers in memory mode."""
    leads: bool = False
    """Whether this layer, the first one, tells the state of what is done to the cache."""
    _records_past: bool = False
    _own: Tensor | None = None
    """The keys, if this layer made them: others may share the tensors that they put here."""

    def join(self, state: MemoryState, *, leads: bool) -> None:
        """Share a state with the other layers."""
        self.state, self.leads = state, leads
        state.records_past |= self._records_past

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take back any tokens: as long as nothing was dropped. Asked by assisted generation."""
        return self._records_past

    def activate_past_recording(self) -> None:
        """Keep everything until `crop` is called."""
        self._records_past = True
        if self.state is not None:
            self.state.records_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new columns and return all; those that their tokens leave behind are dropped at once."""
        assert self.state is not None
        slots, sorting = self.state.slots, self.state.sorting
        if slots is not None:
            self._write(slots, key_states, value_states)
            rest = slots.shape[1]
            if rest < key_states.shape[2]:
                self._append(key_states[:, :, rest:], value_states[:, :, rest:], *args, **kwargs)
            self._own = self.keys
            return self.keys, self.values
        if sorting is not None:
            self.keys, self.values = take_columns(self.keys, sorting), take_columns(self.values, sorting)
        keys, values = self._append(key_states, value_states, *args, **kwargs)
        self._drop()
        self._own = self.keys
        return keys, values

    def _append(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # without room behind the columns: most of them change places or go
        keys, values = DynamicLayer.update(self, *args, **kwargs)
        return keys, values

    def _write(self, slots: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        """Write the first of new columns to slots (B, G)."""
        # nor may a tensor of inference mode be written to outside of it
        is_frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if self.keys is not self._own or is_frozen:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        index, number = slots[:, None, :, None], slots.shape[1]
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            # autocast may give a step another type than the text before it
            written = new[:, :, :number].to(held.dtype)
            held.scatter_(2, index.expand(-1, *new.shape[1:2], -1, new.shape[3]), written)

    def update_meta(
        self, keys_BHMD: Tensor, values_BHMD: Tensor, columns_BM: Tensor, marks_BM: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append meta-tokens and return all; beyond the memory's limit the oldest ones are dropped."""
        keys, values = super().update_meta(keys_BHMD, values_BHMD, columns_BM, marks_BM)
        self._forget_meta()
        return keys, values

    def _forget_meta(self) -> None:
        assert self.state is not None
        limit = self.state.policy.memory_limit
        if limit is None or self.state.records_past or self.meta_columns is None:
            return
        is_meta = self.meta_columns >= 0
        newer = is_meta.flip(-1).cumsum(-1).flip(-1)
        if bool((newer > limit).any()):
            self.meta_columns = self.meta_columns.masked_fill(newer > limit, -1)
            self._close_gaps()

    def _drop(self) -> None:
        assert self.state is not None
        index = self.state.index
        if index is not None and self.is_initialized:
            self.keys, self.values = take_columns(self.keys, index), take_columns(self.values, index)

    def get_seq_length(self) -> int:
        """Return the number of tokens read, evicted ones too."""
        return 0 if self.state is None else self.state.num_read

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Raises:
            ValueError: if the remaining tokens would need text that was evicted.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        if self.state is None or not self.is_initialized:
            return
        if self.leads:
            self.state.crop(-tokens_to_remove)
        self._drop()
        self._crop_meta()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        if self.leads and self.state is not None:
            self.state.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._lead(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._lead(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._lead(lambda tensor: tensor[indices, ...])

    def _lead(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.leads and self.state is not None:
            self.state.map(fn)


def shared_state(policy: MemoryPolicy, cache: Cache | None) -> MemoryState | None:
    """Return the state of a cache, made if it has none yet.

    Raises:
        ValueError: for a cache without a place for it, such as a static one.
    """
    if cache is None:
        return None
    layers = [layer for index, layer in enumerate(cache.layers) if policy.applies_to(index)]
    if not layers or not all(hasattr(layer, "join") for layer in layers):
        raise ValueError(
            f"the cache, a {type(cache).__name__}, was not made from this model's config or is static, and cannot "
            "drop columns: use DynamicCache(config=model.config)"
        )
    state = layers[0].state or MemoryState(policy)
    if state.policy != policy:
        raise ValueError(f"the cache was made for another memory: {state.policy}, and the model has {policy}")
    for layer in layers:
        layer.join(state, leads=layer is layers[0])
    return state


class MemoryStaticLayer(StaticLayer):
    """Says that there is no such layer."""

    _layer_type = MEMORY_LAYER

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        del max_cache_len, kwargs
        raise ValueError("memory mode drops columns and has no static cache: use DynamicCache(config=model.config)")
