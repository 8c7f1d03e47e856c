"""What the meta-tokens' embedding does to attention: the same documents with it and without, row by row.

Each document is run twice, as it is and under an intervention (the paper's: the embedding zeroed), at the same places.
Differences are paired by layer, head and query, and averaged over the queries from the first meta-token on; the
document is the unit of all that follows. The same two runs are held against the sharpening theorem
(`metatokens.analysis.theory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.attention_statistics import (
    RowStatistics,
    StratifiedQueries,
    check_plain_softmax,
    mask_of,
    row_statistics,
)
from metatokens.analysis.lens import AttentionCall, Lens
from metatokens.analysis.theory import RowAudit, audit_rows, critical_boost, key_boosts
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import Intervention, intervene

Array = npt.NDArray[np.float64]
ROW_METRICS = ("entropy", "entropy_drop", "log_odds_boost", "max_score_boost", "meta_mass", "meta_lift")
SAMPLED_EDGES = 40
"""Edges to meta keys that each document and layer leaves for the theorem's scatter plot."""


@dataclass(frozen=True)
class Document:
    """One text or one instance of a task, as the model reads it."""

    name: str
    input_ids: Tensor
    """(1, T) int64, meta-tokens among them."""
    is_meta: Tensor
    """(1, T) bool."""


@dataclass(frozen=True)
class AttentionEffects:
    """Means over the queries of a document, (documents, layers, heads) each."""

    entropy: Array
    """With the meta-tokens' embedding, nats."""
    entropy_drop: Array
    """Without minus with, nats (A8)."""
    log_odds_boost: Array
    """ln P / (1 - P) on meta keys, with minus without, nats (A5)."""
    max_score_boost: Array
    """Largest score, with minus without, logits (A6): not free of a common shift."""
    meta_mass: Array
    meta_lift: Array
    edges: Array
    """(documents, layers, 4): edges to meta keys, of these with x >= 0 in the ablated run, boosted, and boosted beyond
    the critical boost."""
    changes: Array
    """(documents, layers, 7): rows, sum of the change y of H, of y^2, of the mechanism's change m, of (y - m)^2, rows
    where y and m have the same sign, and rows where neither is 0."""
    points: Array
    """(n, 4) sampled edges: layer, margin x, boost, critical boost."""


def attention_effects(
    lens: Lens,
    documents: Sequence[Document],
    *,
    ablation: Intervention,
    queries: StratifiedQueries,
    token_counts: npt.ArrayLike | None = None,
) -> AttentionEffects:
    """Measure both runs of every document.

    Args:
        lens: of the model.
        documents: each with at least one meta-token that a later query can see.
        ablation: what is taken away from the meta-tokens.
        queries: which rows of a document are looked at; those before its first meta-token are left out.
        token_counts: see `intervene`.

    Raises:
        UsageError: a document without such a meta-token, or attention that is no softmax of its scores.
    """
    check_plain_softmax(lens)
    effects, edges, changes, points = [], [], [], []
    for number, document in enumerate(documents):
        rows = _rows_behind_a_meta_token(document, queries)
        calls_with = _calls(lens, document)
        with intervene(lens.model, [ablation], token_counts):
            calls_without = _calls(lens, document)
        pairs = list(zip(calls_without, calls_with, strict=True))
        effects.append(np.stack([_effects_of_layer(*pair, document, rows) for pair in pairs], axis=1))
        audits = [_audit(*pair, document, rows) for pair in pairs]
        edges.append([_edge_counts(audit) for audit, _ in audits])
        changes.append([_change_sums(audit) for audit, _ in audits])
        points += [
            _sample(layer, sampled, queries.seed + number) for layer, (_, sampled) in enumerate(audits) if len(sampled)
        ]
    means = np.stack(effects, axis=1)  # (metrics, documents, layers, heads)
    return AttentionEffects(
        **dict(zip(ROW_METRICS, means, strict=True)),
        edges=np.array(edges),
        changes=np.array(changes),
        points=np.concatenate(points),
    )


def _rows_behind_a_meta_token(document: Document, queries: StratifiedQueries) -> Tensor:
    num_tokens = document.input_ids.shape[1]
    places = document.is_meta[0].nonzero()[:, 0]
    rows = queries.draw(num_tokens)
    rows = rows[rows >= places[0]] if len(places) else rows[:0]
    if not len(rows):
        raise UsageError(
            f"document {document.name}",
            expected="a meta-token that a query can see",
            found=f"{len(places)} meta-tokens in {num_tokens} tokens",
            remedy="inject more of them, or take longer documents",
        )
    return rows


def _calls(lens: Lens, document: Document) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with lens.observe(lambda call: calls.append(call) if call.branch == "attn" else None):
        lens(document.input_ids, use_cache=False)
    return calls


def _effects_of_layer(without: AttentionCall, full: AttentionCall, document: Document, rows: Tensor) -> Array:
    """Return (metrics, heads)."""
    before, after = (_statistics(call, document, rows) for call in (without, full))
    assert before.max_score is not None
    assert after.max_score is not None
    per_row = (
        after.entropy,
        before.entropy - after.entropy,
        after.meta_log_odds - before.meta_log_odds,
        after.max_score - before.max_score,
        after.meta_mass,
        after.meta_lift,
    )
    # a row that sees meta keys alone has no log-odds
    return np.stack([torch.nanmean(_finite(values)[0].double(), dim=-1).numpy() for values in per_row])


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, torch.nan)


def _statistics(call: AttentionCall, document: Document, rows: Tensor) -> RowStatistics:
    return row_statistics(
        call.query_BHTD,
        call.key_BHTD,
        scaling=call.scaling,
        is_meta=document.is_meta,
        mask=mask_of(call),
        rows=rows,
    )


def _audit(without: AttentionCall, full: AttentionCall, document: Document, rows: Tensor) -> tuple[RowAudit, Tensor]:
    """Return the audit of a layer, and (n, 3) its known edges: margin, boost, critical boost."""
    scores, visible = zip(*(_scores(call, rows) for call in (without, full)), strict=True)
    audit = audit_rows(*scores, visible=visible[0], is_meta=document.is_meta)
    boosts = key_boosts(*scores, visible=visible[0])
    known = (visible[0] & document.is_meta[:, None, None, :]).expand(boosts.boost.shape)
    known = known & boosts.margin.isfinite() & boosts.boost.isfinite()
    margin, boost, competitors = (values[known] for values in (boosts.margin, boosts.boost, boosts.competitors))
    return audit, torch.stack([margin, boost, critical_boost(margin, competitors.clamp(min=1))], dim=-1)


def _scores(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    scores = call.query_BHTD[:, :, rows].double() @ call.key_BHTD.double().transpose(-1, -2) * call.scaling
    visible = (torch.arange(scores.shape[-1]) <= rows[:, None])[None, None]
    mask = mask_of(call)
    if mask is None:
        return scores, visible
    if mask.dtype == torch.bool:
        return scores, visible & mask[:, :, rows]
    return scores + mask[:, :, rows], visible & (mask[:, :, rows] > torch.finfo(mask.dtype).min / 2)


def _edge_counts(audit: RowAudit) -> list[float]:
    return [float(n.sum()) for n in (audit.num_edges, audit.num_above, audit.num_boosted, audit.num_beyond)]


def _change_sums(audit: RowAudit) -> list[float]:
    change, mechanism = -audit.drop, audit.entropy_mechanism
    moved = (change != 0) & (mechanism != 0)
    agree = moved & (change.sign() == mechanism.sign())
    sums = (change, change**2, mechanism, (change - mechanism) ** 2, agree, moved)
    return [float(change.numel()), *(float(values.sum()) for values in sums)]


def _sample(layer: int, edges: Tensor, seed: int) -> Array:
    generator = torch.Generator().manual_seed(seed)
    chosen = edges[torch.randperm(len(edges), generator=generator)[:SAMPLED_EDGES]].numpy()
    return np.concatenate([np.full((len(chosen), 1), layer), chosen], axis=1)
