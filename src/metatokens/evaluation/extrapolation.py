"""Reading beyond a model's window: which models can, and how."""

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
    model.config.max_position_embeddings = positions
    try:
        yield
    finally:
        model.config.max_position_embeddings = window
