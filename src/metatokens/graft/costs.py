"""What a graft takes, computed from the model's config: operations and memory of a training step, bytes of the cache.

The memory of a step is an estimate that no measurement has checked: weights, new parameters with gradients and
moments, what the backward pass keeps, and a chunk of logits. The framework's own share is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metatokens.config.grafting import GraftRunConfig
from metatokens.graft.grafting import graft_of
from metatokens.graft.spreading import policy_of
from metatokens.model.accounting import CacheBytes
from metatokens.model.loss import LOGITS_CHUNK_ELEMENTS
from metatokens.model.memory import CHUNK, count_columns

FLOAT32_BYTES = 4
TRAINED_BYTES = 16  # a float32 weight, its gradient and AdamW's two moments


@dataclass(frozen=True)
class _Shape:
    """Sizes of a decoder, under whatever names its config has."""

    layers: int
    width: int
    inner: int
    queries: int
    """Heads times head size."""
    keys: int
    """Key heads times head size."""
    vocab_size: int
    matrix_weights: int
    """Weights of all blocks' matrices."""
    meta_weights: int
    """Weights of meta-attention, of all blocks."""


def step_flops(model: Any, config: GraftRunConfig) -> int:
    """Count the operations of a training step on one block of text.

    Frozen matrices have no gradients of their own, so the backward pass does as much as the forward pass. Attention is
    counted over all pairs that causality allows, even where a window is seen; the change of low rank and the few
    answers to needles are left out, and so are the three rotations of compact positions. The weights of meta-attention
    have gradients, so its backward pass does twice as much as its forward pass.
    """
    shape = _shape_of(model)
    text, columns = config.data.block_size, config.data.block_size + config.anchors_per_block
    head = 2 * shape.width * shape.vocab_size
    flops = 2 * (_forward_flops(shape, columns) + (config.objectives.language_model > 0) * text * head)
    if config.objectives.distillation:
        # both logits are made twice, and those of the model go back once
        flops += _forward_flops(shape, text) + config.sampled_positions * head * 5
    if shape.meta_weights:
        anchors = config.kept_per_block
        flops += 3 * (2 * anchors * shape.meta_weights + _attention_flops(shape, anchors))
    return flops


def step_memory(model: Any, config: GraftRunConfig) -> dict[str, int]:
    """Estimate the bytes on a GPU at the peak of a training step, by purpose; the model may be on the meta device."""
    shape, rows = _shape_of(model), config.training.micro_batch_blocks
    columns = config.data.block_size + config.anchors_per_block
    added = sum(parameter.numel() for parameter in graft_of(model).parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    is_narrow = "bfloat16" in (config.training.precision, config.base_dtype)
    narrow = 2 if is_narrow else FLOAT32_BYTES
    if is_narrow and config.base_dtype == "float32":
        weights += 2 * shape.matrix_weights  # autocast keeps a copy for the backward pass
    # inputs of both norms, four of the attention, three of the MLP, and the keys and values that each chunk visits
    graft = config.graft
    visited = (graft.window + CHUNK + graft.num_sinks + config.kept_per_block // 2) / CHUNK
    of_block = 2 * FLOAT32_BYTES * shape.width + narrow * (4 * shape.queries + 3 * shape.inner)
    of_block += int(2 * narrow * shape.queries * visited)
    blocks = shape.layers * of_block
    # of meta-attention: input and output of the norm; queries, keys, values and what they give; matrices cast
    of_anchor = (FLOAT32_BYTES + narrow) * shape.width + narrow * 5 * shape.queries if shape.meta_weights else 0
    of_anchors = config.kept_per_block * shape.layers * of_anchor
    if config.training.gradient_checkpointing:
        blocks = of_block + shape.layers * narrow * shape.width
        of_anchors //= shape.layers
    copies = 2 * shape.meta_weights if is_narrow else 0
    return {
        "weights": weights,
        "new_parameters": added * TRAINED_BYTES,
        "activations": rows * (columns * (blocks + 2 * FLOAT32_BYTES * shape.width) + of_anchors) + copies,
        "logits": 4 * FLOAT32_BYTES * LOGITS_CHUNK_ELEMENTS,
    }


def cache_bytes(model: Any, *, num_text: int, bytes_per_number: int = FLOAT32_BYTES) -> CacheBytes:
    """Count the bytes of the cache of one text after a step.

    Args:
        model: grafted.
        num_text: tokens read, without padding.
        bytes_per_number: 4 for float32, 2 for half precision.
    """
    shape, config = _shape_of(model), graft_of(model).config
    per_column = 2 * shape.layers * shape.keys * bytes_per_number
    num_anchors = max(num_text // config.every - config.num_sinks // config.every, 0)
    num_meta = num_anchors if config.anchors == "meta" else 0
    of_text, of_anchors = count_columns(policy_of(config), num_text + num_meta, num_meta)
    members = num_anchors if shape.meta_weights else 0
    if config.memory_limit is not None:
        members = min(members, config.memory_limit)
    return CacheBytes(per_column * of_text, per_column * of_anchors, per_column * members)


def _forward_flops(shape: _Shape, columns: int) -> int:
    return 2 * columns * shape.matrix_weights + _attention_flops(shape, columns)


def _attention_flops(shape: _Shape, columns: int) -> int:
    return shape.layers * 2 * 2 * shape.queries * (columns * (columns + 1) // 2)


def _shape_of(model: Any) -> _Shape:
    config, added = model.config, graft_of(model)
    matrices: list[Any] = [matrix for _, matrix in added.family.matrices_of(model.base_model)]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=config.num_attention_heads * head_size,
        keys=(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size,
        vocab_size=config.vocab_size,
        matrix_weights=sum(matrix.weight.numel() for matrix in matrices),
        meta_weights=sum(parameter.numel() for parameter in added.meta_attn.parameters()),
    )
