"""The definition of memory mode, kept as the oracle that tests hold the fast forms and the cache to.

Count the text tokens of a row from its start. A query q sees itself, and a key k before it that is not padding and

    - is text, and fewer than `window` text tokens follow it up to q (itself counted if it is text), or
    - is one of the first `num_sinks` text tokens, or
    - is an anchor among the newest `memory_limit` ones up to q, and may be seen: an anchor of "every" at any time, a
      meta-token by meta-tokens at any time and by text once the text before it has left the window (or at any time with
      reveal "always").

Meta-tokens are text where the anchors are "every". This builds the whole (B, T, T) mask and evicts nothing. An anchor
of "pooled" is a meta-token whose keys and values are means over text: those of the text tokens between it and the
anchor before that it sees in its window; its own, if there are none.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from .masks import TokenLayout, to_additive
from .memory import Columns, MemoryMask, MemoryPolicy, attend_to_scores
from .modeling import MetaTokenForCausalLM, MetaTokenModel
from .position_bias import add_bias


def visible_pairs(policy: MemoryPolicy, is_meta: Tensor, is_real: Tensor) -> Tensor:
    """Tell which of T tokens see which, (B, T, T) bool, given which are meta-tokens and not padding, (B, T) bool."""
    is_text = is_real & ~is_meta if policy.anchors != "every" else is_real
    num_text = is_text.long().cumsum(-1)
    follow = num_text[:, :, None] - num_text[:, None]  # text tokens behind the key up to the query
    in_window = follow < policy.window
    is_sink = is_text & (num_text <= policy.num_sinks)
    if policy.anchors != "every":
        is_anchor = is_real & is_meta
        may_be_seen = ~in_window | is_anchor[:, :, None] | (policy.reveal == "always")
    else:
        is_anchor = is_text & ~is_sink & (num_text % policy.every == 0)
        may_be_seen = torch.ones_like(in_window)
    if policy.memory_limit is not None:
        num_anchors = is_anchor.long().cumsum(-1)
        may_be_seen = may_be_seen & (num_anchors[:, :, None] - num_anchors[:, None] < policy.memory_limit)
    columns = torch.arange(is_meta.shape[1], device=is_meta.device)
    is_past, is_itself = columns <= columns[:, None], columns == columns[:, None]
    seen = (is_text[:, None] & in_window) | is_sink[:, None] | (is_anchor[:, None] & may_be_seen)
    return (seen & is_real[:, None] & is_past) | is_itself


def pooling_weights(policy: MemoryPolicy, is_meta: Tensor, is_real: Tensor) -> Tensor:
    """Return the share of each of T tokens in the keys and values of each, (B, T, T), with anchors "pooled"."""
    is_text, is_anchor = is_real & ~is_meta, is_real & is_meta
    num_text, num_anchors = is_text.long().cumsum(-1), is_anchor.long().cumsum(-1)
    in_window = num_text[:, :, None] - num_text[:, None] < policy.window
    none_between = num_anchors[:, :, None] - num_anchors[:, None] == 1  # the anchor itself is the one
    columns = torch.arange(is_meta.shape[1], device=is_meta.device)
    is_past = columns < columns[:, None]
    members = is_anchor[:, :, None] & is_text[:, None] & in_window & none_between & is_past
    own = torch.eye(len(columns), device=is_meta.device, dtype=torch.bool).expand_as(members)
    members = torch.where(members.any(-1, keepdim=True), members, own).double()
    return members / members.sum(-1, keepdim=True)


def compact_distances(policy: MemoryPolicy, is_meta: Tensor, is_real: Tensor, positions: Tensor) -> Tensor:
    """Return at what distance a query sees a key with compact positions, (B, T, T) int64.

    Text in the window is at its ordinary distance. An anchor is as far as there are anchors behind it up to the query,
    the query among them if it is one. A sink lies in front of the remembered anchors, at most `memory_limit`.
    """
    is_text = is_real & ~is_meta if policy.anchors != "every" else is_real
    num_text = is_text.long().cumsum(-1)
    is_sink = is_text & (num_text <= policy.num_sinks)
    every = is_text & ~is_sink & (num_text % policy.every == 0)
    num_anchors = (is_real & is_meta if policy.anchors != "every" else every).long().cumsum(-1)
    behind = num_anchors[:, :, None] - num_anchors[:, None] + 1  # the anchor itself counts as one
    limit = num_anchors if policy.memory_limit is None else num_anchors.clamp(max=policy.memory_limit)
    to_sinks = limit[:, :, None] + policy.num_sinks - (num_text - 1)[:, None]
    near = is_text[:, None] & (num_text[:, :, None] - num_text[:, None] < policy.window)
    ordinary = positions[:, :, None] - positions[:, None]
    return torch.where(near, ordinary, torch.where(is_sink[:, None], to_sinks, behind))


class _CompactReference(MemoryMask):
    """Rotates each query by its distance to each key."""

    def __init__(self, mask: Tensor, distances: Tensor, rotary_emb: Any, hidden: Tensor) -> None:
        self.mask, self.distances, self.rotary_emb, self.hidden = mask, distances, rotary_emb, hidden

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float = 0.0) -> Tensor:
        """Attend over all pairs."""
        del dropout
        rows, heads, num_tokens, width = query.shape
        table = self.rotary_emb(self.hidden, self.distances.flatten(1))
        pairs = query[:, :, :, None].expand(-1, -1, -1, num_tokens, -1).reshape(rows, heads, -1, width)
        turned, _ = table.apply(pairs, pairs.clone())
        scores = (turned.view(rows, heads, num_tokens, num_tokens, width) * key[:, :, None]).sum(-1) * scaling
        return attend_to_scores(scores, self.mask, value, dropout=0.0).transpose(1, 2)


class _PooledReference:
    """Averages over all tokens."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def fill(self, key: Tensor, value: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, H, T, D) that others see."""
        del layer
        return self.weights[:, None] @ key, self.weights[:, None] @ value


class MemoryReferenceModel(MetaTokenModel):
    """The decoder with the defining mask."""

    def _pools_of_memory(self, policy: MemoryPolicy, tokens: Columns, past_key_values: Cache | None) -> Any:
        del past_key_values
        if policy.anchors != "pooled":
            return None
        weights = pooling_weights(policy, tokens.is_anchor, tokens.is_real)
        return _PooledReference(weights.to(self.dtype))

    def _mask_of_memory(
        self,
        policy: MemoryPolicy,
        tokens: Columns,
        hidden: Tensor,
        layout: TokenLayout,
        past_key_values: Cache | None,
    ) -> Any:
        if past_key_values is not None:
            raise ValueError("the reference takes whole sequences without a cache: use_cache=False")
        is_meta = tokens.is_anchor if policy.anchors != "every" else torch.zeros_like(tokens.is_anchor)
        mask = visible_pairs(policy, is_meta, tokens.is_real)[:, None]
        if policy.positions == "compact":
            distances = compact_distances(policy, is_meta, tokens.is_real, layout.position_ids.expand(tokens.shape))
            return _CompactReference(mask, distances, self.rotary_emb, hidden)
        if layout.bias is not None:
            return add_bias(mask, layout.position_ids, layout.position_ids, layout.bias)
        return to_additive(mask, hidden.dtype) if self.config._attn_implementation == "eager" else mask


class MemoryReferenceForCausalLM(MetaTokenForCausalLM):
    """The language model with the defining mask; loads the weights of `MetaTokenForCausalLM` unchanged."""

    model_class: ClassVar[type[MetaTokenModel]] = MemoryReferenceModel
