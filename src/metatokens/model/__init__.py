"""The meta-token language model, a Hugging Face model like any other.

This package imports only torch, transformers and itself, so that it can travel with a checkpoint as remote code.

Tensor dimensions, here and in the documentation: B batch, T sequence with meta-tokens, N text tokens, M meta-tokens,
H heads, D head size, C hidden size, V vocabulary. Masks are bool, True = keep.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration import MetaTokenConfig
from .heads import MetaTokenForQuestionAnswering, MetaTokenForSequenceClassification, MetaTokenForTokenClassification
from .modeling import MetaTokenForCausalLM, MetaTokenModel

AutoConfig.register(MetaTokenConfig.model_type, MetaTokenConfig, exist_ok=True)
AutoModel.register(MetaTokenConfig, MetaTokenModel, exist_ok=True)
AutoModelForCausalLM.register(MetaTokenConfig, MetaTokenForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MetaTokenConfig, MetaTokenForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(MetaTokenConfig, MetaTokenForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(MetaTokenConfig, MetaTokenForQuestionAnswering, exist_ok=True)

__all__ = [
    "MetaTokenConfig",
    "MetaTokenForCausalLM",
    "MetaTokenForQuestionAnswering",
    "MetaTokenForSequenceClassification",
    "MetaTokenForTokenClassification",
    "MetaTokenModel",
]
