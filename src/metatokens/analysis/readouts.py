"""What can be read from the states of meta-tokens, and what each part of the model adds to its output.

    decodability   a linear map reads the text before a state (R3), and the CKA of states and that text
    logit lens     the model's own head reads it (L1), from the state or behind an affine map to the final one
    attribution    the components' shares in the answer's logit over its foil's, or in that of a text token over the
                   mean logit (D1), and the length of each branch (D2)
    output         what the meta-tokens' embedding does to the distribution over the next token (A7)

Each measure runs over whole documents and records one number a document. Beside meta-tokens stand the text tokens right
before them, which have read the same text, and, of text alone, ordinary tokens at the same places of the same text with
its meta-tokens elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.causal.pairs import MinimalPair
from metatokens.analysis.causal.scores import batches_of
from metatokens.analysis.documents import Document, DocumentSums, IntArray, merge_documents
from metatokens.analysis.inputs import Subject
from metatokens.analysis.recording import At, Findings
from metatokens.analysis.representations.decodability import (
    WINDOWS,
    PrefixStates,
    cka_without_each_document,
    collect_prefix_states,
    debiased_linear_cka,
    held_out_ridge,
)
from metatokens.analysis.representations.logits import (
    DISTANCES,
    AffineMap,
    attribute_logits,
    fit_affine_maps,
    measure_branch_strengths,
    measure_logit_lens,
    measure_outputs,
)
from metatokens.analysis.token_view import attribute_tokens
from metatokens.config.analysis import MINIMUM_DOCUMENTS
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import ZeroEmbedding, intervene
from metatokens.evaluation.statistics import Interval
from metatokens.lens.lens import Lens

_CKA_WINDOW = 16  # text tokens; one window, since every interval costs as many CKAs as there are documents
CKA_PAIRS = 2_000
"""Fewer give a note."""
_BATCH = 16
_NORMAL_95 = 1.96
_BRANCHES = {"attention": "attention", "meta_attention": "meta-attention", "mlp": "feed-forward"}
_COMPONENTS = {"attn_out": "attention", "meta_out": "meta-attention", "mlp_out": "feed-forward"}
_OUTPUT_CHANGES = {
    "max_over_mean": ("max_logit_boost", "logits", 1),
    "max_log_probability": ("max_log_probability_boost", "nats", 1),
    "entropy": ("output_entropy_drop", "nats", -1),
    "cross_entropy": ("loss_drop", "nats", -1),
}


class _Positions(NamedTuple):
    """States that are looked at."""

    name: str
    documents: Sequence[Document]
    ends: Sequence[Tensor]
    """(1, T) bool for each document: the positions before which the text ends."""
    steps_back: int = 0
    """The state is that of so many positions earlier."""


def measure_decodability(lens: Lens, subject: Subject, *, seed: int, findings: Findings) -> None:
    """Record how much of the last tokens a linear map reads from each layer's states, held out by document.

    Raises:
        UsageError: documents too short for any window, or too few of them.
    """
    shortest = min(document.input_ids.shape[1] for document in subject.documents)
    windows = [window for window in WINDOWS if window <= shortest // 4]
    for positions in _positions(subject):
        collected = _collect(lens, positions, windows)
        for index, window in enumerate(windows):
            targets = collected.prefixes[index]
            for layer, states in enumerate(collected.states):
                at: At = {"state": positions.name, "layer": layer, "window": window}
                read = held_out_ridge(states, targets, collected.documents, seed=seed)
                columns = np.stack([read.residual_squares.sums, read.total_squares.sums], axis=1)
                findings.add("readouts", "decodability", "1", "R3", columns, at=at, statistic=_explained_share)
                findings.add("readouts", "prefix_rank", "1", "R3", read.reciprocal_rank.means, at=at)
                if window == min(_CKA_WINDOW, windows[-1]):
                    _record_cka(states, targets, collected.documents, at, findings)
            chance: At = {"state": positions.name, "window": window}
            findings.add("readouts", "prefix_rank_chance", "1", "R3", read.chance.means, at=chance)


def measure_logit_lenses(lens: Lens, subject: Subject, *, findings: Findings) -> None:
    """Record where the text before a state stands in what the head makes of it, layer by layer.

    Raises:
        UsageError: fewer than two calibration documents.
    """
    maps = fit_affine_maps(lens, [document.input_ids for document in subject.calibration])
    for positions in _positions(subject):
        if positions.steps_back:
            continue  # its own token would stand where the others have the last one before them
        readings: tuple[tuple[str, Sequence[AffineMap] | None], ...] = (("state", None), ("mapped state", maps))
        for reading, through in readings:
            curves = [
                measure_logit_lens(lens, document.input_ids, at=ends, documents=[number], maps=through)
                for number, (document, ends) in enumerate(zip(positions.documents, positions.ends, strict=True))
                if ends.any()
            ]
            merged = {
                name: merge_documents([getattr(curve, name) for curve in curves]).means
                for name in ("reciprocal_rank", "log_probability", "divergence")
            }
            for layer in range(merged["divergence"].shape[1]):
                at: At = {"state": positions.name, "read": reading, "layer": layer}
                findings.add("readouts", "divergence", "nats", "L1", merged["divergence"][:, layer], at=at)
                for index, distance in enumerate(DISTANCES):
                    for metric, unit in (("reciprocal_rank", "1"), ("log_probability", "nats")):
                        values = merged[metric][:, layer, index]
                        findings.add("readouts", metric, unit, "L1", values, at={**at, "distance": distance})


def measure_attribution(lens: Lens, pairs: Sequence[MinimalPair], *, findings: Findings) -> None:
    """Record what each component adds to the answer's logit minus the foil's at the end of a clean prompt."""
    shares = []
    for batch, rows in batches_of(lens, pairs, _BATCH):
        last = batch.mask([np.array([len(pair.clean) - 1]) for pair in pairs[rows]])
        found = attribute_logits(lens, batch.clean, at=last, token_ids=batch.answer, foil_ids=batch.foil)
        shares.append(dict(zip(found.names, found.values.T.numpy(force=True), strict=True)))
    _record_shares(shares, findings)


def measure_text_attribution(lens: Lens, subject: Subject, *, findings: Findings) -> None:
    """Record what each component adds to the logit of a text token over the mean logit, behind the first meta-token."""
    shares = []
    for document in subject.documents:
        behind = (document.is_meta.long().cumsum(1) > 0)[0].numpy(force=True)
        columns = attribute_tokens(lens, document.input_ids[0])
        predicted = behind & np.isfinite(columns.pop("logit"))
        if predicted.any():
            shares.append({name: column[predicted].mean(keepdims=True) for name, column in columns.items()})
    _record_shares(shares, findings)


def _record_shares(shares: Sequence[Mapping[str, npt.NDArray[Any]]], findings: Findings) -> None:
    """Record the shares of components by name, (documents,) in each part."""
    for name in shares[0] if shares else ():
        layer, component = _component(name)
        at: At = {"component": component} if layer is None else {"component": component, "layer": layer}
        findings.add("readouts", "attribution", "logits", "D1", np.concatenate([part[name] for part in shares]), at=at)


def measure_strengths(lens: Lens, subject: Subject, *, findings: Findings) -> None:
    """Record how long what each branch adds at meta-tokens is, beside the residual stream there."""
    parts = [
        measure_branch_strengths(lens, document.input_ids, at=document.is_meta, documents=[number])
        for number, document in enumerate(subject.documents)
        if document.is_meta.any()
    ]
    for field, branch in _BRANCHES.items():
        means = merge_documents([getattr(part, field) for part in parts]).means
        for layer in range(means.shape[1]):
            if np.isfinite(means[:, layer]).any():
                at: At = {"branch": branch, "layer": layer}
                findings.add("readouts", "branch_strength", "ratio", "D2", means[:, layer], at=at)


def measure_output_changes(lens: Lens, subject: Subject, *, findings: Findings) -> None:
    """Record what the meta-tokens' embedding does to the output, at meta-tokens and at the text behind the first."""
    changes: dict[tuple[str, str], list[DocumentSums]] = {}
    for number, document in enumerate(subject.documents):
        at = document.is_meta.long().cumsum(1) > 0
        if not at.any():
            continue
        full = measure_outputs(lens, document.input_ids, at=at)
        with intervene(lens.model, [ZeroEmbedding()]):
            without = measure_outputs(lens, document.input_ids, at=at)
        is_meta = document.is_meta[at]
        for place, chosen in (("meta-tokens", is_meta), ("text behind", ~is_meta)):
            of_document = np.full(int(chosen.sum()), number)
            for statistic, sums in full.at(chosen).minus(without.at(chosen), of_document).items():
                changes.setdefault((statistic, place), []).append(sums)
    for (statistic, place), parts in changes.items():
        metric, unit, sign = _OUTPUT_CHANGES[statistic]
        means = sign * merge_documents(parts).means
        if np.isfinite(means).any():  # nothing may be asked of meta-tokens
            findings.add("readouts", metric, unit, "A7", means, at={"place": place}, test=True)


def _positions(subject: Subject) -> list[_Positions]:
    metas = [document.is_meta for document in subject.documents]
    # a meta-token right behind another has no text token of its own before it
    behind_text = [at & ~torch.nn.functional.pad(at, (1, 0))[:, :-1] for at in metas]
    found = [
        _Positions("meta-token", subject.documents, metas),
        _Positions("token before it", subject.documents, behind_text, steps_back=1),
    ]
    if subject.control:
        elsewhere = [at & ~control.is_meta for at, control in zip(metas, subject.control, strict=True)]
        found.append(_Positions("ordinary token", subject.control, elsewhere))
    return found


def _collect(lens: Lens, positions: _Positions, windows: Sequence[int]) -> PrefixStates:
    if not windows:
        raise UsageError(
            "documents for decodability",
            expected=f"at least {4 * WINDOWS[0]} positions each",
            found="shorter ones",
            remedy="analyse longer documents",
        )
    parts = [
        collect_prefix_states(
            lens, document.input_ids, at=ends, documents=[number], windows=windows, steps_back=positions.steps_back
        )
        for number, (document, ends) in enumerate(zip(positions.documents, positions.ends, strict=True))
        if ends.any()
    ]
    if not parts:
        raise UsageError(
            "decodability", expected="a meta-token", found="none", remedy="choose documents that have meta-tokens"
        )
    return PrefixStates.merge(parts)


def _record_cka(states: Tensor, targets: Tensor, documents: IntArray, at: At, findings: Findings) -> None:
    """Record the CKA with a jackknife interval: in a bootstrap, a document drawn twice would resemble itself."""
    num_documents = len(np.unique(documents))
    try:
        estimate = debiased_linear_cka(states, targets)
        without = cka_without_each_document(states, targets, documents)
    except UsageError:  # before the first block all meta-tokens are the same
        return
    variance = (num_documents - 1) / num_documents * ((without - without.mean()) ** 2).sum()
    reach = _NORMAL_95 * float(np.sqrt(variance))
    enough = num_documents >= MINIMUM_DOCUMENTS
    interval = Interval(estimate, estimate - reach, estimate + reach) if enough else Interval(estimate, None, None)
    notes = [] if enough else [f"fewer than {MINIMUM_DOCUMENTS} documents: no interval"]
    if len(states) < CKA_PAIRS:
        notes.append(f"{len(states)} pairs, of which {CKA_PAIRS} are wanted")
    findings.add_interval(
        "readouts", "cka", "1", "R3", interval, documents=num_documents, at=at, note="; ".join(notes) or None
    )


def _explained_share(documents: npt.NDArray[np.float64]) -> float:
    """Return R2 of columns (residual squares, total squares)."""
    residual, total = documents.sum(axis=0)
    return float(1 - residual / total) if total > 0 else float("nan")


def _component(name: str) -> tuple[int | None, str]:
    """Return layer and component of a name of `Attribution`; the layer is None for what belongs to none."""
    if not name.startswith("blocks."):
        return None, {"embed": "embedding", "norm_bias": "biases", "head_bias": "head's bias"}[name]
    _, layer, part = name.split(".")
    return int(layer), _COMPONENTS[part]
