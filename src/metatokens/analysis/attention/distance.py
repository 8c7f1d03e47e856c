"""How far back attention looks, at meta-tokens and at others: its mass by distance, exact, no row ever stored."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from metatokens.analysis.attention.rows import StratifiedQueries, observe_attention
from metatokens.analysis.inputs.documents import Document
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Array, Lines, Rows, measure, rows_over
from metatokens.lens.lens import AttentionCall, Lens


def distance_profile(call: AttentionCall, *, is_meta: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the mean attention mass by distance, (2, B, H, bins) float64: on other keys, and on meta keys.

    Bin 0 is the token itself, bin b > 0 the distances 2^(b-1) to 2^b - 1. The mean is over the rows that see a key.

    Args:
        call: The attention.
        is_meta: (B or 1, T) bool, True at meta keys.
        rows: (Q,) rising indices of the queries to look at; None takes all.
    """
    batch, num_heads, num_tokens, _ = call.query_BHTD.shape
    device = call.query_BHTD.device
    positions = torch.arange(num_tokens, device=device)
    num_bins = 2 + int(math.log2(max(1, num_tokens - 1)))
    total = torch.zeros(2, batch, num_heads, num_bins, dtype=torch.float64, device=device)
    num_rows = torch.zeros(batch, 1, 1, dtype=torch.float64, device=device)
    for scores, visible, chosen in call.score_blocks(rows=rows):
        num_keys = scores.shape[-1]
        weights = torch.nan_to_num(torch.where(visible, scores, -torch.inf).softmax(-1)).double()
        distance = (chosen[:, None] - positions[:num_keys]).clamp(min=0)
        bins = torch.where(distance > 0, 1 + torch.log2(distance.clamp(min=1).double()).long(), 0)
        index = bins.expand_as(weights).flatten(2)
        meta = is_meta[:, None, None, :num_keys]
        for kind, members in enumerate((~meta, meta)):
            total[kind].scatter_add_(2, index, (weights * members).flatten(2))
        num_rows += visible.any(-1)[:, :1].sum(-1, keepdim=True)
    return total / num_rows


@measure("attention", "1", axes=("layer", "to", "distance"), plot=Lines("distance", by="to", panels="layer"))
def mass_by_distance(inputs: Inputs) -> Rows:
    """Attention mass, mean over heads, on keys from a distance up to the next one; 0 is the token itself."""
    queries = StratifiedQueries(inputs.config.queries, inputs.config.seed)
    found = [_profiles_of(inputs.lens, document, queries) for document in inputs.subject.documents]
    num_bins = max(profile.shape[-1] for profile in found)
    padded = np.stack([np.pad(profile, ((0, 0), (0, 0), (0, num_bins - profile.shape[-1]))) for profile in found])
    distances = [0, *(2**power for power in range(num_bins - 1))]
    axes = range(padded.shape[1]), ("text", "meta-tokens"), distances
    yield from rows_over(padded, *axes, names=("layer", "to", "distance"))


def _profiles_of(lens: Lens, document: Document, queries: StratifiedQueries) -> Array:
    """Return the profiles of the layers, (L, 2, bins), mean over heads."""
    rows = queries.draw(document.input_ids.shape[1])
    profiles: list[Tensor] = []

    def look(call: AttentionCall) -> None:
        profiles.append(distance_profile(call, is_meta=document.is_meta, rows=rows)[:, 0].mean(1))

    observe_attention(lens, document.input_ids, look)
    return torch.stack(profiles).numpy(force=True)
