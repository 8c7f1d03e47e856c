"""What the meta-tokens' embedding does to attention: the same documents with it and without, row by row.

Each document is run twice, as it is and under an intervention (the paper's: the embedding zeroed), at the same places.
Differences are paired by layer, head and query, and averaged over the queries from the first meta-token on; the
document is the unit of all that follows. The same two runs are held against the sharpening theorem
(`metatokens.analysis.attention.theorem`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.attention.rows import (
    RowStatistics,
    StratifiedQueries,
    check_plain_softmax,
    mask_of,
    observe_attention,
    row_statistics,
    score_blocks,
)
from metatokens.analysis.attention.theorem import KeyBoosts, RowAudit, audit_rows, critical_boost
from metatokens.analysis.inputs.documents import Document
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import HeadMaps, Lines, Row, Rows, measure, over_layers_and_heads
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import Intervention, ZeroEmbedding, intervene
from metatokens.lens.lens import AttentionCall, Lens

Array = npt.NDArray[np.float64]
ROW_METRICS = (
    *("entropy", "entropy_drop", "log_odds_boost", "max_score_boost", "meta_mass", "meta_lift"),
    *("effective_keys", "entropy_without_sink"),
)
AUDITED_SCORES = 2**19
"""Scores at a time in the audit, which holds about twenty float64 arrays of them: 80 MB."""
SAMPLED_EDGES = 40
"""Edges to meta keys that each document and layer leaves for the theorem's scatter plot."""


@dataclass(frozen=True)
class AttentionEffects:
    """Means over the queries of a document, (documents, layers, heads) each."""

    entropy: Array
    """With the meta-tokens' embedding, nats."""
    entropy_drop: Array
    """Without minus with, nats."""
    log_odds_boost: Array
    """ln P / (1 - P) on meta keys, with minus without, nats."""
    max_score_boost: Array
    """Largest score, with minus without, logits: not free of a common shift."""
    meta_mass: Array
    meta_lift: Array
    effective_keys: Array
    """e^H."""
    entropy_without_sink: Array
    """Of the row without its first key, nats."""
    edges: Array
    """(documents, layers, 4): edges to meta keys, of these with x >= 0 in the ablated run, boosted, and boosted beyond
    the critical boost."""
    changes: Array
    """(documents, layers, 7): rows, sum of the change y of H, of y^2, of the mechanism's change m, of (y - m)^2, rows
    where y and m have the same sign, and rows where neither is 0."""
    points: Array
    """(n, 4) sampled edges: layer, margin x, boost, critical boost."""

    def spread(self, places: Sequence[int], num_documents: int) -> AttentionEffects:
        """Return the same with the documents at their places among all, NaN at the others."""

        def place(values: Array) -> Array:
            placed = np.full((num_documents, *values.shape[1:]), np.nan)
            placed[list(places)] = values
            return placed

        arrays = {field.name: place(getattr(self, field.name)) for field in fields(self) if field.name != "points"}
        return replace(self, **arrays)


def attention_effects(
    lens: Lens,
    documents: Sequence[Document],
    *,
    ablation: Intervention,
    queries: StratifiedQueries,
) -> AttentionEffects:
    """Measure both runs of every document.

    Args:
        lens: of the model.
        documents: each with at least one meta-token that a later query can see.
        ablation: what is taken away from the meta-tokens.
        queries: which rows of a document are looked at; those before its first meta-token are left out.

    Raises:
        UsageError: a document without such a meta-token, or attention that is no softmax of its scores.
    """
    check_plain_softmax(lens)
    found = []
    for number, document in enumerate(documents):
        rows = _checked_rows(document, queries)
        with intervene(lens.model, [ablation]):
            without = _keep_calls(lens, document)
        found.append(_compare_runs(lens, document, without, rows, seed=queries.seed + number))
    means, edges, changes = (
        np.stack([[getattr(layer, name) for layer in layers] for layers in found])
        for name in ("means", "edges", "changes")
    )
    points = [
        np.insert(layer.points.numpy(), 0, number, axis=1) for layers in found for number, layer in enumerate(layers)
    ]
    return AttentionEffects(
        **dict(zip(ROW_METRICS, np.moveaxis(means, 2, 0), strict=True)),
        edges=edges,
        changes=changes,
        points=np.concatenate(points),
    )


@dataclass(frozen=True)
class _LayerEffects:
    """What a layer of one document leaves; the rows of `AttentionEffects`."""

    means: Array
    """(metrics, heads)."""
    edges: Array
    changes: Array
    points: Tensor
    """(n, 3): margin, boost, critical boost."""


def rows_behind_a_meta_token(document: Document, queries: StratifiedQueries) -> Tensor:
    """Return the sampled queries of a document that see a meta-token, rising; none where there is no such query."""
    places = document.is_meta[0].nonzero()[:, 0]
    rows = queries.draw(document.input_ids.shape[1])
    return rows[rows >= places[0]] if len(places) else rows[:0]


def _checked_rows(document: Document, queries: StratifiedQueries) -> Tensor:
    rows = rows_behind_a_meta_token(document, queries)
    if not len(rows):
        raise UsageError(
            f"document {document.name}",
            expected="a meta-token that a query can see",
            found=f"{int(document.is_meta.sum())} meta-tokens in {document.input_ids.shape[1]} tokens",
            remedy="inject more of them, sample more queries, or take longer documents",
        )
    return rows


def _keep_calls(lens: Lens, document: Document) -> dict[int, AttentionCall]:
    """Return the queries and keys of each layer of a run: 50 MB a layer at 8,192 tokens of width 768."""
    calls: dict[int, AttentionCall] = {}
    observe_attention(lens, lambda call: calls.update({call.layer: call}), ("attn",), document.input_ids, {})
    return calls


def _compare_runs(
    lens: Lens, document: Document, without: dict[int, AttentionCall], rows: Tensor, *, seed: int
) -> list[_LayerEffects]:
    """Run a document as it is, and hold each layer against that of the ablated run, which is dropped."""
    layers: list[_LayerEffects] = []

    def compare(full: AttentionCall) -> None:
        ablated = without.pop(full.layer)
        means = _effects_of_layer(ablated, full, document, rows)
        layers.append(_LayerEffects(means, *_audit(ablated, full, document, rows, seed=seed)))

    observe_attention(lens, compare, ("attn",), document.input_ids, {})
    return layers


def _effects_of_layer(without: AttentionCall, full: AttentionCall, document: Document, rows: Tensor) -> Array:
    """Return (metrics, heads)."""
    before, after = (_statistics(call, document, rows) for call in (without, full))
    per_row = (
        after.entropy,
        before.entropy - after.entropy,
        after.meta_log_odds - before.meta_log_odds,
        after.max_score - before.max_score,
        after.meta_mass,
        after.meta_lift,
        after.effective_keys,
        after.entropy_without_sink,
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


def _audit(
    without: AttentionCall, full: AttentionCall, document: Document, rows: Tensor, *, seed: int
) -> tuple[Array, Array, Tensor]:
    """Return the edges, changes and points of a layer."""
    blocks = (
        score_blocks(
            call.query_BHTD,
            call.key_BHTD,
            scaling=call.scaling,
            mask=mask_of(call),
            rows=rows,
            block_scores=AUDITED_SCORES,
        )
        for call in (without, full)
    )
    edges, changes = np.zeros(4), np.zeros(7)
    points = torch.zeros(0, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for (before, visible, _), (after, _, _) in zip(*blocks, strict=True):
        audit = audit_rows(before, after, visible=visible, is_meta=document.is_meta[:, : before.shape[-1]])
        edges += _edge_counts(audit)
        changes += _change_sums(audit)
        points = _sample(points, audit.boosts, generator)
    _, margin, boost, competitors = points.T
    return edges, changes, torch.stack([margin, boost, critical_boost(margin, competitors)], dim=-1)


def _edge_counts(audit: RowAudit) -> Array:
    counts = (audit.num_edges, audit.num_above, audit.num_boosted, audit.num_beyond)
    return np.array([float(count.sum()) for count in counts])


def _change_sums(audit: RowAudit) -> Array:
    change, mechanism = -audit.drop, audit.entropy_mechanism
    moved = (change != 0) & (mechanism != 0)
    agree = moved & (change.sign() == mechanism.sign())
    sums = (change, change**2, mechanism, (change - mechanism) ** 2, agree, moved)
    return np.array([float(change.numel()), *(float(values.sum()) for values in sums)])


def _sample(points: Tensor, boosts: KeyBoosts, generator: torch.Generator) -> Tensor:
    """Return those of the points so far and of new edges that drew the smallest numbers: a fair sample of all.

    Args:
        points: (n, 4) the number drawn, margin, boost, competitors.
        boosts: of new edges.
        generator: draws the numbers.
    """
    known = boosts.is_known
    edges = torch.stack([values[known].cpu() for values in (boosts.margin, boosts.boost, boosts.competitors)], dim=-1)
    drawn = torch.rand(len(edges), 1, generator=generator, dtype=torch.float64)
    points = torch.cat([points, torch.cat([drawn, edges], dim=-1)])
    return points[points[:, 0].argsort()[:SAMPLED_EDGES]]


# Measures --------------------------------------------------------------------------------------------------------


@shared
def effects_of(inputs: Inputs) -> AttentionEffects:
    """Return the effects of the embedding on all documents, NaN at those without a meta-token that a query sees."""
    queries = StratifiedQueries(inputs.config.queries, inputs.config.seed)
    documents = inputs.subject.documents
    usable = [number for number, one in enumerate(documents) if len(rows_behind_a_meta_token(one, queries))]
    if len(usable) < len(documents):
        inputs.skip(f"attention: {len(documents) - len(usable)} documents have no meta-token that a query sees")
    chosen = [documents[number] for number in usable]
    effects = attention_effects(inputs.lens, chosen, ablation=ZeroEmbedding(), queries=queries)
    inputs.keep("theory_points", effects.points.astype(np.float32))
    return effects.spread(usable, len(documents))


@measure("attention", "nats", axes=("layer", "head"), plot=HeadMaps())
def entropy(inputs: Inputs) -> Rows:
    """Entropy of an attention row behind the first meta-token, mean over the rows of a document."""
    yield from over_layers_and_heads(effects_of(inputs).entropy)


@measure("attention", "nats", axes=("layer", "head"), test=True, keep=True, plot=HeadMaps())
def entropy_drop(inputs: Inputs) -> Rows:
    """Entropy of an attention row with the meta-tokens' embedding zeroed minus with it, the same row."""
    yield from over_layers_and_heads(effects_of(inputs).entropy_drop)


@measure("attention", "nats", axes=("layer", "head"), test=True, keep=True, plot=HeadMaps())
def log_odds_boost(inputs: Inputs) -> Rows:
    """Log-odds ln P / (1 - P) of the mass P on meta keys, with their embedding minus with it zeroed."""
    yield from over_layers_and_heads(effects_of(inputs).log_odds_boost)


@measure("attention", "logits", axes=("layer", "head"), test=True, plot=HeadMaps())
def max_score_boost(inputs: Inputs) -> Rows:
    """Largest score of a row, with the embedding minus with it zeroed; not free of a common shift of all scores."""
    yield from over_layers_and_heads(effects_of(inputs).max_score_boost)


@measure("attention", "1", axes=("layer", "head"), keep=True, plot=HeadMaps())
def meta_mass(inputs: Inputs) -> Rows:
    """Attention mass on meta keys."""
    yield from over_layers_and_heads(effects_of(inputs).meta_mass)


@measure("attention", "ratio", axes=("layer", "head"), plot=HeadMaps())
def meta_lift(inputs: Inputs) -> Rows:
    """Attention mass on meta keys over their share of the visible keys."""
    yield from over_layers_and_heads(effects_of(inputs).meta_lift)


@measure("attention", "keys", axes=("layer", "head"), plot=HeadMaps())
def effective_keys(inputs: Inputs) -> Rows:
    """e^entropy: over how many keys a uniform row would have the same entropy."""
    yield from over_layers_and_heads(effects_of(inputs).effective_keys)


@measure("attention", "nats", axes=("layer", "head"), plot=HeadMaps())
def entropy_without_sink(inputs: Inputs) -> Rows:
    """Entropy of a row without its first key."""
    yield from over_layers_and_heads(effects_of(inputs).entropy_without_sink)


@measure("attention", "1", axes=("layer",), statistic="ratio", plot=Lines("layer"))
def share_above(inputs: Inputs) -> Rows:
    """Share of the edges to meta keys with a margin x >= 0 once the embedding is zeroed: the theorem's premise."""
    yield from _by_layer(effects_of(inputs).edges, lambda edges: edges[:, [1, 0]])


@measure("attention", "1", axes=("layer",), statistic="ratio", plot=Lines("layer"))
def share_beyond(inputs: Inputs) -> Rows:
    """Share of the boosted edges whose boost exceeds the critical one, so that it alone lowers the row's entropy."""
    yield from _by_layer(effects_of(inputs).edges, lambda edges: edges[:, [3, 2]])


@measure("attention", "nats", axes=("layer",), statistic="ratio", plot=Lines("layer"))
def entropy_change(inputs: Inputs) -> Rows:
    """Change of a row's entropy, with the embedding minus with it zeroed."""
    yield from _by_layer(effects_of(inputs).changes, lambda changes: changes[:, [1, 0]])


@measure("attention", "nats", axes=("layer",), statistic="ratio", plot=Lines("layer"))
def entropy_change_by_meta_logits(inputs: Inputs) -> Rows:
    """Change of a row's entropy that the logits of its meta keys make by themselves."""
    yield from _by_layer(effects_of(inputs).changes, lambda changes: changes[:, [3, 0]])


@measure("attention", "1", axes=("layer",), statistic="r_squared", plot=Lines("layer"))
def mechanism_r_squared(inputs: Inputs) -> Rows:
    """R^2 over rows of the whole change of entropy by the change that the meta keys' logits make."""
    yield from _by_layer(effects_of(inputs).changes, lambda changes: changes[:, [0, 1, 2, 4]])


@measure("attention", "1", axes=("layer",), statistic="ratio", plot=Lines("layer"))
def sign_agreement(inputs: Inputs) -> Rows:
    """Share of rows in which both changes have one sign, of those where neither is 0."""
    yield from _by_layer(effects_of(inputs).changes, lambda changes: changes[:, [5, 6]])


def _by_layer(counts: Array, columns: Callable[[Array], Array]) -> Iterator[Row]:
    """Yield the rows of columns of (documents, layers, counts): of each layer, and of all together."""
    for layer in range(counts.shape[1]):
        yield Row({"layer": layer}, columns(counts[:, layer]))
    yield Row({}, columns(counts.sum(axis=1)))
