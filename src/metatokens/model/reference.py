"""The paper's dense meta-attention, kept as the oracle that tests hold the packed one to.

For queries Q, keys K and values V of the meta-attention's own projections, with the causal mask M_causal and
P[b, i, j] = 0 if tokens i and j of row b are both meta-tokens, -inf otherwise (paper, section 3):

    MetaAttention(Q, K, V) = softmax(Q K^T / sqrt(D) + M_causal + P) V

A row that is not a meta-token has no key at all: its output is zero and only the residual passes. Where
`meta_attention_over` is "all" or "random", "meta-token" stands for the tokens that take part. This builds the whole
(B, H, T, T) matrix and projects every token, which is what `meta_attention.py` avoids. It has no cache
and no other backend.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import Cache

from .block import MetaTokenBlock
from .masks import TokenLayout
from .meta_attention import MetaAttention
from .modeling import MetaTokenForCausalLM, MetaTokenModel
from .positions import Rotary


@dataclass(frozen=True)
class DensePack:
    """Which tokens are meta-tokens, and the other limits on attention."""

    is_meta: Tensor
    """(B, T) bool: the tokens that take part."""
    rotary: Rotary | None
    layout: TokenLayout

    def without_positions(self) -> Self:
        """Return the same for a block without positions."""
        return replace(self, rotary=None)


def dense_meta_attention(attention: MetaAttention, hidden: Tensor, pack: DensePack) -> Tensor:
    """Apply the definition with the weights of `attention` to normed hidden states (B, T, C); returns (B, T, C)."""
    query, key, value = attention.project(hidden, pack.rotary)
    scores = query @ key.transpose(-1, -2) / math.sqrt(attention.head_dim)
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    causal = columns[:, None] >= columns
    both_meta = pack.is_meta[:, None, :, None] & pack.is_meta[:, None, None, :]
    layout = pack.layout
    if layout.documents is not None:
        both_meta = both_meta & (layout.documents[:, None, :, None] == layout.documents[:, None, None, :])
    if layout.has_pairs and layout.attention_mask.dtype == torch.bool:
        both_meta = both_meta & layout.attention_mask
    elif layout.has_pairs:
        scores = scores + layout.attention_mask
    if layout.bias is not None:
        bias = layout.bias(layout.position_ids[:, None, :, None] - layout.position_ids[:, None, None])
        adapted = 0 if attention.adaptive_bias is None else attention.adaptive_bias(scores, bias)
        scores = scores + bias + adapted
    weights = scores.masked_fill(~(causal & both_meta), -math.inf).softmax(-1)
    weights = weights.masked_fill(~pack.is_meta[:, None, :, None], 0)  # a row without keys is 0/0
    output: Tensor = attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
    return torch.where(pack.is_meta[..., None], output, 0)


class DenseReferenceBlock(MetaTokenBlock):
    """A block whose meta-attention is the definition."""

    def add_meta_attention(self, hidden: Tensor, update: Tensor, pack: Any, past_key_values: Cache | None) -> Tensor:
        """Add an update and then the dense meta-attention to every row of (B, T, C)."""
        del past_key_values  # empty: see DenseReferenceModel
        assert self.meta_attn is not None
        hidden = hidden + update
        return hidden + dense_meta_attention(self.meta_attn, self.meta_layernorm(hidden), pack)


class DenseReferenceModel(MetaTokenModel):
    """The decoder with dense meta-attention."""

    block_class: ClassVar[type[MetaTokenBlock]] = DenseReferenceBlock

    def _pack(self, hidden: Tensor, **inputs: Any) -> Any:
        past = inputs["past_key_values"]
        if past is not None and past.get_seq_length():
            raise ValueError("the dense reference takes whole sequences, not the continuation of a cache")
        is_meta = inputs["meta_token_mask"]
        return DensePack(is_meta.expand(hidden.shape[:2]), inputs["rotary"], inputs["layout"])


class DenseReferenceForCausalLM(MetaTokenForCausalLM):
    """The language model with dense meta-attention; loads the weights of `MetaTokenForCausalLM` unchanged."""

    model_class: ClassVar[type[MetaTokenModel]] = DenseReferenceModel
