"""Texts longer or shorter than a model's window: which models read beyond it, and where they put the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def reads_beyond_its_window(model: Any) -> bool:
    """Tell whether a model can compute positions beyond its window; not under scaling that depends on the window."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    encoding = getattr(model.config, "position_encoding", "learned")
    is_bounded = encoding == "learned" or getattr(model.config, "position_range", None) is not None
    return not is_bounded and rope.get("rope_type") != "dynamic"


@contextmanager
def window_of(model: Any, positions: int) -> Iterator[None]:
    """Set a model's window to `positions` if it is shorter and the model can read beyond it."""
    window = getattr(model.config, "max_position_embeddings", None)
    if window is None or window >= positions or not reads_beyond_its_window(model):
        yield
        return
    with _set_window(model, positions):
        yield


@contextmanager
def texts_of(model: Any, positions: int) -> Iterator[None]:
    """Let a model with `position_range` spread texts of up to `positions` tokens over its range, as in training.

    Outside, it spreads texts of its window over the range, so the tokens of a shorter one stand closer together than
    draws put them on average. Nothing changes for other models.
    """
    if getattr(model.config, "position_range", None) is None or positions > model.config.max_position_embeddings:
        yield
        return
    with _set_window(model, positions):
        yield


@contextmanager
def _set_window(model: Any, positions: int) -> Iterator[None]:
    window = model.config.max_position_embeddings
    model.config.max_position_embeddings = positions
    try:
        yield
    finally:
        model.config.max_position_embeddings = window
