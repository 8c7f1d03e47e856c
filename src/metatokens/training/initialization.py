"""Initialization: it builds a model from its config, with weights that depend only on the seed and on names.

Deviation: weights are a function of the seed and the module's name. Two models that share a module start with equal
weights in it: a plain model and its twin with meta-attention differ only in the meta-attention.
"""

import difflib
import hashlib

import torch

from metatokens.baselines.building import MODEL_CLASSES, build_config
from metatokens.config.schema import ModelConfig
from metatokens.errors import UsageError
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.compatibility import ACT2FN


def build_model(config: ModelConfig, *, text_vocab_size: int, eos_token_id: int, seed: int) -> MetaTokenForCausalLM:
    """Build the model of `config` in float32 on the CPU, in training mode; the global generator is left alone.

    Raises:
        UsageError: if transformers has no such activation; the config cannot check it without importing transformers.
    """
    with torch.random.fork_rng(devices=[]):
        model = _construct(config, text_vocab_size, eos_token_id)
        # children first: a sub-layer rescales the projection that its child has drawn
        for name, module in reversed(list(model.named_modules())):
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            torch.manual_seed(int.from_bytes(key[:8], "little", signed=True))
            model._init_weights(module)
    model.train()
    return model


def build_model_on_meta_device(config: ModelConfig, *, text_vocab_size: int, eos_token_id: int) -> MetaTokenForCausalLM:
    """Return the model of `config` without its weights, on the meta device; errors are those of `build_model`."""
    with torch.device("meta"):
        return _construct(config, text_vocab_size, eos_token_id)


def _construct(config: ModelConfig, text_vocab_size: int, eos_token_id: int) -> MetaTokenForCausalLM:
    if config.hidden_act not in ACT2FN:
        close = difflib.get_close_matches(config.hidden_act, ACT2FN, n=1)
        raise UsageError(
            "model.hidden_act",
            expected="the name of an activation in transformers",
            found=repr(config.hidden_act),
            remedy=f"did you mean {close[0]!r}?" if close else "try 'gelu_pytorch_tanh'",
        )
    hf_config = build_config(config, text_vocab_size=text_vocab_size, eos_token_id=eos_token_id)
    return MODEL_CLASSES[hf_config.model_type](hf_config)
