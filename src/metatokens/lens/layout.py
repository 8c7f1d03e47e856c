"""Where the parts of a model are: one description for ours, GPT-2 and GPT-Neo, and one for all that can be grafted.

The lens reads and changes activations through it and knows no model class itself. Raw Hugging Face weights stay as
they are; nothing is folded, centred or copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers import GPT2LMHeadModel, GPTNeoForCausalLM, PreTrainedModel

from metatokens.errors import UsageError
from metatokens.graft.families import FAMILIES
from metatokens.graft.grafting import NAME as GRAFT
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.compatibility import CACHE_NAME
from metatokens.model.configuration import CROSS

Branch = Literal["attn", "meta_attn"]
"""The causal self-attention of a block, or its meta-attention."""

PROJECTION_TAPS = ("hook_q", "hook_k", "hook_v")
ROTATED_TAPS = {"hook_q": "hook_rot_q", "hook_k": "hook_rot_k"}
ATTENTION_TAPS = (*PROJECTION_TAPS, *ROTATED_TAPS.values(), "hook_z")


@dataclass(frozen=True)
class AttentionSite:
    """One attention of one block."""

    layer: int
    branch: Branch
    module: nn.Module
    """Its forward takes the mask, and its first result is what the residual stream receives."""
    projections: tuple[nn.Module, ...]
    """Of queries, keys and values, in the order in which they run; one module where they are fused."""
    output: nn.Module
    """The output projection."""
    num_heads: int
    head_dim: int
    scaling: float
    """What a product of query and key is multiplied by."""
    mask_argument: tuple[int, str]
    """Place and name of the mask, or of the pack that holds it, among the arguments of `module`."""
    cache_argument: tuple[int, str]
    """Place and name of the cache."""
    rotary_argument: tuple[int, str] | None = None
    """Place and name of the `Rotary`, or of the pack that holds it; None where queries and keys stay as projected."""
    window: int | None = None
    """Sliding-window size, for layers that apply it outside of the mask; None means no window."""
    taps: tuple[str, ...] = ATTENTION_TAPS
    """Those that it has. Without the rotated ones, its scores cannot be observed."""

    @property
    def prefix(self) -> str:
        """What the names of its taps begin with."""
        return f"blocks.{self.layer}.{self.branch}"

    @property
    def output_tap(self) -> str:
        """Name of the tap of what it adds to the residual stream."""
        return f"blocks.{self.layer}.{'hook_attn_out' if self.branch == 'attn' else 'hook_meta_out'}"


@dataclass(frozen=True)
class BlockSite:
    """One block."""

    block: nn.Module
    attentions: tuple[AttentionSite, ...]
    mlp_norm: nn.Module | None
    """The norm before the feed-forward part; its input is the middle of the residual stream. None: it has no middle."""
    mlp: nn.Module


@dataclass(frozen=True)
class Layout:
    """The parts of a causal language model."""

    blocks: tuple[BlockSite, ...]
    final_norm: nn.Module
    head: nn.Module
    """Gives the logits."""

    @property
    def meta_layers(self) -> list[int]:
        """The layers that have meta-attention."""
        return [site.layer for block in self.blocks for site in block.attentions if site.branch == "meta_attn"]

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Every tap, in the order of firing."""
        names = ["embed.hook_embed"]
        for layer, site in enumerate(self.blocks):
            names.append(f"blocks.{layer}.hook_resid_pre")
            for attention in site.attentions:
                names += [f"{attention.prefix}.{tap}" for tap in attention.taps]
                names.append(attention.output_tap)
            middle = () if site.mlp_norm is None else ("hook_resid_mid",)
            names += [f"blocks.{layer}.{tap}" for tap in (*middle, "hook_mlp_out", "hook_resid_post")]
        return (*names, "ln_final.hook_normalized", "unembed.hook_logits")


def describe_layout(model: PreTrainedModel) -> Layout:
    """Return where the parts of a model are.

    Raises:
        UsageError: A class that is not known, or dual cross-attention.
    """
    for known, describe in _DESCRIPTIONS.items():
        if isinstance(model, known):
            found = describe(model)
            return _follow_graft(found) if hasattr(model, GRAFT) else found
    if isinstance(model, PreTrainedModel) and model.config.model_type in FAMILIES and model.get_output_embeddings():
        return _of_family(model)
    raise UsageError(
        "model",
        expected=f"{', '.join(known.__name__ for known in _DESCRIPTIONS)}, or a decoder of {', '.join(FAMILIES)}",
        found=type(model).__name__,
        remedy="pass one of these; a PEFT wrapper has its model in get_base_model(), a PretrainedCausalLM in wrapped",
    )


def _of_ours(model: Any) -> Layout:
    if model.config.meta_attention_over in CROSS and any(layer.meta_attn for layer in model.model.layers):
        raise UsageError(
            "model",
            expected="a meta-attention that is one attention, over meta, all or random",
            found=f"meta_attention_over {model.config.meta_attention_over}, which is two",
            remedy="look at another arm; the lens does not read this one",
        )
    blocks = []
    for layer, block in enumerate(model.model.layers):
        modules: list[tuple[Branch, Any]] = [("attn", block.self_attn), ("meta_attn", block.meta_attn)]
        attentions = tuple(
            AttentionSite(
                layer=layer,
                branch=branch,
                module=module,
                projections=(module.q_proj, module.k_proj, module.v_proj),
                output=module.o_proj,
                num_heads=model.config.num_attention_heads,
                head_dim=module.head_dim,
                scaling=module.scaling,
                mask_argument=(2, "mask") if branch == "attn" else (1, "pack"),
                cache_argument=(3 if branch == "attn" else 2, "past_key_values"),
                rotary_argument=(1, "rotary") if branch == "attn" else (1, "pack"),
            )
            for branch, module in modules
            if module is not None
        )
        blocks.append(BlockSite(block, attentions, block.post_attention_layernorm, block.mlp))
    return Layout(tuple(blocks), model.model.norm, model.lm_head)


def _of_gpt2(model: Any) -> Layout:
    if model.config.add_cross_attention:
        raise UsageError(
            "model", expected="a decoder", found="GPT-2 with cross-attention", remedy="load it without an encoder"
        )
    blocks = []
    for layer, block in enumerate(model.transformer.h):
        module = block.attn
        site = AttentionSite(
            layer=layer,
            branch="attn",
            module=module,
            projections=(module.c_attn,),
            output=module.c_proj,
            num_heads=module.num_heads,
            head_dim=module.head_dim,
            scaling=module.scaling,
            mask_argument=(2, "attention_mask"),
            cache_argument=(1, CACHE_NAME),
        )
        blocks.append(BlockSite(block, (site,), block.ln_2, block.mlp))
    return Layout(tuple(blocks), model.transformer.ln_f, model.lm_head)


def _of_gpt_neo(model: Any) -> Layout:
    blocks = []
    for layer, block in enumerate(model.transformer.h):
        module = block.attn.attention
        site = AttentionSite(
            layer=layer,
            branch="attn",
            module=module,
            projections=(module.q_proj, module.k_proj, module.v_proj),
            output=module.out_proj,
            num_heads=module.num_heads,
            head_dim=module.head_dim,
            scaling=1.0,  # GPT-Neo does not scale its logits
            mask_argument=(1, "attention_mask"),
            cache_argument=(2, "layer_past"),
            window=model.config.window_size if module.attention_type == "local" else None,
        )
        blocks.append(BlockSite(block, (site,), block.ln_2, block.mlp))
    return Layout(tuple(blocks), model.transformer.ln_f, model.lm_head)


def _of_family(model: Any) -> Layout:
    """Describe a decoder by what a graft knows of it; it rotates queries and keys where nobody can look."""
    family, decoder, config = FAMILIES[model.config.model_type], model.base_model, model.config
    blocks = []
    *names_in, name_out = (name for name in family.matrices if not name.startswith("mlp."))
    for layer, block in enumerate(family.blocks_of(decoder)):
        module = block.get_submodule(name_out.rpartition(".")[0])
        site = AttentionSite(
            layer=layer,
            branch="attn",
            module=module,
            projections=tuple(block.get_submodule(name) for name in names_in),
            output=block.get_submodule(name_out),
            num_heads=config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            scaling=module.scaling,
            mask_argument=(1, "attention_mask"),
            cache_argument=(2, CACHE_NAME),
            # one matrix for all three has them head by head
            taps=(*(PROJECTION_TAPS if len(names_in) > 1 else ()), "hook_z"),
        )
        norm = None if family.around_attention is None else block.get_submodule(family.around_attention[2])
        blocks.append(BlockSite(block, (site,), norm, block.mlp))
    return Layout(tuple(blocks), decoder.get_submodule(family.norm), model.get_output_embeddings())


def _follow_graft(layout: Layout) -> Layout:
    """Leave windows to the graft, which has them in its mask."""
    blocks = (
        replace(block, attentions=tuple(replace(site, window=None) for site in block.attentions))
        for block in layout.blocks
    )
    return replace(layout, blocks=tuple(blocks))


_DESCRIPTIONS = {
    MetaTokenForCausalLM: _of_ours,
    GPT2LMHeadModel: _of_gpt2,
    GPTNeoForCausalLM: _of_gpt_neo,
}
