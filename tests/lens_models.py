"""Models that the lens must know, with weights that matter, and a batch whose rows hold different meta-tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from metatokens.lens.activations import AttentionCall
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM

VOCABULARY, META = 50, 48
NUM_LAYERS, NUM_HEADS, WIDTH = 3, 2, 16


def build(**changes: Any) -> MetaTokenForCausalLM:
    torch.manual_seed(0)
    config = MetaTokenConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": NUM_HEADS,
            "max_position_embeddings": 64,
            "meta_token_id": META,
            "attn_implementation": "sdpa",
        }
        | changes
    )
    model = MetaTokenForCausalLM(config).eval()
    enlarge(model)
    return model


def enlarge(model: nn.Module) -> None:
    """Make random weights large enough that attention is far from uniform, and float64.

    So no comparison depends on the order in which one machine's kernels add.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.double()


def sample_ids(rows: int = 2, tokens: int = 12) -> Tensor:
    ids = torch.randint(0, META, (rows, tokens), generator=torch.Generator().manual_seed(1))
    ids[0, [2, 5, 9]] = META
    ids[1:, [1, 7]] = META
    return ids


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=NUM_LAYERS, n_head=NUM_HEADS, n_positions=64, **changes
    )
    model = GPT2LMHeadModel(config).eval()
    enlarge(model)
    return model


def gpt_neo() -> GPTNeoForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=NUM_HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    )
    model = GPTNeoForCausalLM(config).eval()
    enlarge(model)
    return model


OURS = {
    "rope": {},
    "learned": {"position_encoding": "learned"},
    "alibi": {"position_encoding": "alibi"},
    "none": {"position_encoding": "none"},
    "all": {"meta_attention_over": "all"},
    "random": {"meta_attention_over": "random", "random_ratio": 0.4},
    "one layer": {"meta_attention_layers": [1]},
    "eager": {"attn_implementation": "eager"},
}
MODELS = {name: (lambda changes=changes: build(**changes)) for name, changes in OURS.items()} | {
    "gpt2": gpt2,
    "gpt-neo": gpt_neo,
}


def attention_call(query: Tensor, key: Tensor, *, scaling: float = 1.0, mask: Tensor | None = None) -> AttentionCall:
    """Return what a self-attention with these queries and keys, (B, H, T, D), is about to compute."""
    columns = torch.arange(query.shape[2]).expand(len(query), -1)
    return AttentionCall(0, "attn", query, key, mask, scaling, columns)


def assert_untouched(model: nn.Module) -> None:
    """Check that no module has a hook or an attribute of its own in place of a method."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not [name for name, value in vars(module).items() if callable(value) and hasattr(type(module), name)]
