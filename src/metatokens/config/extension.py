"""A longer window for a trained model: the extended shape, and the configuration of the training that follows.

Only RoPE has frequencies to scale; a model with xPos reads on by blocks of half its window (`BlockwiseAttention`). A
model that was extended before can be extended further by the same method: the factors multiply, and the trained window
stays the first one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from metatokens.config.attention import BlockwiseAttention, FullAttention
from metatokens.config.loading import load_preset, override
from metatokens.config.schema import Injection, ModelConfig, NoScaling, PretrainConfig
from metatokens.errors import UsageError

ExtensionMethod = Literal["yarn", "linear", "dynamic", "blockwise"]
EXTENDABLE = (
    "rope (by yarn, linear or dynamic) or xpos (by blockwise); alibi, t5 and none need no scaling, fourier has its "
    "frequencies from the window, learned positions have no more rows"
)
"""The position encodings that can be extended, for messages."""


def extend_model(model: ModelConfig, method: ExtensionMethod, factor: float) -> ModelConfig:
    """Return the shape of a model whose window is `factor` times as long.

    For YaRN, the trained window is the `max_position_embeddings` of the model before any extension. Dynamic scaling
    keeps that number, since transformers takes it for the trained window; `max_sequence_length` gives the new window.
    Blockwise attention takes it for the window of the pattern.

    Raises:
        UsageError: a position encoding without frequencies, a factor that extends nothing, or another method on top of
            the one that extended the model before.
    """
    needed = "xpos" if method == "blockwise" else "rope"
    if model.position_range is not None:
        raise UsageError(
            "model.position_range",
            expected="off, since positions that were randomised over a range end there",
            found=str(model.position_range),
            remedy="train with model.max_position_embeddings of the longest text",
        )
    if model.position_encoding != needed:
        raise UsageError(
            "position encoding of the model",
            expected=EXTENDABLE,
            found=model.position_encoding,
            remedy=f"extend a model with {needed}",
        )
    if not (math.isfinite(factor) and factor > 1):
        raise UsageError(
            "--factor", expected="more than 1", found=f"{factor:g}", remedy="write `--factor 4` or, as the paper too, 8"
        )
    if method == "blockwise":
        return _read_by_blocks(model, factor)
    before = model.rope_scaling
    if isinstance(before, NoScaling):
        scaling = {"kind": method, "factor": factor}
        if method == "yarn":
            scaling["original_max_position_embeddings"] = model.max_position_embeddings
    elif before.kind == method:
        scaling = {**before.model_dump(), "factor": before.factor * factor}
    else:
        raise UsageError(
            f"--method {method}",
            expected=f"{before.kind}, which extended the model before",
            found=method,
            remedy=f"extend it further by {before.kind}, or start from the model that was not extended",
        )
    window = model.max_position_embeddings * (1 if method == "dynamic" else factor)
    changes = {"rope_scaling": scaling, "max_position_embeddings": int(window)}
    return ModelConfig.model_validate({**model.model_dump(), **changes})


def _read_by_blocks(model: ModelConfig, factor: float) -> ModelConfig:
    """Return the shape of a model that reads by blocks of half its window."""
    attention, window = model.attention, model.max_position_embeddings
    if isinstance(attention, FullAttention) and window % 2 == 0:
        attention = BlockwiseAttention(window=window)
    if not isinstance(attention, BlockwiseAttention):
        raise UsageError(
            "--method blockwise",
            expected="full attention, and a window of two blocks",
            found=f"{attention.kind} attention and a window of {window}",
            remedy="extend a model with full attention whose window is even",
        )
    changes = {"attention": attention.model_dump(), "max_position_embeddings": int(window * factor)}
    return ModelConfig.model_validate({**model.model_dump(), **changes})


def extension_config(
    preset: str | Path,
    *,
    start_from: Path,
    model: ModelConfig,
    injection: Injection | None = None,
    overrides: Sequence[str] = (),
) -> PretrainConfig:
    """Return the continued training of an extended model on blocks of its whole window.

    Args:
        preset: gives the optimizer, the schedule and the number of steps; its model is not used.
        start_from: folder of the trained weights.
        model: the extended shape, from `extend_model`.
        injection: how the model was pre-trained; None takes the preset's.
        overrides: as in `load_preset`, applied last.

    Raises:
        UsageError: for an unknown preset or key, or settings that do not agree.
    """
    config = load_preset(preset)
    changes = {
        "start_from": start_from,
        "model": model,
        "data": config.data.model_copy(update={"block_size": model.max_sequence_length}),
        "injection": injection or config.injection,
    }
    return override(config.model_copy(update=changes), overrides, origin="extend")
