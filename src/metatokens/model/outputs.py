"""What the models return."""

from dataclasses import dataclass

from torch import Tensor

from .compatibility import BaseModelOutputWithPast, CausalLMOutputWithPast, has_both_cache_names


@has_both_cache_names
@dataclass
class MetaTokenModelOutput(BaseModelOutputWithPast):
    """What `MetaTokenModel` returns.

    `meta_attentions`, with `output_meta_attentions=True`, has one (B, H, M, K) per block, over packed meta-tokens.
    """

    meta_attentions: tuple[Tensor, ...] | None = None


@has_both_cache_names
@dataclass
class MetaTokenCausalLMOutput(CausalLMOutputWithPast):
    """What `MetaTokenForCausalLM` returns; `logits` is None in training with labels, which makes none by default."""

    meta_attentions: tuple[Tensor, ...] | None = None
