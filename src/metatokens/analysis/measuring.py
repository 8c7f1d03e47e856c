"""One function for each part of an analysis: measure, record with intervals, and note what claims are decided by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from metatokens.analysis.attention.distance import distance_profiles
from metatokens.analysis.attention.rows import StratifiedQueries
from metatokens.analysis.attention.sharpening import (
    ROW_METRICS,
    attention_effects,
    rows_behind_a_meta_token,
)
from metatokens.analysis.causal.eviction import measure_eviction
from metatokens.analysis.causal.pairs import MinimalPair, make_minimal_pairs
from metatokens.analysis.causal.patching import (
    Blocked,
    KnockOut,
    Patch,
    block_paths,
    interchange,
    knock_out_meta_attention,
    knock_out_on_text,
    list_knock_outs,
)
from metatokens.analysis.causal.policies import ALWAYS_KEPT
from metatokens.analysis.documents import Document
from metatokens.analysis.inputs import Subject, stack
from metatokens.analysis.recording import At, Findings, over_layers_and_heads, r_squared_statistic
from metatokens.analysis.representations.similarity import ExcessCosine, Variant, calibrate, measure_excess_cosine
from metatokens.config.analysis import AnalysisConfig, TaskSubject, TextSubject
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import (
    Intervention,
    NoPositionEdges,
    ZeroEmbedding,
    ZeroPosition,
    check_interventions,
    intervene,
)
from metatokens.evaluation.recall import count_right_answers
from metatokens.lens.lens import Lens
from metatokens.tasks.base import PieceEncoder

Array = npt.NDArray[np.float64]
_BATCH = 16
_FORMS: tuple[Variant, ...] = ("raw", "centred", "z_scored")
_UNITS = {"meta_mass": "1", "meta_lift": "ratio", "max_score_boost": "logits", "effective_keys": "keys"}
_METHODS = dict(zip(ROW_METRICS, ("A1", "A8", "A5", "A6", "A4", "A4", "A2", "A3"), strict=True))
_METRICS_OF_DOCUMENTS = ("entropy_drop", "log_odds_boost", "meta_mass")
"""Kept document by document, for what lies behind a cell of a heat map: float32 (documents, layers, heads)."""
_CONDITIONS = {"none": "full", "direct": "direct cut", "meta": "meta cut", "direct+meta": "both cut"}
_MORE_CONDITIONS = {
    "meta branch": "meta-attention off",
    "direct+meta branch": "direct cut, meta-attention off",
    "direct+meta+detour": "all paths cut",
}
_STATES = {"meta": "meta-tokens", "ordinary": "ordinary tokens", "item": "the item", "last": "last token"}


def measure_attention(lens: Lens, subject: Subject, config: AnalysisConfig, findings: Findings) -> None:
    """Entropy, boost and mass with the meta-tokens' embedding and with it zeroed, and the theorem's audit."""
    queries = StratifiedQueries(config.queries, config.seed)
    usable = [document for document in subject.documents if len(rows_behind_a_meta_token(document, queries))]
    if len(usable) < len(subject.documents):
        findings.not_run.append(
            f"attention: {len(subject.documents) - len(usable)} documents have no meta-token that a query sees"
        )
    effects = attention_effects(lens, usable, ablation=ZeroEmbedding(), queries=queries)
    for metric in ROW_METRICS:
        values: Array = getattr(effects, metric)
        is_change = metric.endswith(("drop", "boost"))
        if metric in _METRICS_OF_DOCUMENTS:
            findings.arrays[f"attention.{metric}"] = _by_document(values, subject, usable)
        unit, method = _UNITS.get(metric, "nats"), _METHODS[metric]
        for layer in range(values.shape[1]):
            for head in range(values.shape[2]):
                findings.add(
                    "attention",
                    metric,
                    unit,
                    method,
                    values[:, layer, head],
                    at={"layer": layer, "head": head},
                    test=is_change,
                )
        means = over_layers_and_heads(values)
        findings.add("attention", metric, unit, method, means, test=is_change)
        if is_change:
            findings.endpoints[metric] = means
    places: list[tuple[At, slice]] = [({"layer": i}, slice(i, i + 1)) for i in range(effects.edges.shape[1])]
    for at, chosen in [*places, ({}, slice(None))]:
        edges, above, boosted, beyond = np.moveaxis(effects.edges[:, chosen].sum(axis=1), -1, 0)
        rows, change, squares, mechanism, residuals, agree, moved = np.moveaxis(
            effects.changes[:, chosen].sum(axis=1), -1, 0
        )
        findings.add_ratio("theory", "share_above", "1", "theory", above, edges, at=at)
        findings.add_ratio("theory", "share_beyond", "1", "theory", beyond, boosted, at=at)
        findings.add_ratio("theory", "mechanism", "nats", "theory", mechanism, rows, at=at)
        findings.add_ratio("theory", "change", "nats", "theory", change, rows, at=at)
        findings.add_ratio("theory", "sign_agreement", "1", "theory", agree, moved, at=at)
        columns = np.stack([rows, change, squares, residuals], axis=1)
        findings.add("theory", "r_squared", "1", "theory", columns, at=at, statistic=r_squared_statistic)
    _, _, boosted, beyond = np.moveaxis(effects.edges.sum(axis=1), -1, 0)
    shares = np.divide(beyond, boosted, out=np.full(len(beyond), np.nan), where=boosted > 0)
    findings.endpoints["theorem"] = shares
    findings.arrays["theory_points"] = effects.points.astype(np.float32)


def _by_document(values: Array, subject: Subject, usable: Sequence[Document]) -> npt.NDArray[np.float32]:
    """Return values of the usable documents in rows of all of them, NaN at the others."""
    rows = {id(document): row for row, document in enumerate(usable)}
    missing = np.full(values.shape[1:], np.nan)
    found = [values[rows[id(one)]] if id(one) in rows else missing for one in subject.documents]
    return np.stack(found).astype(np.float32)


def measure_distances(lens: Lens, subject: Subject, config: AnalysisConfig, findings: Findings) -> None:
    """How much attention goes how far back, to meta-tokens and to text, mean over heads."""
    queries = StratifiedQueries(config.queries, config.seed)
    found: list[Array] = []
    for document in subject.documents:
        profiles = distance_profiles(
            lens, document.input_ids, is_meta=document.is_meta, branches=("attn",), queries=queries
        )
        # (layers, kinds, bins) of one document, mean over heads
        found.append(np.stack([profile[:, 0].mean(1).numpy(force=True) for profile in profiles.values()]))
    num_bins = max(profile.shape[-1] for profile in found)
    padded = [np.pad(profile, ((0, 0), (0, 0), (0, num_bins - profile.shape[-1]))) for profile in found]
    profiles_by_document = np.stack(padded)
    for layer in range(profiles_by_document.shape[1]):
        for kind, name in enumerate(("text", "meta-tokens")):
            for bin_number in range(num_bins):
                at: At = {"layer": layer, "to": name, "distance": 2 ** (bin_number - 1) if bin_number else 0}
                values = profiles_by_document[:, layer, kind, bin_number]
                findings.add("attention", "mass_by_distance", "1", "A9", values, at=at)


def measure_zeroing(lens: Lens, subject: Subject, findings: Findings) -> None:
    """Accuracy of a task with something taken from the meta-tokens, at inference (the paper's Table 2)."""
    full = _accuracy(lens.model, subject, ())
    findings.add_accuracy("accuracy", "C1", full, at={"intervention": "none"})
    interventions: tuple[Intervention, ...] = (ZeroEmbedding(), ZeroPosition(), NoPositionEdges())
    for intervention in interventions:
        try:
            check_interventions(lens.model, [intervention])
        except UsageError as error:
            findings.not_run.append(str(error))
            continue
        accuracy = _accuracy(lens.model, subject, (intervention,))
        at = {"intervention": intervention.kind}
        findings.add_accuracy("accuracy", "C1", accuracy, at=at)
        findings.add("causal", "accuracy_change", "1", "C1", accuracy - full, at=at, test=True)
        if intervention.kind == "zero_position":
            findings.endpoints["zero_position"] = accuracy - full
        elif intervention.kind == "zero_embedding":
            findings.endpoints["zero_embedding"] = full - accuracy


def usable_pairs(
    lens: Lens, encoder: TextEncoder, subject: TaskSubject, *, seed: int, findings: Findings
) -> list[MinimalPair]:
    """Return the minimal pairs that have a meta-token behind the item.

    Raises:
        UsageError: there is none.
    """
    pairs = make_minimal_pairs(
        subject.task,
        subject.difficulty,
        encoder=PieceEncoder(encoder),
        meta_token_id=int(lens.model.config.meta_token_id),
        seed=seed,
        pairs=subject.pairs,
    )
    usable = [pair for pair in pairs if len(pair.later_meta_positions)]
    if not usable:
        raise UsageError(
            "minimal pairs",
            expected="a meta-token behind the item",
            found=f"none in {len(pairs)} pairs",
            remedy="choose a task that places meta-tokens",
        )
    if len(usable) < len(pairs):
        findings.not_run.append(f"causal part: {len(pairs) - len(usable)} pairs have no meta-token behind the item")
    return usable


def measure_paths(lens: Lens, pairs: Sequence[MinimalPair], findings: Findings) -> None:
    """Paths from the item to the answer, cut alone and together."""
    blocking = block_paths(lens, pairs, first_layers=[0])
    for blocked, scores in blocking.scores.items():
        name = _CONDITIONS.get(blocked.paths) or _MORE_CONDITIONS.get(blocked.paths)
        if name is not None:
            findings.add("causal", "logit_difference", "logits", "E2", scores.logit_difference, at={"condition": name})
            findings.add_accuracy("pair_accuracy", "E2", scores.accuracy, at={"condition": name})
    interaction = blocking.interaction(0)
    findings.add("causal", "interaction", "logits", "E2", interaction, test=True)
    findings.endpoints["interaction"] = interaction
    direct, both = (blocking.scores[Blocked(name, 0)].logit_difference for name in ("direct", "direct+meta"))
    findings.add("causal", "meta_path", "logits", "E2", direct - both, test=True)
    findings.endpoints["meta_path"] = direct - both


def measure_interchange(lens: Lens, pairs: Sequence[MinimalPair], findings: Findings) -> None:
    """States of one prompt in the run of the other, in both directions, at one site or three neighbouring ones."""
    exchanged = interchange(lens, pairs)
    for patch in exchanged.patched:
        effect = exchanged.effect(Patch(*patch))
        at: At = {
            "layer": patch.site,
            "where": _STATES[patch.state],
            "direction": patch.direction,
            "window": patch.window,
        }
        findings.add_ratio("causal", "interchange", "1", "E1", effect.numerators, effect.denominators, at=at)


def measure_knock_outs_on_pairs(lens: Lens, pairs: Sequence[MinimalPair], findings: Findings) -> None:
    """What removing meta-attention, or what it reads from farther back, costs the answer."""
    if not any(site.branch == "meta_attn" for block in lens.layout.blocks for site in block.attentions):
        return
    chosen = list_knock_outs(lens)
    knocked = knock_out_meta_attention(lens, pairs, knock_outs=chosen)
    for one in chosen:
        mode = one.kind if one.num_kept is None else f"older than {one.num_kept}"
        findings.add("causal", "knockout", "nats", "E3", knocked.loss(one), at={"mode": mode, **_layers_of(one)})


def measure_similarity(lens: Lens, subject: Subject, config: AnalysisConfig, findings: Findings) -> None:
    """Cosine of meta-tokens with earlier text, beside that of ordinary tokens at the same places."""
    calibrations = calibrate(lens, [{"input_ids": document.input_ids} for document in subject.calibration])
    longest = subject.documents[0].input_ids.shape[1]
    distances = [distance for distance in config.distances if distance < longest // 2]
    if not distances:
        raise UsageError(
            "distances",
            expected=f"one below {longest // 2}, half a document",
            found=str(config.distances),
            remedy="lower them, or raise subject.window",
        )
    if len(distances) < len(config.distances):
        findings.not_run.append(f"similarity at distances from {longest // 2}, half a document")
    # even batches, since the control of a document is another one of its batch
    batches = np.array_split(np.arange(len(subject.documents)), math.ceil(len(subject.documents) / _BATCH))
    found = ExcessCosine.merge(
        [
            measure_excess_cosine(
                lens,
                stack([subject.documents[row] for row in rows]),
                stack([subject.control[row] for row in rows]),
                documents=rows,
                calibrations=calibrations,
                seed=config.seed,
                distances=distances,
                variants=_FORMS,
            )
            for rows in batches
        ]
    )
    _record_cosines(found, distances, findings)


def _record_cosines(found: ExcessCosine, distances: Sequence[int], findings: Findings) -> None:
    curves = {"meta": found.meta.own, "ordinary": found.ordinary.own, "meta, shuffled": found.meta.shuffled}
    for kind, sums in curves.items():
        means = sums.means  # (documents, variants, layers + 1, distances)
        for variant, form in enumerate(_FORMS):
            for layer in range(means.shape[2]):
                for index, distance in enumerate(distances):
                    findings.add(
                        "similarity",
                        "cosine",
                        "1",
                        "R1",
                        means[:, variant, layer, index],
                        at={"layer": layer, "distance": distance, "kind": kind, "form": form},
                    )
    excess = found.over_ordinary.means[:, 1]
    for layer in range(excess.shape[1]):
        for index, distance in enumerate(distances):
            values = excess[:, layer, index]
            findings.add(
                "similarity", "excess_cosine", "1", "R2", values, at={"layer": layer, "distance": distance}, test=True
            )
    if distances[0] == 1:
        findings.endpoints["excess_cosine"] = excess[:, 1:, 0].mean(axis=1)
    if distances[0] == 1 and len(distances) > 1:
        meta = found.meta.own.means[:, 1, 1:]
        findings.endpoints["fading_cosine"] = (meta[..., 0] - meta[..., -1]).mean(axis=1)


def measure_evictions(
    lens: Lens, subject: Subject, text: TextSubject, config: AnalysisConfig, findings: Findings
) -> None:
    """Cost of a continuation when most of the cache is gone, by what stays."""
    prefix_length = int(text.prefix_share * text.window)
    if not 0 < prefix_length < text.window:
        raise UsageError(
            "subject.prefix_share",
            expected="a share that leaves tokens before and behind the cut",
            found=f"{prefix_length} of {text.window} positions",
            remedy="take 0.75",
        )
    costs = measure_eviction(
        lens,
        stack(subject.documents).numpy(),
        prefix_length,
        meta_token_id=int(lens.model.config.meta_token_id),
        budgets=config.budgets,
        seed=config.seed,
        always_kept=ALWAYS_KEPT._replace(newest=config.newest_kept),
    )
    for condition, cost in costs.costs.items():
        findings.add(
            "eviction",
            "cost",
            "nats/token",
            "E4",
            cost,
            at={"policy": condition.policy, "kept": float(condition.budget)},
        )
    smallest = min(config.budgets)
    always = ALWAYS_KEPT.sinks + config.newest_kept
    if not always < costs.num_kept[smallest] < prefix_length:
        findings.not_run.append(
            f"verdict on eviction: at budget {smallest} {costs.num_kept[smallest]} of {prefix_length} columns stay, "
            f"{always} of them under every policy"
        )
        return
    by_policy = {key.policy: cost for key, cost in costs.costs.items() if key.budget == smallest}
    findings.endpoints["eviction"] = by_policy["even"] - by_policy["meta"]


def measure_knock_outs(lens: Lens, subject: Subject, findings: Findings) -> None:
    """What removing meta-attention costs on text."""
    chosen = [one for one in list_knock_outs(lens) if one.kind == "zero"]
    rows = [document.input_ids[0].numpy() for document in subject.documents]
    found = knock_out_on_text(lens, rows, knock_outs=chosen)
    for one in chosen:
        findings.add(
            "language_model",
            "loss_change",
            "nats/token",
            "C2",
            found.rises[one],
            at=_layers_of(one),
            test=True,
        )


def _accuracy(model: Any, subject: Subject, interventions: tuple[Intervention, ...]) -> Array:
    """Return the share of answers of each instance that are right."""
    with intervene(model, interventions):
        found = count_right_answers(model, subject.instances, batch_size=_BATCH)
    share: Array = found.right_answers / found.answers
    return share


def _layers_of(knock_out: KnockOut) -> dict[str, int]:
    """Return the layer of a knock-out of one, nothing for one of all."""
    return {"layer": knock_out.layers[0]} if len(knock_out.layers) == 1 else {}
