"""What the meta-tokens' embedding does to attention: the same documents with it and without, row by row.

Each document is run twice: unchanged, and with the meta-tokens' embedding zeroed as in the paper. Differences are
paired by layer, head and query, and averaged over the queries from the first meta-token on; the document is the unit
of all that follows. The same two runs also test the sharpening theorem (`metatokens.analysis.attention.theorem`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from metatokens.analysis.attention.rows import StratifiedQueries, observe_attention, row_statistics
from metatokens.analysis.attention.theorem import KeyBoosts, RowAudit, audit_rows, critical_boost
from metatokens.analysis.inputs.documents import Document
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Array, HeadMaps, Lines, Row, Rows, measure, over_layers_and_heads
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import ZeroEmbedding, intervene
from metatokens.lens.lens import AttentionCall, Lens

AUDITED_SCORES = 2**19
"""Scores at a time in the audit, which holds about ten float64 arrays of them: 40 MB."""
SAMPLED_EDGES = 40
"""Edges to meta keys that each document and layer leaves for the theorem's scatter plot."""


def attention_effects(lens: Lens, documents: Sequence[Document], *, queries: StratifiedQueries) -> dict[str, Array]:
    """Compare the runs of every document with the meta-tokens' embedding and with it zeroed.

    Args:
        lens: On the model.
        documents: Those without a meta-token that a query can see are NaN.
        queries: Which rows of a document are looked at; those before its first meta-token are left out.

    Returns:
        The mean over the rows of what each measure of this module is named after, (documents, layers, heads); and

        edges     (documents, layers, 4)  edges to meta keys; of these with x >= 0 in the ablated run, boosted, and
                                          boosted beyond the critical boost
        changes   (documents, layers, 7)  rows; sums of the change y of H, of y^2, of the mechanism's change m, of
                                          (y - m)^2; rows where y and m have one sign, and rows where neither is 0
        points    (n, 4)                  sampled edges: layer, margin x, boost, critical boost

    Raises:
        UsageError: No document has such a meta-token, or attention weights are not the softmax of the scores.
    """
    found: dict[int, list[dict[str, Array]]] = {}
    for number, document in enumerate(documents):
        rows = rows_behind_a_meta_token(document, queries)
        if len(rows):
            found[number] = _compare_runs(lens, document, rows, seed=queries.seed + number)
    if not found:
        raise UsageError(
            "documents",
            expected="a meta-token that a query can see",
            found=f"none in {len(documents)} documents",
            remedy="inject more of them, sample more queries, or take longer documents",
        )
    layers = [np.insert(one.pop("points"), 0, layer, axis=1) for of in found.values() for layer, one in enumerate(of)]
    effects = {"points": np.concatenate(layers)}
    for name in next(iter(found.values()))[0]:
        values = np.stack([[layer[name] for layer in of] for of in found.values()])
        effects[name] = np.full((len(documents), *values.shape[1:]), np.nan)
        effects[name][list(found)] = values
    return effects


def rows_behind_a_meta_token(document: Document, queries: StratifiedQueries) -> Tensor:
    """Return the sampled queries of a document that see a meta-token, rising; none where there is no such query."""
    places = document.is_meta[0].nonzero()[:, 0]
    rows = queries.draw(document.input_ids.shape[1])
    return rows[rows >= places[0]] if len(places) else rows[:0]


def _compare_runs(lens: Lens, document: Document, rows: Tensor, *, seed: int) -> list[dict[str, Array]]:
    """Run a document without the embedding and unchanged, and return what differs, layer by layer.

    The queries and keys of the first run are kept until the second reaches their layer: 50 MB a layer at 8,192 tokens
    of width 768.
    """
    ablated: dict[int, AttentionCall] = {}
    layers: list[dict[str, Array]] = []

    def compare(full: AttentionCall) -> None:
        without = ablated.pop(full.layer)
        of_rows = _effects_on_rows(without, full, document.is_meta, rows)
        layers.append(of_rows | _audit(without, full, document.is_meta, rows, seed=seed))

    with intervene(lens.model, [ZeroEmbedding()]):
        observe_attention(lens, document.input_ids, lambda call: ablated.update({call.layer: call}))
    observe_attention(lens, document.input_ids, compare)
    return layers


def _effects_on_rows(without: AttentionCall, full: AttentionCall, is_meta: Tensor, rows: Tensor) -> dict[str, Array]:
    """Return means over the rows, (heads,) each."""
    before, after = (row_statistics(call, is_meta=is_meta, rows=rows) for call in (without, full))
    per_row = {
        "entropy": after.entropy,
        "sharpening": before.entropy - after.entropy,
        "log_odds_boost": after.meta_log_odds - before.meta_log_odds,
        "max_score_boost": after.max_score - before.max_score,
        "meta_mass": after.meta_mass,
        "meta_lift": after.meta_lift,
        "effective_keys": after.effective_keys,
        "entropy_without_sink": after.entropy_without_sink,
    }
    return {name: _mean_of_finite(values[0].double()).numpy() for name, values in per_row.items()}


def _mean_of_finite(values: Tensor) -> Tensor:
    """Return the mean over the last axis; a row that sees meta keys alone has no finite log-odds."""
    return torch.nanmean(torch.where(values.isfinite(), values, torch.nan), dim=-1)


def _audit(
    without: AttentionCall, full: AttentionCall, is_meta: Tensor, rows: Tensor, *, seed: int
) -> dict[str, Array]:
    """Return the edges, the changes and the points, (n, 3), of a layer."""
    blocks = (call.score_blocks(rows=rows, block_scores=AUDITED_SCORES) for call in (without, full))
    edges, changes = np.zeros(4), np.zeros(7)
    points = torch.zeros(0, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for (before, visible, _), (after, _, _) in zip(*blocks, strict=True):
        audit = audit_rows(before, after, visible=visible, is_meta=is_meta[:, : before.shape[-1]])
        edges += _edge_counts(audit.boosts)
        changes += _change_sums(audit)
        points = _sample(points, audit.boosts, generator)
    _, margin, boost, competitors = points.T
    critical = critical_boost(margin, competitors)
    return {"edges": edges, "changes": changes, "points": torch.stack([margin, boost, critical], dim=-1).numpy()}


def _edge_counts(boosts: KeyBoosts) -> Array:
    # comparisons with NaN are False, so an unknown edge counts nowhere
    return _sums(boosts.is_known, boosts.margin >= 0, boosts.boost > 0, boosts.is_beyond)


def _change_sums(audit: RowAudit) -> Array:
    change, mechanism = audit.entropy_with - audit.entropy_without, audit.mechanism
    moved = (change != 0) & (mechanism != 0)
    agree = moved & (change.sign() == mechanism.sign())
    return _sums(torch.ones_like(change), change, change**2, mechanism, (change - mechanism) ** 2, agree, moved)


def _sums(*values: Tensor) -> Array:
    return np.array([float(one.sum()) for one in values])


def _sample(points: Tensor, boosts: KeyBoosts, generator: torch.Generator) -> Tensor:
    """Return those of the points so far and of new edges that drew the smallest numbers: a fair sample of all.

    Args:
        points: (n, 4) the number drawn, margin, boost, competitors.
        boosts: Of new edges.
        generator: Draws the numbers.
    """
    known = boosts.is_known
    edges = torch.stack([values[known].cpu() for values in (boosts.margin, boosts.boost, boosts.competitors)], dim=-1)
    drawn = torch.rand(len(edges), 1, generator=generator, dtype=torch.float64)
    points = torch.cat([points, torch.cat([drawn, edges], dim=-1)])
    return points[points[:, 0].argsort()[:SAMPLED_EDGES]]


# Measures --------------------------------------------------------------------------------------------------------


@shared
def effects_of(inputs: Inputs) -> Mapping[str, Array]:
    """Return the effects of the embedding on all documents, NaN at those without a meta-token that a query sees.

    In a narrow model this takes more than ten forward passes: each score of the two runs is looked at in float64, by
    about ten operations, and heads of few dimensions make a score with as few.
    """
    queries = StratifiedQueries(inputs.config.queries, inputs.config.seed)
    effects = attention_effects(inputs.lens, inputs.subject.documents, queries=queries)
    left_out = int(np.isnan(effects["edges"]).all(axis=(1, 2)).sum())
    if left_out:
        inputs.skip(f"attention: {left_out} documents have no meta-token that a query sees")
    inputs.arrays["theory_points"] = effects["points"].astype(np.float32)
    return effects


@measure("attention", "nats", axes=("layer", "head"), plot=HeadMaps())
def entropy(inputs: Inputs) -> Rows:
    """Entropy of an attention row after the first meta-token, mean over the rows of a document."""
    yield from over_layers_and_heads(effects_of(inputs)["entropy"])


@measure(
    "attention",
    "nats",
    axes=("layer", "head"),
    test=True,
    keep=True,
    plot=HeadMaps(),
    positive="the meta-tokens' embedding sharpens the row",
)
def sharpening(inputs: Inputs) -> Rows:
    """Entropy of an attention row with the meta-tokens' embedding zeroed minus with it, the same row."""
    yield from over_layers_and_heads(effects_of(inputs)["sharpening"])


@measure(
    "attention",
    "nats",
    axes=("layer", "head"),
    test=True,
    keep=True,
    plot=HeadMaps(),
    positive="the meta-tokens' embedding draws attention to them",
)
def log_odds_boost(inputs: Inputs) -> Rows:
    """Log-odds ln P / (1 - P) of the mass P on meta keys, with their embedding minus with it zeroed."""
    yield from over_layers_and_heads(effects_of(inputs)["log_odds_boost"])


@measure("attention", "logits", axes=("layer", "head"), test=True, plot=HeadMaps(), positive="the embedding raises it")
def max_score_boost(inputs: Inputs) -> Rows:
    """Largest score of a row, with the embedding minus with it zeroed; not free of a common shift of all scores."""
    yield from over_layers_and_heads(effects_of(inputs)["max_score_boost"])


@measure("attention", "1", axes=("layer", "head"), keep=True, plot=HeadMaps())
def meta_mass(inputs: Inputs) -> Rows:
    """Attention mass on meta keys."""
    yield from over_layers_and_heads(effects_of(inputs)["meta_mass"])


@measure("attention", "ratio", axes=("layer", "head"), plot=HeadMaps())
def meta_lift(inputs: Inputs) -> Rows:
    """Attention mass on meta keys over their share of the visible keys."""
    yield from over_layers_and_heads(effects_of(inputs)["meta_lift"])


@measure("attention", "keys", axes=("layer", "head"), plot=HeadMaps())
def effective_keys(inputs: Inputs) -> Rows:
    """e^entropy: over how many keys a uniform row would have the same entropy."""
    yield from over_layers_and_heads(effects_of(inputs)["effective_keys"])


@measure("attention", "nats", axes=("layer", "head"), plot=HeadMaps())
def entropy_without_sink(inputs: Inputs) -> Rows:
    """Entropy of a row without its first key."""
    yield from over_layers_and_heads(effects_of(inputs)["entropy_without_sink"])


@measure("attention", "1", axes=("layer",), statistic="ratio", plot=Lines("layer"))
def share_above(inputs: Inputs) -> Rows:
    """Share of the edges to meta keys with a margin x >= 0 once the embedding is zeroed: the theorem's premise."""
    yield from _by_layer(effects_of(inputs)["edges"], lambda edges: edges[:, [1, 0]])


@measure("attention", "1", axes=("layer",), statistic="ratio", plot=Lines("layer"))
def share_beyond(inputs: Inputs) -> Rows:
    """Share of the boosted edges whose boost exceeds the critical one, so that it alone lowers the row's entropy."""
    yield from _by_layer(effects_of(inputs)["edges"], lambda edges: edges[:, [3, 2]])


@measure(
    "attention", "nats", axes=("layer",), statistic="ratio", plot=Lines("layer"), positive="the embedding sharpens"
)
def row_sharpening(inputs: Inputs) -> Rows:
    """Entropy of a row with the embedding zeroed minus with it, mean over all rows of a layer."""
    yield from _by_layer(effects_of(inputs)["changes"], lambda changes: changes[:, [1, 0]] * (-1, 1))


@measure("attention", "nats", axes=("layer",), statistic="ratio", plot=Lines("layer"), positive="they sharpen")
def row_sharpening_by_meta_logits(inputs: Inputs) -> Rows:
    """What the logits of a row's meta keys take from its entropy by themselves, mean over all rows of a layer."""
    yield from _by_layer(effects_of(inputs)["changes"], lambda changes: changes[:, [3, 0]] * (-1, 1))


@measure("attention", "1", axes=("layer",), statistic="r_squared", plot=Lines("layer"))
def mechanism_r_squared(inputs: Inputs) -> Rows:
    """R² over rows of the whole sharpening by the one that the meta keys' logits make."""
    yield from _by_layer(effects_of(inputs)["changes"], lambda changes: changes[:, [0, 1, 2, 4]])


@measure("attention", "1", axes=("layer",), statistic="ratio", plot=Lines("layer"))
def sign_agreement(inputs: Inputs) -> Rows:
    """Share of rows in which both have one sign, of those where neither is 0."""
    yield from _by_layer(effects_of(inputs)["changes"], lambda changes: changes[:, [5, 6]])


def _by_layer(counts: Array, columns: Callable[[Array], Array]) -> Iterator[Row]:
    """Yield the rows of columns of (documents, layers, counts): of each layer, and of all together."""
    for layer in range(counts.shape[1]):
        yield Row({"layer": layer}, columns(counts[:, layer]))
    yield Row({}, columns(counts.sum(axis=1)))
