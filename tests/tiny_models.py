"""Tiny models with weights that matter, and batches with every kind of row, for the tests of the model.

GPT-2's initialization is so small that a wrong mask hardly moves a logit; here all weights and biases are large.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.configuration import ADAPTIVE, POSITION_ENCODINGS

NUM_TEXT_TOKENS = 20
EOS = 19
META = 20
PAD = 21
VOCAB_SIZE = 24
MAX_LENGTH = 64
# that a logit adds one after another: two attentions and an MLP in each of two layers, and the head
NUM_TERMS = 2 * (2 * (32 + 8 + 32) + 32 + 48) + 32

ENCODINGS = POSITION_ENCODINGS
PLAIN_SCORES = tuple(encoding for encoding in ENCODINGS if encoding not in ADAPTIVE)
"""Those whose scores follow from queries, keys and a mask."""
BACKENDS = ("sdpa", "eager")
MEMBERS: dict[str, dict[str, Any]] = {
    "meta": {},
    "all": {"meta_attention_over": "all"},
    "random": {"meta_attention_over": "random", "random_ratio": 0.4},
    "cross": {"meta_attention_over": "cross"},
    "gather": {"meta_attention_over": "gather"},
}
"""Who takes part in meta-attention."""


def tiny_config(**changes: Any) -> MetaTokenConfig:
    """Return the config of two layers of width 32 with four heads, changed where the test says so."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "meta_token_id": META,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": EOS,
        "attn_implementation": "sdpa",
    }
    return MetaTokenConfig(**{**fields, **changes})


def tiny_model(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    model_class: type[MetaTokenForCausalLM] = MetaTokenForCausalLM,
    **changes: Any,
) -> MetaTokenForCausalLM:
    """Return a model in evaluation mode; equal arguments give equal weights.

    In float64, unless a test is about another dtype: so no comparison depends on the order in which one machine's
    kernels add.
    """
    model = model_class(tiny_config(**changes))
    return randomize(model, seed).to(dtype).eval()


shared_model = cache(tiny_model)
"""The same, made once for equal arguments: for tests that change nothing about it."""


def randomize(model: torch.nn.Module, seed: int = 0) -> Any:
    """Draw every weight and bias anew, by its name, so that none is zero or one; returns the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)) + 7919 * seed)
            scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + scale * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(*rows: str, seed: int = 0) -> Tensor:
    """Return ids (B, T) of rows drawn as text: "_" a meta-token, "." padding, else a random text token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, EOS, (len(rows), len(rows[0])), generator=generator)
    for row, picture in enumerate(rows):
        assert len(picture) == len(rows[0])
        for column, character in enumerate(picture):
            ids[row, column] = {"_": META, ".": PAD}.get(character, int(ids[row, column]))
    return ids


def attention_mask_of(ids: Tensor) -> Tensor:
    """Return (B, T) int64, 0 at padding."""
    return (ids != PAD).long()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradient of each parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare to an absolute and relative tolerance."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def pictures(ids: Sequence[Sequence[int]]) -> list[str]:
    """Return rows of ids drawn as by `tokens`, for messages."""
    return ["".join({META: "_", PAD: "."}.get(i, "x") for i in row) for row in ids]
