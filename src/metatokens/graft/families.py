"""The architectures that can be grafted: an entry says where their blocks are and which matrices they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from metatokens.errors import UsageError


@dataclass(frozen=True)
class Family:
    """What a graft must know of an architecture."""

    blocks: str
    """Name of the list of blocks in the decoder."""
    matrices: tuple[str, ...]
    """Names of a block's matrices: modules that map (B, T, in) to (B, T, out)."""
    local_window: Callable[[Any], int | None] = lambda _: None
    """Of a block: how far back its attention sees, counted by a mask of its own over columns; None means no such."""
    norm: str = "norm"
    """Name in the decoder of the norm in front of the head."""
    own_mask: str = ""
    """Name in a block of the module that has this mask as `bias`."""
    around_attention: tuple[str, str, str] | None = None
    """Names in a block of the norm in front of its attention, of the attention, and of the norm behind their sum, for
    meta-attention; None means that there is nothing between attention and feed-forward part, which run side by side."""

    def blocks_of(self, decoder: Any) -> list[Any]:
        """Return the blocks."""
        return list(getattr(decoder, self.blocks))

    def matrices_of(self, decoder: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield every matrix with its name in the decoder."""
        for index, block in enumerate(self.blocks_of(decoder)):
            for name in self.matrices:
                yield f"{self.blocks}.{index}.{name}", block.get_submodule(name)


def _window_of_gpt_neo(block: Any) -> int | None:
    attention = block.attn.attention
    return int(attention.config.window_size) if attention.attention_type == "local" else None


_LLAMA = Family(
    "layers",
    (
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    around_attention=("input_layernorm", "self_attn", "post_attention_layernorm"),
)
_GPT2_BLOCK = ("ln_1", "attn", "ln_2")
FAMILIES = {
    "llama": _LLAMA,  # SmolLM and SmolLM2 too
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gpt2": Family(
        "h",
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        norm="ln_f",
        around_attention=_GPT2_BLOCK,
    ),
    "gpt_neo": Family(
        "h",
        (*(f"attn.attention.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.c_fc", "mlp.c_proj"),
        norm="ln_f",
        local_window=_window_of_gpt_neo,
        own_mask="attn.attention",
        around_attention=_GPT2_BLOCK,
    ),
    "gpt_neox": Family(
        "layers",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        norm="final_layer_norm",
    ),
}
"""By the `model_type` of the config."""


def family_of(model: Any) -> Family:
    """Return the family of a model.

    Raises:
        UsageError: it cannot be grafted.
    """
    config = model.config
    found = None
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if config.is_encoder_decoder:
        found = "an encoder-decoder"
    elif config.model_type not in FAMILIES:
        found = f"the architecture {config.model_type}"
    elif kinds or getattr(config, "sliding_window", None) is not None:
        found = f"layers that see less than the past ({', '.join(sorted(kinds)) or 'a sliding window'})"
    elif getattr(config, "add_cross_attention", False):
        found = "cross-attention"
    elif getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        found = "quantised weights"
    elif config._attn_implementation not in ("sdpa", "eager"):
        found = f"attention by {config._attn_implementation}"
    if found is not None:
        raise UsageError(
            type(model).__name__,
            expected=f"a decoder of {', '.join(FAMILIES)}, not quantised, with full attention by sdpa or eager",
            found=found,
            remedy="load another model, or this one with attn_implementation sdpa and without quantisation",
        )
    return FAMILIES[config.model_type]


def check_compact(model: Any) -> None:
    """Refuse a model whose positions cannot be counted anew.

    Raises:
        UsageError: they are no rotation, one that some blocks leave out, or one that depends on the length.
    """
    rotation = getattr(model.base_model, "rotary_emb", None)
    found = None
    if rotation is None:
        found = f"the positions of {model.config.model_type}"
    elif not all(getattr(model.config, "no_rope_layers", None) or [1]):
        found = "layers without positions"
    elif rotation.rope_type in ("dynamic", "longrope"):
        found = f"rotation of the type {rotation.rope_type}, which depends on the length"
    if found is not None:
        raise UsageError(
            'positions "compact"', expected="a decoder with RoPE", found=found, remedy='graft with positions "text"'
        )


def check_meta_attention(model: Any) -> None:
    """Refuse a model without a place for meta-attention.

    Raises:
        UsageError: attention and feed-forward part of its blocks run side by side.
    """
    if FAMILIES[model.config.model_type].around_attention is None:
        fitting = (name for name, family in FAMILIES.items() if family.around_attention is not None)
        raise UsageError(
            "meta_attention true",
            expected=f"blocks whose parts follow one another, such as those of {', '.join(fitting)}",
            found=f"those of {model.config.model_type}",
            remedy="graft without meta_attention",
        )
