"""Output heads and states of known size, and a GPT-2, for the tests of what a state says through the model's head."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from metatokens.analysis.representations.logits import OutputHead
from tiny_models import randomize


def random_states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_head(vocabulary: int = 9, width: int = 6, *, bias: bool = False) -> OutputHead:
    gain, norm_bias = 1 + 0.3 * random_states(width, seed=1), random_states(width, seed=2)
    head_bias = random_states(vocabulary, seed=4) if bias else None
    return OutputHead(gain, norm_bias, 1e-5, random_states(vocabulary, width, seed=3), head_bias)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model: GPT2LMHeadModel = randomize(GPT2LMHeadModel(config)).double().eval()
    return model
