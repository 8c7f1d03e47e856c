"""Imports from transformers' internals, and what its releases name differently.

Every name that `import transformers` does not offer is imported here and nowhere else, so a release that moves or
renames one changes this file alone. CONTRIBUTING.md tells how to check a new release.

From 5.24 on transformers says `cache` where it said `past_key_values`: in the arguments of a model, of its masks and of
`generate`, and in the fields of every output. This package says `past_key_values`, and accepts and returns both names.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from transformers import Cache
from transformers import masking_utils as _masking_utils
from transformers.activations import ACT2FN
from transformers.generation.streamers import BaseStreamer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs
from transformers.utils.versions import require_version

__all__ = [
    "ACT2FN",
    "ALL_ATTENTION_FUNCTIONS",
    "CACHE_NAME",
    "CACHE_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "BaseModelOutputWithPast",
    "BaseStreamer",
    "CausalLMOutputWithPast",
    "ForCausalLMLoss",
    "GenericForQuestionAnswering",
    "GenericForSequenceClassification",
    "GenericForTokenClassification",
    "LlamaRotaryEmbedding",
    "can_return_tuple",
    "capture_outputs",
    "checkpoint_blocks",
    "create_causal_mask",
    "find_cache",
    "has_both_cache_names",
    "merge_with_config_defaults",
    "one_cache",
    "openai_server",
]

# the copy of this code in a checkpoint has no installer to check the version; 5.17's caches are wrong after `reset`
require_version("transformers>=5.18", "pip install --upgrade transformers")

OutputClass = TypeVar("OutputClass", bound=type)

CACHE_NAMES = ("past_key_values", "cache")
"""The names under which a cache is given and returned."""
CACHE_NAME = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)
"""The name that the installed transformers uses."""


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache that was given under one of its two names.

    Raises:
        ValueError: if both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("give the cache as past_key_values or as cache, not as both")
    return cache if past_key_values is None else past_key_values


def checkpoint_blocks(model: Any, options: dict[str, Any]) -> None:
    """Let the blocks of a model of transformers compute their activations again in the backward pass.

    From 5.24 on transformers calls it activation checkpointing.

    Args:
        model: of transformers.
        options: of `torch.utils.checkpoint.checkpoint`.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def find_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """Return the cache among the keyword arguments of a call."""
    return one_cache(*(arguments.get(name) for name in CACHE_NAMES))


def has_both_cache_names(output_class: OutputClass) -> OutputClass:
    """Make the cache in the outputs of a class readable under both names; the class extends one of transformers."""
    for name in CACHE_NAMES:
        if not hasattr(output_class, name):
            setattr(output_class, name, property(lambda output: getattr(output, CACHE_NAME)))
    return output_class


def openai_server() -> Any:
    """Return the class behind `transformers serve`, which needs packages of its own; making an instance runs it."""
    from transformers.cli.serve import Serve

    return Serve


def create_causal_mask(*, past_key_values: Any, **arguments: Any) -> Any:
    """Return the mask that hides the future and padding, in the format of the attention function."""
    return _masking_utils.create_causal_mask(**arguments, **{CACHE_NAME: past_key_values})
