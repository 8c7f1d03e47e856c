"""What text attends to in a grafted model: its anchors, its first tokens and its window, and how far back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Array, Lines, Rows, measure, rows_over
from metatokens.errors import UsageError
from metatokens.graft.grafting import graft_of

KINDS = ("anchors", "sinks", "window")
_NAME = "metatokens_observed"


@contextmanager
def observed(model: Any, look: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand the attention weights (B, H, W, W) of each layer to a function, in their order; W counts anchors too.

    Raises:
        UsageError: attention that does not go through transformers' interface by one mask.
    """
    added = graft_of(model)
    if added.family.own_mask or added.config.positions == "compact":
        raise UsageError(
            "attention to anchors",
            expected='attention through the interface of transformers, by positions "text"',
            found=f'{model.config.model_type} by positions "{added.config.positions}"',
            remedy="the other measures of a graft do not need it",
        )

    def attend(
        _: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = (scores + mask).softmax(-1, dtype=torch.float32)
        look(weights)
        return (weights.to(value.dtype) @ value).transpose(1, 2), None

    AttentionInterface.register(_NAME, attend)
    own, model.config._attn_implementation = model.config._attn_implementation, _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = own


@measure(
    "graft", "1", axes=("layer", "to", "distance"), subject="graft", plot=Lines("distance", by="to", panels="layer")
)
@torch.no_grad()
def anchor_attention(inputs: Inputs) -> Rows:
    """Attention mass of late tokens, mean over heads, on keys from a distance in text up to the next one."""
    found = np.stack([_profiles(inputs, document.input_ids) for document in inputs.subject.documents])
    distances = [0, *(2**power for power in range(found.shape[-1] - 1))]
    yield from rows_over(found, range(found.shape[1]), KINDS, distances, names=("layer", "to", "distance"))


def _profiles(inputs: Inputs, input_ids: Tensor) -> Array:
    """Return the mass of one document, (L, kinds, bins)."""
    added = graft_of(inputs.model)
    window, first, profiles = added.config.window, inputs.first_lost, []
    num_bins = 2 + int(math.log2(input_ids.shape[1] - 1))

    def look(weights: Tensor) -> None:
        assert added.spread is not None
        tokens = added.spread.tokens
        clock = tokens.clock[0]
        rows = (tokens.is_text[0] & (clock >= first)).nonzero()[:, 0]
        distance = (clock[rows][:, None] - clock).clamp(min=0)
        is_sink = tokens.is_sink[0].expand_as(distance)
        is_near = tokens.is_text[0] & (distance < window) & ~is_sink
        bins = torch.where(distance > 0, 1 + torch.log2(distance.clamp(min=1).double()).long(), 0)
        mass = weights[0, :, rows].double().mean(0)
        total = mass.new_zeros(len(KINDS), num_bins)
        for kind, members in enumerate((~is_sink & ~is_near, is_sink, is_near)):
            total[kind].scatter_add_(0, bins.flatten(), (mass * members).flatten())
        profiles.append((total / len(rows)).numpy(force=True))

    with observed(inputs.model, look):
        inputs.model.base_model(input_ids.to(inputs.model.device), use_cache=False)
    return np.stack(profiles)
