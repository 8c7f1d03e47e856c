"""How far back attention looks, at meta-tokens and at others: its mass by distance, exact, no row ever stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metatokens.analysis.attention.rows import (
    StratifiedQueries,
    check_plain_softmax,
    mask_of,
    members_of,
    observe_attention,
    rows_of,
    score_blocks,
)
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Lines, Rows, measure, rows_over
from metatokens.lens.layout import Branch
from metatokens.lens.lens import AttentionCall, Lens


def distance_profile(
    query_BHQD: Tensor,
    key_BHKD: Tensor,
    *,
    scaling: float,
    is_meta: Tensor,
    columns: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the mean attention mass by distance, (2, B, H, bins) float64: on other keys, and on meta keys.

    Bin 0 is the token itself, bin b > 0 the distances 2^(b-1) to 2^b - 1. Distances are counted in `columns` (B, T), by
    default 0..T-1; tokens at -1 are none. The mean is over the rows that see a key; the other arguments are those of
    `row_statistics`.
    """
    batch, num_heads, num_tokens, _ = query_BHQD.shape
    device = query_BHQD.device
    columns = torch.arange(num_tokens, device=device)[None] if columns is None else columns
    columns, is_meta = columns.expand(batch, -1), is_meta.expand(batch, -1)
    num_bins = 2 + int(math.log2(max(1, int(columns.max()))))
    total = torch.zeros(2, batch, num_heads, num_bins, dtype=torch.float64, device=device)
    num_rows = torch.zeros(batch, 1, 1, dtype=torch.float64, device=device)
    for scores, visible, chosen in score_blocks(query_BHQD, key_BHKD, scaling=scaling, mask=mask, rows=rows):
        keys = columns[:, None, : scores.shape[-1]]
        queries = columns[:, chosen, None]
        seen = visible & ((keys >= 0) & (queries >= 0))[:, None]
        weights = torch.nan_to_num(torch.where(seen, scores, -torch.inf).softmax(-1)).double()
        distance = (queries - keys).clamp(min=0)
        bins = torch.where(distance > 0, 1 + torch.log2(distance.clamp(min=1).double()).long(), 0)
        index = bins[:, None].expand_as(weights).flatten(2)
        meta = is_meta[:, None, None, : scores.shape[-1]]
        for kind, members in enumerate((~meta, meta)):
            total[kind].scatter_add_(2, index, (weights * members).flatten(2))
        num_rows += seen.any(-1)[:, :1].sum(-1, keepdim=True)
    return total / num_rows


def distance_profiles(
    lens: Lens,
    input_ids: Tensor,
    *,
    is_meta: Tensor,
    branches: Sequence[Branch] = ("attn", "meta_attn"),
    queries: StratifiedQueries | None = None,
    **inputs: Any,
) -> dict[tuple[int, Branch], Tensor]:
    """Return `distance_profile` of every attention of a model; the arguments are those of `attention_statistics`.

    Distances are in tokens of the whole sequence in both branches. Rows of padding do not count.
    """
    check_plain_softmax(lens)
    is_token: Tensor = inputs.get("attention_mask", torch.ones_like(input_ids)) != 0
    found: dict[tuple[int, Branch], Tensor] = {}

    def look(call: AttentionCall) -> None:
        is_real = (call.columns >= 0) & is_token.gather(1, call.columns.clamp(min=0))
        found[call.layer, call.branch] = distance_profile(
            call.query_BHTD,
            call.key_BHTD,
            scaling=call.scaling,
            is_meta=members_of(call, is_meta),
            columns=torch.where(is_real, call.columns, -1),
            mask=mask_of(call),
            rows=rows_of(call, queries),
        )

    observe_attention(lens, look, branches, input_ids, inputs)
    return found


@measure("attention", "1", axes=("layer", "to", "distance"), plot=Lines("distance", by="to", panels="layer"))
def mass_by_distance(inputs: Inputs) -> Rows:
    """Attention mass, mean over heads, on keys from a distance up to the next one; 0 is the token itself."""
    queries = StratifiedQueries(inputs.config.queries, inputs.config.seed)
    found = []
    for document in inputs.subject.documents:
        profiles = distance_profiles(
            inputs.lens, document.input_ids, is_meta=document.is_meta, branches=("attn",), queries=queries
        )
        # (layers, kinds, bins), mean over heads
        found.append(np.stack([profile[:, 0].mean(1).numpy(force=True) for profile in profiles.values()]))
    num_bins = max(profile.shape[-1] for profile in found)
    padded = np.stack([np.pad(profile, ((0, 0), (0, 0), (0, num_bins - profile.shape[-1]))) for profile in found])
    distances = [0, *(2**power for power in range(num_bins - 1))]
    axes = range(padded.shape[1]), ("text", "meta-tokens"), distances
    yield from rows_over(padded, *axes, names=("layer", "to", "distance"))
