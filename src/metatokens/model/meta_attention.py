"""Packed meta-attention: the paper's sparse second attention at the cost of its meta-tokens alone.

The paper masks a dense T x T matrix so that only meta-tokens attend to meta-tokens (section 3, "meta-attention"). The
same function is ordinary causal attention over the sub-sequence of meta-tokens: gather their M rows, project and rotate
them with their original positions, attend causally, add the result back to those rows. No T x T mask exists; where rows
of a batch hold fewer meta-tokens than others, the packed rows are padded on the right and causality alone keeps the
padding out of sight. `reference.py` is the dense definition; tests hold the two equal.

Two controls ask what the gain is due to, with the same parameters (`meta_attention_over`): "all" is a second attention
among all tokens at full cost, "random" packs pseudo-random text tokens in place of the meta-tokens.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import create_causal_mask

from .attention import Attention
from .cache import MetaDynamicLayer, MetaStaticLayer
from .configuration import MetaTokenConfig
from .positions import Rotary, add_alibi

HASH_BITS = 32
HASH_MASK = 2**HASH_BITS - 1
HASH_MULTIPLIER = 0x45D9F3B  # Thomas Mueller's integer hash: small enough that a product of 32 bits fits into 63
HASH_INCREMENT = 0x1E3779B9  # apart from zero, which the rounds above map to itself


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

    def gather(self, hidden_BTC: Tensor) -> Tensor:
        """Return the meta rows, (B, M, C)."""
        if self.index is None:
            return hidden_BTC
        flat = hidden_BTC.reshape(-1, hidden_BTC.shape[-1])
        return flat.index_select(0, _flat_index(self.index, hidden_BTC)).view(*self.index.shape, -1)

    def add(self, hidden_BTC: Tensor, update_BMC: Tensor) -> Tensor:
        """Return `hidden_BTC` with the update added to its meta rows; every other row keeps its bits."""
        update_BMC = update_BMC.to(hidden_BTC.dtype)
        if self.index is None:
            return hidden_BTC + update_BMC
        if self.valid is not None:
            update_BMC = torch.where(self.valid[..., None], update_BMC, 0)
        # unique indices: index_add is exact and deterministic; a zero-filled full-size tensor would cost far more
        flat = hidden_BTC.reshape(-1, hidden_BTC.shape[-1])
        return flat.index_add(0, _flat_index(self.index, hidden_BTC), update_BMC.flatten(0, 1)).view_as(hidden_BTC)


def _flat_index(index_BM: Tensor, hidden_BTC: Tensor) -> Tensor:
    offsets = torch.arange(hidden_BTC.shape[0], device=index_BM.device) * hidden_BTC.shape[1]
    return (index_BM + offsets[:, None]).flatten()


class MetaAttention(Attention):
    """Causal attention among the packed meta-tokens."""

    def forward(
        self, packed: Tensor, pack: MetaPack, past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Attend among the meta rows (B, M, C) and, with a cache, over earlier meta-tokens.

        Nothing of the token stream (position_ids, cu_seq_lens) reaches the attention function from here: flash
        attention would take it for the packed stream's.
        """
        query, key, value = self.project(packed, pack.rotary)
        if past_key_values is not None:
            layer = past_key_values.layers[self.layer_idx]
            key, value = layer.update_meta(key, value, pack.columns)
            if pack.index is None and isinstance(layer, MetaStaticLayer):
                # slots are columns, as in the mask; nothing was swallowed
                key, value = key[:, :, : layer.meta_capacity], value[:, :, : layer.meta_capacity]
        return self.attend(query, key, value, pack.mask)


@dataclass(frozen=True)
class _PackedPast:
    """What `create_causal_mask` asks of a cache, answered for the packed stream."""

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


def choose_members(
    config: MetaTokenConfig,
    *,
    input_ids: Tensor | None,
    position_ids: Tensor,
    meta_token_mask: Tensor,
    attention_mask: Tensor | None,
    seen: int | Tensor,
) -> Tensor:
    """Tell which tokens take part in meta-attention, (B, T) bool; padding never does.

    A text token of "random" is chosen by a hash of its position and id, so that it is the same one whatever the batch,
    the padding and the cache.

    Raises:
        ValueError: for "random" without ids.
    """
    shape = meta_token_mask.shape
    if config.meta_attention_over == "meta":
        members = meta_token_mask
    elif config.meta_attention_over == "all":
        members = torch.ones_like(meta_token_mask)
    elif input_ids is None:
        raise ValueError('meta_attention_over "random" chooses tokens by their ids: give input_ids, not inputs_embeds')
    else:
        chosen = hash_integers(position_ids.expand(shape), input_ids) < config.random_ratio * 2**HASH_BITS
        members = chosen & ~meta_token_mask
    if attention_mask is not None and attention_mask.ndim == 2:
        return members & attention_mask[:, -shape[1] :].bool()
    if attention_mask is None or config.meta_attention_over == "meta":
        return members
    # a mask made for a static cache: what a real token may see holds itself
    columns = (torch.arange(shape[1], device=members.device) + seen)[None, :, None].expand(shape[0], -1, 1)
    itself = attention_mask[:, 0].expand(shape[0], -1, -1).gather(2, columns)[..., 0]
    return members & (itself if itself.dtype == torch.bool else itself == 0)


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
    return MetaPack(index=None, valid=None, rotary=rotary, mask=mask, columns=columns)


def pack_meta_tokens(
    config: MetaTokenConfig,
    hidden: Tensor,
    *,
    meta_token_mask: Tensor,
    meta_indices: Tensor | None,
    rotary: Rotary | None,
    alibi_slopes: Tensor | None,
    past_key_values: Cache | None,
    always: bool,
) -> MetaPack | None:
    """Find the meta-tokens of a batch and prepare their attention.

    Args:
        config: the model's configuration.
        hidden: (B, T, C), for its shape, dtype and device.
        meta_token_mask: (B, T) bool, True at meta-tokens.
        meta_indices: (B, M) int64 from a collator, every entry a meta-token; spares a host synchronisation.
        rotary: the positions of all T tokens, or None.
        alibi_slopes: (H,), or None.
        past_key_values: the cache, or None.
        always: return a pack with one idle column rather than None when there is no meta-token; in training every
            process must touch the same parameters, or a distributed backward pass waits for ever.

    Returns:
        None when no row has a meta-token.
    """
    layer = None
    if past_key_values is not None:
        first = next(i for i in range(config.num_hidden_layers) if config.has_meta_attention(i))
        layer = past_key_values.layers[first]
    found = _find_meta_tokens(meta_token_mask, meta_indices, keep_shape=isinstance(layer, StaticLayer), always=always)
    if found is None:
        return None
    index, valid = found

    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    columns = index + seen if valid is None else torch.where(valid, index + seen, -1)
    if isinstance(layer, MetaStaticLayer):
        mask, key_columns = _static_mask(layer, columns)
    else:
        mask, key_columns = _growing_mask(config, hidden, columns, valid, layer, alibi_slopes is not None)
    if alibi_slopes is not None:
        mask = add_alibi(mask, columns, key_columns, alibi_slopes)
    elif config._attn_implementation == "eager" and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)

    rotary = None if rotary is None else rotary.at(index)
    return MetaPack(index=index, valid=valid, rotary=rotary, mask=mask, columns=columns)


def _find_meta_tokens(
    meta_token_mask: Tensor, meta_indices: Tensor | None, *, keep_shape: bool, always: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return indices (B, M) of the meta-tokens in order, and which of them are real."""
    if meta_indices is not None:
        return meta_indices, None
    num_tokens = meta_token_mask.shape[1]
    order = torch.argsort((~meta_token_mask).to(torch.int8), dim=-1, stable=True)
    if keep_shape and (num_tokens == 1 or torch.compiler.is_compiling()):
        return order, meta_token_mask.gather(1, order)  # static shapes, no host synchronisation
    counts = meta_token_mask.sum(-1)
    fewest, most = (int(count) for count in torch.stack(torch.aminmax(counts)).tolist())
    if most == 0 and not always:
        return None
    num_meta = max(most, 1)
    index = order[:, :num_meta]
    return index, None if fewest == num_meta else meta_token_mask.gather(1, index)


def _growing_mask(
    config: MetaTokenConfig,
    hidden: Tensor,
    columns: Tensor,
    valid: Tensor | None,
    layer: MetaDynamicLayer | None,
    explicit: bool,
) -> tuple[Any, Tensor]:
    """Return the mask of the packed stream and its key columns, (B, K), without a cache or with a growing one."""
    num_past = layer.num_meta if layer is not None else 0
    key_columns = columns
    key_valid = None
    if num_past and layer is not None and layer.meta_columns is not None:
        key_columns = torch.cat([layer.meta_columns, columns], dim=-1)
        key_valid = key_columns >= 0  # always explicit: sdpa takes a missing mask with past keys for an empty cache
    elif explicit and valid is not None:
        key_valid = valid
    mask = create_causal_mask(
        config=config,
        inputs_embeds=hidden[:, : columns.shape[1]],
        attention_mask=key_valid,
        past_key_values=_PackedPast(num_past) if num_past else None,
        layer_idx=0,
        allow_is_causal_skip=not (num_past or explicit),
    )
    return mask, key_columns


def _static_mask(layer: MetaStaticLayer, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bool mask (B, 1, M, capacity + 1) over the slots of a static cache, and the slots' columns."""
    slots = layer.meta_slots(columns)
    key_slots = torch.arange(layer.meta_capacity + 1, device=columns.device)
    mask = key_slots <= slots[..., None]  # a row that is no meta-token sees every slot; its output is dropped
    old = torch.zeros_like(key_slots).expand(len(columns), -1) if layer.meta_keys is None else layer.meta_columns
    return mask[:, None], old.scatter(1, slots, columns)
