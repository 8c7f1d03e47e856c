"""One block of the decoder: self-attention, meta-attention, feed-forward; paper, section 3 and appendix.

Deviation: pre-norm, each of the three sub-layers with its own norm and residual, and GELU, as in nanoGPT.
Deviation: the norm before meta-attention has no parameters. An affine norm before linear projections with biases adds
nothing that they cannot hold, and the model has exactly the paper's 152M parameters.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import Cache, GradientCheckpointingLayer

from .attention import SelfAttention
from .compatibility import ACT2FN
from .configuration import CROSS, MetaTokenConfig
from .cross_attention import CrossAttention, CrossPack
from .meta_attention import MetaAttention, MetaPack
from .positions import Rotary


class MLP(nn.Module):
    """Feed-forward sub-layer."""

    def __init__(self, config: MetaTokenConfig) -> None:
        """Create the two projections, with biases as in GPT-2."""
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        output: Tensor = self.down_proj(self.act_fn(self.up_proj(hidden)))
        return output


class MetaTokenBlock(GradientCheckpointingLayer):
    """Self-attention, meta-attention over the meta rows, feed-forward; each with its own norm and residual."""

    attention_class: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(self, config: MetaTokenConfig, layer_index: int) -> None:
        """Create the block; one without meta-attention has no meta parameters."""
        super().__init__()
        self.has_positions = config.has_positions(layer_index)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = self.attention_class(config, layer_index)
        self.meta_attn = None
        if config.has_meta_attention(layer_index):
            self.meta_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=False)
            attention_class = CrossAttention if config.meta_attention_over in CROSS else MetaAttention
            self.meta_attn = attention_class(config, layer_index)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None = None,
        mask: Any = None,
        pack: MetaPack | CrossPack | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map hidden states (B, T, C) to (B, T, C)."""
        if not self.has_positions:
            rotary, pack = None, None if pack is None else pack.without_positions()
        update, _ = self.self_attn(self.input_layernorm(hidden), rotary, mask, past_key_values, **kwargs)
        update = self.dropout(update)
        if self.meta_attn is not None and pack is not None:
            hidden = self.add_meta_attention(hidden, update, pack, past_key_values)
        else:
            hidden = hidden + update
        output: Tensor = hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))
        return output

    def add_meta_attention(
        self, hidden: Tensor, update: Tensor, pack: MetaPack | CrossPack, past_key_values: Cache | None
    ) -> Tensor:
        """Add an update, and then the meta-attention of the meta rows to those rows; all (B, T, C)."""
        meta_attn = self.meta_attn
        assert meta_attn is not None

        def attend(packed: Tensor) -> Tensor:
            change, _ = meta_attn(self.meta_layernorm(packed), pack, past_key_values)
            return self.dropout(change)  # type: ignore[no-any-return]

        return pack.add_both(hidden, update, attend)
