"""What a training step of a graft takes, computed from the model's config: operations, and memory on one GPU.

The memory is an estimate that no measurement has checked: weights, new parameters with gradients and moments, what the
backward pass keeps, and a chunk of logits. The framework's own share is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metatokens.config.grafting import GraftRunConfig
from metatokens.graft.grafting import graft_of
from metatokens.model.loss import LOGITS_CHUNK_ELEMENTS
from metatokens.model.memory import CHUNK

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
    vocab_size: int
    matrix_weights: int
    """Weights of all blocks' matrices."""


def step_flops(model: Any, config: GraftRunConfig) -> int:
    """Count the operations of a training step on one block of text.

    Frozen matrices have no gradients of their own, so the backward pass does as much as the forward pass. Attention is
    counted over all pairs that causality allows, even where a window is seen; the change of low rank and the few
    answers to needles are left out, and so are the three rotations of compact positions.
    """
    shape = _shape_of(model)
    text, columns = config.data.block_size, config.data.block_size + config.anchors_per_block
    head = 2 * shape.width * shape.vocab_size
    flops = 2 * (_forward_flops(shape, columns) + (config.objectives.language_model > 0) * text * head)
    if config.objectives.distillation:
        # both logits are made twice, and those of the model go back once
        flops += _forward_flops(shape, text) + config.sampled_positions * head * 5
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
    if config.training.gradient_checkpointing:
        blocks = of_block + shape.layers * narrow * shape.width
    return {
        "weights": weights,
        "new_parameters": added * TRAINED_BYTES,
        "activations": rows * columns * (blocks + 2 * FLOAT32_BYTES * shape.width),
        "logits": 4 * FLOAT32_BYTES * LOGITS_CHUNK_ELEMENTS,
    }


def _forward_flops(shape: _Shape, columns: int) -> int:
    pairs = columns * (columns + 1) // 2
    return 2 * columns * shape.matrix_weights + shape.layers * 2 * 2 * shape.queries * pairs


def _shape_of(model: Any) -> _Shape:
    config = model.config
    matrices: list[Any] = [matrix for _, matrix in graft_of(model).family.matrices_of(model.base_model)]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        queries=config.num_attention_heads * head_size,
        vocab_size=config.vocab_size,
        matrix_weights=sum(matrix.weight.numel() for matrix in matrices),
    )
