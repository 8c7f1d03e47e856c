"""Texts longer or shorter than a model's window: which models read beyond it, and where they put the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


def reads_beyond_its_window(model: Any) -> bool:
    """Tell whether a model can compute positions beyond its window; not under scaling that depends on the window."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    encoding = getattr(model.config, "position_encoding", "learned")
    is_bounded = encoding == "learned" or getattr(model.config, "position_range", None) is not None
    return not is_bounded and rope.get("rope_type") != "dynamic"


def window_of(model: Any, positions: int) -> AbstractContextManager[None]:
    """Set a model's window to `positions` if it is shorter and the model can read beyond it."""
    window = getattr(model.config, "max_position_embeddings", None)
    is_shorter = window is not None and window < positions
    return _set_window(model, positions) if is_shorter and reads_beyond_its_window(model) else nullcontext()


def texts_of(model: Any, positions: int) -> AbstractContextManager[None]:
    """Let a model with `position_range` spread texts of up to `positions` tokens over its range, as in training.

    Outside, it spreads texts of its window over the range, so the tokens of a shorter one stand closer together than
    draws put them on average. Nothing changes for other models.
    """
    has_range = getattr(model.config, "position_range", None) is not None
    fits = has_range and positions <= model.config.max_position_embeddings
    return _set_window(model, positions) if fits else nullcontext()


@contextmanager
def _set_window(model: Any, positions: int) -> Iterator[None]:
    window = model.config.max_position_embeddings
    model.config.max_position_embeddings = positions
    try:
        yield
    finally:
        model.config.max_position_embeddings = window
