"""What the models return."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class MetaTokenModelOutput(ModelOutput):
    """What `MetaTokenModel` returns.

    `meta_attentions`, with `output_meta_attentions=True`, has one (B, H, M, K) per block, over packed meta-tokens.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    meta_attentions: tuple[Tensor, ...] | None = None


@dataclass
class MetaTokenCausalLMOutput(ModelOutput):
    """What `MetaTokenForCausalLM` returns; `logits` is None in training with labels, where none are made."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    meta_attentions: tuple[Tensor, ...] | None = None
