"""Multi-head attention as both attentions of a block use it, through transformers' attention interface.

The same weights therefore run under eager, sdpa, flash and flex attention.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .compatibility import ALL_ATTENTION_FUNCTIONS
from .configuration import ADAPTIVE, MetaTokenConfig
from .memory import MemoryMask, take_columns
from .position_scores import AdaptiveBias, RelativeKeys, Sinusoids
from .positions import Rotary


def eager_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend with explicit weights; returns the output (B, T, H, D) and the weights (B, H, T, K)."""
    del kwargs
    scores = torch.matmul(query_BHTD, key_BHTD.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    # the softmax of a half-precision row loses mass, so it is computed in float32
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=precision).to(query_BHTD.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value_BHTD).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Projections, rotation and the attention function; the mask says which token may attend to which."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: MetaTokenConfig, layer_index: int) -> None:
        """Create the four full-width projections, with biases as in GPT-2."""
        super().__init__()
        assert config.head_dim is not None
        self.config = config
        self.layer_idx = layer_index  # the name that the attention interface expects
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.o_proj = nn.Linear(width, config.hidden_size)
        self.relative_keys = RelativeKeys(config) if config.position_encoding == "transformer_xl" else None
        self.adaptive_bias = AdaptiveBias(config) if config.position_encoding in ADAPTIVE else None

    def project(self, hidden: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Project hidden states (B, T, C) to queries and keys with their positions, and values, each (B, H, T, D)."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden).view(shape).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return *self.place(query, key, rotary), value

    def place(self, query: Tensor, key: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Give queries and keys (B, H, T, D) their positions."""
        if self.relative_keys is not None and isinstance(rotary, Sinusoids):
            query, key = self.relative_keys(query, key, rotary)
        elif rotary is not None:
            query, key = rotary.apply(query, key)
        return query, key

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the projected output (B, T, C) and, if the backend returns them, the weights (B, H, T, K)."""
        output, weights = self.weigh_values(query, key, value, mask, **kwargs)
        return self.o_proj(output.reshape(*output.shape[:2], -1)), weights

    def weigh_values(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `attend` projects, (B, T, H, D), and the weights."""
        if key.shape[-1] > query.shape[-1]:
            key = key[..., : query.shape[-1]].contiguous()  # see `Rotary.apply`
        attention_fn = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        if self.adaptive_bias is not None:
            output, weights = self._attend_adaptively(query, key, value, mask, dropout)
            return output, weights if self.config._attn_implementation == "eager" else None
        if isinstance(mask, MemoryMask):
            if self.config._attn_implementation != "flex_attention":
                return mask.attend(query, key, value, scaling=self.scaling, dropout=dropout), None
            key, value = (take_columns(tensor, mask.permutation) for tensor in (key, value))
            mask = mask.flex
        attended: tuple[Tensor, Tensor | None] = attention_fn(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return attended

    def _attend_adaptively(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Attend with what DAPE makes of scores and of the bias in an additive mask, as `eager_attention` does."""
        assert self.adaptive_bias is not None
        precision = torch.promote_types(query.dtype, torch.float32)
        scores = torch.matmul(query.to(precision), key.to(precision).transpose(2, 3)) * self.scaling
        is_seen = mask > torch.finfo(mask.dtype).min / 2
        bias = torch.where(is_seen, mask, 0).to(precision)
        scores = (scores + bias + self.adaptive_bias(scores, bias)).masked_fill(~is_seen, torch.finfo(precision).min)
        weights = nn.functional.softmax(scores, dim=-1).to(query.dtype)
        weights = nn.functional.dropout(weights, p=dropout, training=self.training)
        return torch.matmul(weights, value).transpose(1, 2), weights


class SelfAttention(Attention):
    """Causal self-attention over all tokens."""

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        mask: Any,
        past_key_values: Cache | None = None,
        pools: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over the sequence (B, T, C) and, with a cache, over what came before it.

        The `pools` of memory mode say which tokens have means of others as keys and values.
        """
        query, key, value = self.project(hidden, rotary)
        if pools is not None:
            layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            key, value = pools.fill(key, value, layer)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return self.attend(query, key, value, mask, **kwargs)
