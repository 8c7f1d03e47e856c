"""Packed meta-attention: the paper's sparse second attention at the cost of its meta-tokens alone.

The paper masks a dense T x T matrix so that only meta-tokens attend to meta-tokens (section 3, "meta-attention"). The
same function is ordinary causal attention over the sub-sequence of meta-tokens: gather their M rows, project and rotate
them with their original positions, attend causally, add the result back to those rows. No T x T mask exists; where rows
of a batch hold fewer meta-tokens than others, the packed rows are padded on the right and causality alone keeps the
padding out of sight. `reference.py` is the dense definition; tests hold the two equal.

Two controls with the same parameters separate possible causes of a gain (`meta_attention_over`): "all" is a second
attention among all tokens at full cost, "random" packs pseudo-random text tokens in place of the meta-tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import Cache

from .attention import Attention
from .cache import MetaDynamicLayer, MetaStaticLayer
from .compatibility import create_causal_mask
from .configuration import MetaTokenConfig
from .masks import MaskFunction, TokenLayout, combine_masks, is_traced, same_document, take_pairs, to_additive
from .position_bias import add_bias
from .positions import Rotary

HASH_BITS = 32
HASH_MASK = 2**HASH_BITS - 1
HASH_MULTIPLIER = 0x45D9F3B  # Thomas Mueller's integer hash: small enough that a product of 32 bits fits into 63
HASH_INCREMENT = 0x1E3779B9  # the rounds alone would map zero to itself


class MetaPack(NamedTuple):
    """Where the meta-tokens of a batch are and what they may attend to; made once per forward pass for all layers.

    A tuple, so that whatever moves a layer's inputs to its device finds the tensors in it.
    """

    index: Tensor | None  # type: ignore[assignment] # in place of a tuple's own method
    """(B, M) int64: index in this forward's sequence of each packed meta-token, unique within a row; None if all
    tokens take part as they stand."""
    valid: Tensor | None
    """(B, M) bool: False where a row has no such meta-token; None if all are real."""
    rotary: Rotary | None
    """The meta-tokens' own positions."""
    mask: Any
    """Mask of the packed stream in the format of the attention backend."""
    columns: Tensor
    """(B, M) int64: column of each meta-token in the cache of all tokens, -1 where not valid."""

    rows: Tensor | None
    """(B * M,) int64: the packed meta-tokens among all B * T tokens of this forward; None as `index`."""

    def without_positions(self) -> Self:
        """Return the same for a block without positions."""
        return self._replace(rotary=None)

    def gather(self, hidden_BTC: Tensor) -> Tensor:
        """Return the meta rows, (B, M, C)."""
        if self.index is None or self.rows is None:
            return hidden_BTC
        return hidden_BTC.flatten(0, 1).index_select(0, self.rows).view(*self.index.shape, -1)

    def add(self, hidden_BTC: Tensor, update_BMC: Tensor) -> Tensor:
        """Return `hidden_BTC` with the update added to its meta rows; every other row keeps its bits."""
        if self.rows is None:
            return hidden_BTC + update_BMC.to(hidden_BTC.dtype)
        # unique indices: index_add is exact and deterministic; a zero-filled full-size tensor would cost far more
        update = self._rows_of(update_BMC, hidden_BTC.dtype)
        return hidden_BTC.flatten(0, 1).index_add(0, self.rows, update).view_as(hidden_BTC)

    def add_both(self, hidden_BTC: Tensor, update_BTC: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum of the first two, with `attend` of the sum's meta rows (B, M, C) added to these rows.

        Equal to `add` on the sum, but no tensor of all rows is made for it beside the sum, and one for its gradient.
        """
        if self.index is None or self.rows is None:
            total = hidden_BTC + update_BTC
            return total + attend(total).to(total.dtype)
        both = hidden_BTC.flatten(0, 1), update_BTC.flatten(0, 1)
        summed: tuple[Tensor, Tensor] = _SumAndRows.apply(*both, self.rows)  # type: ignore[no-untyped-call]
        total, packed = summed
        update = self._rows_of(attend(packed.view(*self.index.shape, -1)), total.dtype)
        # in place: nothing else holds the sum, and addition keeps nothing for the backward pass
        return total.index_add_(0, self.rows, update).view_as(hidden_BTC)

    def _rows_of(self, update_BMC: Tensor, dtype: torch.dtype) -> Tensor:
        update_BMC = update_BMC.to(dtype)
        if self.valid is not None:
            update_BMC = torch.where(self.valid[..., None], update_BMC, 0)
        return update_BMC.flatten(0, 1)


class _SumAndRows(torch.autograd.Function):
    """A sum (N, C) and some rows of it, whose gradients meet without a tensor of zeros for the other rows."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        total = first + second
        return total, total.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_rows: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows,) = ctx.saved_tensors
        grad = grad_total.index_add(0, rows, grad_rows)
        return grad, grad, None


class MetaAttention(Attention):
    """Causal attention among the packed meta-tokens."""

    def forward(
        self, packed: Tensor, pack: MetaPack, past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend among the meta rows (B, M, C) and, with a cache, over earlier meta-tokens.

        Arguments that describe the token stream (position_ids, cu_seq_lens) are not passed on: flash attention would
        apply them to the packed stream.
        """
        query, key, value = self.project(packed, pack.rotary)
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            key, value = layer.update_meta(key, value, pack.columns)
            if pack.index is None and layer.is_compileable:
                # every token took a slot, so slots are columns, as in the mask, and the spare slot is unused
                key, value = key[:, :, : layer.meta_capacity], value[:, :, : layer.meta_capacity]
        return self.attend(query, key, value, pack.mask)


@dataclass(frozen=True)
class _PackedPast:
    """The part of a cache that `create_causal_mask` reads, for the packed stream."""

    length: int
    is_compileable = False

    def get_query_offset(self, layer_idx: int = 0) -> int:
        del layer_idx
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        del layer_idx
        return self.length + query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        del layer_idx
        return self.length


def check_cache(config: MetaTokenConfig, cache: Any) -> None:
    """Raise ValueError for a cache without a place for the layers and meta-tokens of `config`."""
    layers: Any = getattr(cache, "layers", None)
    # without meta-attention a plain DynamicCache() will do, which starts empty and adds layers as needed
    fits = layers is not None and len(layers) in (0, config.num_hidden_layers)
    for layer_index in range(config.num_hidden_layers):
        if fits and config.has_meta_attention(layer_index):
            fits = len(layers) > 0 and hasattr(layers[layer_index], "update_meta")
    if not fits:
        raise ValueError(
            f"the cache, a {type(cache).__name__}, was not made from this model's config and has no place for its "
            "layers or meta-tokens: use DynamicCache(config=model.config)"
        )


def refuse_paged_cache(config: MetaTokenConfig) -> None:
    """Raise ValueError under transformers' continuous batching."""
    if config._attn_implementation.startswith("paged|"):
        raise ValueError("the paged cache of generate_batch has no place for meta-tokens: use generate")


def check_meta_indices(meta_indices: Tensor, meta_token_mask: Tensor, *, must_look: bool) -> None:
    """Raise ValueError unless every row has as many meta-tokens as `meta_indices` (B, M).

    On an accelerator the check would wait for the device, so it runs there only if `must_look` is set.
    """
    if is_traced() or not (must_look or meta_token_mask.device.type == "cpu"):
        return
    counts = meta_token_mask.sum(-1)
    if (counts != meta_indices.shape[1]).any():
        raise ValueError(
            f"meta_indices give {meta_indices.shape[1]} meta-tokens a row, but the inputs hold {counts.tolist()}: "
            "leave meta_indices out, or give meta_token_mask with inputs_embeds of your own"
        )


def choose_members(
    config: MetaTokenConfig,
    *,
    input_ids: Tensor | None,
    meta_token_mask: Tensor,
    layout: TokenLayout,
    seen: int | Tensor,
) -> Tensor:
    """Tell which tokens take part in meta-attention, (B, T) bool; padding never does.

    "random" chooses text tokens by a hash of their position and id, so the choice does not depend on the batch, the
    padding or the cache.

    Raises:
        ValueError: for "random" without ids.
    """
    shape = meta_token_mask.shape
    if config.takes_meta_tokens:
        members = meta_token_mask
    elif config.meta_attention_over == "all":
        members = torch.ones_like(meta_token_mask)
    elif input_ids is None:
        raise ValueError('meta_attention_over "random" chooses tokens by their ids: give input_ids, not inputs_embeds')
    else:
        chosen = hash_integers(layout.position_ids.expand(shape), input_ids) < config.random_ratio * 2**HASH_BITS
        members = chosen & ~meta_token_mask
    is_real = layout.find_real_tokens(torch.arange(shape[1], device=members.device) + seen)
    return members if is_real is None else members & is_real


def hash_integers(*values: Tensor) -> Tensor:
    """Mix integer tensors, broadcast together, into int64 in 0..2^32 - 1, alike on every device."""
    mixed = torch.zeros((), dtype=torch.int64, device=values[0].device)
    for value in values:
        mixed = (mixed ^ value) & HASH_MASK
        for _ in range(2):
            mixed = ((mixed >> 16 ^ mixed) * HASH_MULTIPLIER) & HASH_MASK
        mixed = ((mixed >> 16 ^ mixed) + HASH_INCREMENT) & HASH_MASK
    return mixed


def pack_all_tokens(hidden: Tensor, *, rotary: Rotary | None, mask: Any, seen: int | Tensor) -> MetaPack:
    """Prepare a second causal attention of all tokens (B, T, C), under the mask of the first; nothing is gathered."""
    columns = (torch.arange(hidden.shape[1], device=hidden.device) + seen).expand(hidden.shape[:2])
    return MetaPack(index=None, valid=None, rotary=rotary, mask=mask, columns=columns, rows=None)


def pack_meta_tokens(
    config: MetaTokenConfig,
    hidden: Tensor,
    *,
    meta_token_mask: Tensor,
    meta_indices: Tensor | None,
    rotary: Rotary | None,
    layout: TokenLayout,
    past_key_values: Cache | None,
    always: bool,
) -> MetaPack | None:
    """Find the meta-tokens of a batch and prepare their attention.

    Args:
        config: the model's configuration.
        hidden: (B, T, C), for its shape, dtype and device.
        meta_token_mask: (B, T) bool, True at meta-tokens.
        meta_indices: (B, M) int64 from a collator: every row has M meta-tokens; spares a host synchronisation.
        rotary: the positions of all T tokens, or None.
        layout: the other limits on the attention of the T tokens, which also bind the packed stream.
        past_key_values: the cache, or None.
        always: return a pack with one idle column rather than None when there is no meta-token; in training every
            process must touch the same parameters, or a distributed backward pass waits for ever.

    Returns:
        None when no row has a meta-token.

    Raises:
        ValueError: for meta-tokens under transformers' continuous batching, whose cache has no place for them.
    """
    layer: Any = None
    if past_key_values is not None:
        first = next(i for i in range(config.num_hidden_layers) if config.has_meta_attention(i))
        layer = past_key_values.layers[first]
    # an attribute and not the class: a process may hold two copies of this code, and either may have made the layer
    is_static = layer is not None and layer.is_compileable
    found = find_members(meta_token_mask, meta_indices, keep_shape=is_static, always=always)
    if found is None:
        return None
    refuse_paged_cache(config)
    index, valid = found

    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    columns = index + seen if valid is None else torch.where(valid, index + seen, -1)
    if is_static:
        mask, key_columns = _static_mask(layer, columns)
    else:
        mask, key_columns = _growing_mask(config, hidden, index, columns, layer, layout)
    if layout.has_pairs:
        mask = combine_masks(mask, take_pairs(layout.attention_mask, index, key_columns))
    if layout.bias is not None:
        mask = add_bias(mask, *_positions_of(config, layout, index, key_columns, past_key_values), layout.bias)
    elif config._attn_implementation == "eager":
        mask = to_additive(mask, hidden.dtype)

    rotary = None if rotary is None else rotary.at(index)
    offsets = torch.arange(len(index), device=index.device)[:, None] * hidden.shape[1]
    rows = (index + offsets).flatten()
    return MetaPack(index=index, valid=valid, rotary=rotary, mask=mask, columns=columns, rows=rows)


def find_members(
    meta_token_mask: Tensor, meta_indices: Tensor | None, *, keep_shape: bool, always: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return indices (B, M) of the meta-tokens in order, and which of them are real."""
    count_so_far = meta_token_mask.cumsum(-1)
    order = _meta_tokens_first(meta_token_mask, count_so_far)
    if meta_indices is not None:
        index = order[:, : meta_indices.shape[1]]
        return index, meta_token_mask.gather(1, index)
    if is_traced() or (keep_shape and meta_token_mask.shape[1] == 1):
        return order, meta_token_mask.gather(1, order)  # static shapes, no host synchronisation
    # the one wait for the device of a forward pass: how many meta-tokens there are decides the shapes of all layers
    fewest, most = (int(count) for count in torch.stack(torch.aminmax(count_so_far[:, -1])).tolist())
    if most == 0 and not always:
        return None
    num_meta = max(most, 1)
    index = order[:, :num_meta]
    return index, None if fewest == num_meta else meta_token_mask.gather(1, index)


def _meta_tokens_first(meta_token_mask: Tensor, count_so_far: Tensor) -> Tensor:
    """Return the columns (B, T) of each row, those of its meta-tokens first and both kinds in order.

    A stable sort by the mask. Every token's place follows from the number of meta-tokens up to it, (B, T).
    """
    columns = torch.arange(meta_token_mask.shape[1], device=meta_token_mask.device)
    places = torch.where(meta_token_mask, count_so_far - 1, count_so_far[:, -1:] + columns - count_so_far)
    return torch.empty_like(places).scatter(1, places, columns.expand_as(places))


def _growing_mask(
    config: MetaTokenConfig,
    hidden: Tensor,
    index: Tensor,
    columns: Tensor,
    layer: MetaDynamicLayer | None,
    layout: TokenLayout,
) -> tuple[Any, Tensor]:
    """Return the mask of the packed stream and its key columns, (B, K), without a cache or with a growing one."""
    num_past = layer.num_meta if layer is not None else 0
    explicit = layout.bias is not None or layout.has_pairs
    key_columns = columns
    key_valid = None
    if num_past and layer is not None and layer.meta_columns is not None:
        key_columns = torch.cat([layer.meta_columns, columns], dim=-1)
        key_valid = key_columns >= 0  # always explicit: sdpa takes a missing mask with past keys for an empty cache
    elif explicit:
        key_valid = columns >= 0
    pattern = None
    if layout.documents is not None:
        documents = layout.documents.expand(len(index), -1)
        pattern = same_document(documents.gather(1, index), len(index))
    elif config.memory_policy is not None and config.memory_policy.memory_limit is not None:
        pattern = newest_members(key_columns, config.memory_policy.memory_limit)
    mask = create_causal_mask(
        config=config,
        inputs_embeds=hidden[:, : columns.shape[1]],
        attention_mask=key_valid,
        past_key_values=_PackedPast(num_past) if num_past else None,
        and_mask_function=pattern,
        layer_idx=0,
        allow_is_causal_skip=not (num_past or explicit),
    )
    return mask, key_columns


def _positions_of(
    config: MetaTokenConfig, layout: TokenLayout, index: Tensor, key_columns: Tensor, past_key_values: Cache | None
) -> tuple[Tensor, Tensor]:
    """Return the positions (B, M) of the queries and (B, K) of the keys of the packed stream."""
    if past_key_values is not None and config.memory_policy is not None and config.memory_policy.positions == "text":
        # a meta-token of the past is known by its column alone: before it stand padding, meta-tokens and text
        mask = layout.attention_mask
        padding = 0 if mask is None else (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        places = (key_columns - (key_columns >= 0).long().cumsum(-1) - padding).clamp(min=0)
        return places[:, -index.shape[1] :], places
    num_tokens = layout.position_ids.shape[1]
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    num_columns = num_tokens if past_key_values is None else past_key_values.get_mask_sizes(num_tokens, 0)[0]
    key_positions = layout.key_positions(num_columns, seen).expand(len(index), -1)
    return layout.positions.expand(len(index), -1).gather(1, index), key_positions.gather(1, key_columns.clamp(min=0))


def newest_members(key_columns: Tensor, limit: int) -> MaskFunction:
    """Return the pattern by which each member sees the newest `limit` ones, itself among them.

    Args:
        key_columns: (B, K) int64, -1 where a row has no member.
        limit: the members that memory mode remembers.
    """
    rank = (key_columns >= 0).long().cumsum(-1)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        return rank[batch, query] - rank[batch, key] < limit

    return sees


def _static_mask(layer: MetaStaticLayer, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bool mask (B, 1, M, capacity + 1) over the slots of a static cache, and the slots' columns."""
    slots = layer.meta_slots(columns)
    key_slots = torch.arange(layer.meta_capacity + 1, device=columns.device)
    mask = key_slots <= slots[..., None]  # a row that is not a meta-token sees every slot; its output is dropped
    old = torch.zeros_like(key_slots).expand(len(columns), -1) if layer.meta_keys is None else layer.meta_columns
    return mask[:, None], old.scatter(1, slots, columns)
