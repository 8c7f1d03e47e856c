"""The paper's dense meta-attention, kept as the oracle that tests hold the packed one to.

For queries Q, keys K and values V of the meta-attention's own projections, with the causal mask M_causal and
P[b, i, j] = 0 if tokens i and j of row b are both meta-tokens, -inf otherwise (paper, section 3):

    MetaAttention(Q, K, V) = softmax(Q K^T / sqrt(D) + M_causal + P) V

A row that is not a meta-token has no key at all: its output is zero and only the residual passes. Where
`meta_attention_over` is "all" or "random", "meta-token" stands for the tokens that take part; where it is "cross", P is
zero if one of i and j is a meta-token and the other is not, and where it is "gather", if i is and j is not. This builds
the whole (B, H, T, T) matrix and projects every token, which is what `meta_attention.py` avoids. It has no cache and no
other backend.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import Cache

from .block import MetaTokenBlock
from .masks import TokenLayout, is_kept
from .meta_attention import MetaAttention
from .modeling import MetaTokenForCausalLM, MetaTokenModel
from .positions import Rotary


@dataclass(frozen=True)
class DensePack:
    """Which tokens are meta-tokens, and the other limits on attention."""

    over: str
    """`meta_attention_over`."""
    is_meta: Tensor
    """(B, T) bool: the tokens that take part, or the meta-tokens of cross-attention."""
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
    of_query, of_key = pack.is_meta[:, None, :, None], pack.is_meta[:, None, None, :]
    kinds = {"cross": of_query != of_key, "gather": of_query & ~of_key}
    sees = kinds.get(pack.over, of_query & of_key) & causal
    layout = pack.layout
    if layout.documents is not None:
        sees = sees & (layout.documents[:, None, :, None] == layout.documents[:, None, None, :])
    if layout.has_pairs:
        sees = sees & is_kept(layout.attention_mask)
        if layout.attention_mask.dtype != torch.bool:
            scores = scores + layout.attention_mask
    elif layout.attention_mask is not None:
        sees = sees & layout.attention_mask[:, None, None].bool()
    if layout.bias is not None:
        bias = layout.bias(layout.positions[:, None, :, None] - layout.positions[:, None, None])
        adapted = 0 if attention.adaptive_bias is None else attention.adaptive_bias(scores, bias)
        scores = scores + bias + adapted
    weights = scores.masked_fill(~sees, -math.inf).softmax(-1).masked_fill(~sees, 0)  # a row without keys is 0/0
    output: Tensor = attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
    return torch.where(sees.any(-1).any(1)[..., None], output, 0)


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
        is_meta = is_meta.expand(hidden.shape[:2])
        return DensePack(self.config.meta_attention_over, is_meta, inputs["rotary"], inputs["layout"])


class DenseReferenceForCausalLM(MetaTokenForCausalLM):
    """The language model with dense meta-attention; loads the weights of `MetaTokenForCausalLM` unchanged."""

    model_class: ClassVar[type[MetaTokenModel]] = DenseReferenceModel
