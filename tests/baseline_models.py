"""Tiny models of `metatokens.baselines`, built like those of `tiny_models`."""

from typing import Any

import torch

from metatokens.baselines.landmark import LandmarkConfig, LandmarkForCausalLM
from metatokens.baselines.masks import SparseAttentionConfig, SparseAttentionForCausalLM
from metatokens.baselines.recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM
from metatokens.model import MetaTokenForCausalLM
from tiny_models import randomize, tiny_config

PATTERNS: dict[str, dict[str, Any]] = {
    "sliding_window": {"kind": "sliding_window", "window": 4},
    "alternating": {"kind": "sliding_window", "window": 3, "layers": "odd"},
    "blockwise": {"kind": "blockwise", "window": 6},
    "longformer": {"kind": "longformer", "window": 3, "num_global_tokens": 2, "meta_tokens_are_global": False},
    "longformer_meta": {"kind": "longformer", "window": 2, "num_global_tokens": 1, "meta_tokens_are_global": True},
    "bigbird": {
        "kind": "bigbird",
        "block_size": 2,
        "window_blocks": 2,
        "num_global_blocks": 1,
        "num_random_blocks": 1,
        "seed": 3,
    },
}
RECURRENCES: dict[str, dict[str, Any]] = {
    "block_recurrent": {"kind": "block_recurrent", "window": 3, "num_state_vectors": 5, "recurrent_layer": 1},
    "block_recurrent_dual": {
        "kind": "block_recurrent",
        "window": 2,
        "num_state_vectors": 3,
        "recurrent_layer": 0,
        "gates": "dual",
    },
}
BASELINES = (*PATTERNS, *RECURRENCES, "landmark")


def baseline_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """Return a model in evaluation mode; `changes` are fields of its config."""
    shape = {key: value for key, value in tiny_config().to_dict().items() if key in SHAPE}
    if changes.get("position_encoding", "rope") != "rope":
        shape.pop("rope_parameters")
    shape = {**shape, "attn_implementation": "sdpa", **changes}
    model: MetaTokenForCausalLM
    if name == "landmark":
        model = LandmarkForCausalLM(LandmarkConfig(**shape))
    elif name in RECURRENCES:
        model = BlockRecurrentForCausalLM(BlockRecurrentConfig(attention_pattern=RECURRENCES[name], **shape))
    else:
        model = SparseAttentionForCausalLM(SparseAttentionConfig(attention_pattern=PATTERNS[name], **shape))
    return randomize(model, seed).to(dtype).eval()


SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "meta_token_id",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "rope_parameters",
)
