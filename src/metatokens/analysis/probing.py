"""What probes find in the states around a recall task's last meta-token, and whether the model uses it (E5 to E7).

probing    usable information about each label (V2), beside shuffled labels; the online code of the answer (V3)
erasing    the answer taken out of all meta-tokens' states, in one layer or in all: what it costs the answer (E6)
capacity   recall against the task's own size, such as the items that stand behind a meta-token (E7)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.causal.scores import Scores
from metatokens.analysis.compression.labelled_states import ANSWER, BATCH_SIZE, Sample, Samples, States, padded_prompts
from metatokens.analysis.compression.probes import LinearEraser, fit_eraser, online_code, v_information
from metatokens.analysis.documents import DocumentSums
from metatokens.analysis.recording import At, Findings
from metatokens.config.analysis import AnalysisConfig, FittedState, TaskSubject
from metatokens.data.tokenizer import TextEncoder
from metatokens.errors import UsageError
from metatokens.evaluation.recall import count_right_answers, make_test_instances
from metatokens.evaluation.statistics import Interval
from metatokens.lens import edits
from metatokens.lens.lens import Lens
from metatokens.tasks.base import PieceEncoder

ERASED_LABELS = 16
"""The most frequent answers, whose instances alone are erased and asked: with as many labels as dimensions an eraser
takes everything."""
MOST_SIZES = 8
PAST_STATES: tuple[FittedState, ...] = ("last meta-token", "token before it", "untrained")
"""Asked for what stands before them, too."""
ITSELF = ("token before it", "the token before")
"""State and target that are one token."""
CODED_STATES: tuple[FittedState, ...] = ("last meta-token", "token before it", "last token")
"""Of which an online code is made: ten probes each."""
_BATCH = 16

Array = npt.NDArray[np.float64]
Erasers = list[tuple[int, LinearEraser]]
"""Layers, rising, and what is done to the meta-tokens that leave them."""


def measure_probes(samples: Samples, config: AnalysisConfig, findings: Findings) -> None:
    """Fit probes of the answer to every state, and of the other labels and by an online code to some."""
    for name, states in samples.states.items():
        for target, labels in samples.labels.items():
            if target == ANSWER or (name in PAST_STATES and (name, target) != ITSELF):
                _run_probe(name, states, target, labels, config, findings)
        answers = samples.labels[ANSWER]
        if name in CODED_STATES and len(np.unique(answers)) > 1:
            _record_code(name, states, answers, config, findings)


def _run_probe(
    name: str,
    states: States,
    target: str,
    labels: npt.NDArray[np.int64],
    config: AnalysisConfig,
    findings: Findings,
) -> None:
    """Record what a probe of a label gains; where too few instances have one, or all the same, say so."""
    exists = labels >= 0
    if len(np.unique(labels[exists])) < 2:
        findings.not_run.append(f"probe of {target}: it is the same in all instances")
        return
    try:
        found = v_information(
            states[exists], labels[exists], np.flatnonzero(exists), config=config.probe, seed=config.seed
        )
    except UsageError as error:
        findings.not_run.append(f"probe of {target} in {int(exists.sum())} instances that have it: {error}")
        return
    at: At = {"state": name, "target": target}
    usable = found.pointwise.mean(axis=0)
    findings.add("probes", "v_information", "nats", "V2", usable, at=at)
    gained = usable - found.shuffled_pointwise.mean(axis=0)
    findings.add("probes", "selectivity", "nats", "V2", gained, at=at)
    if target == ANSWER:
        findings.add("probes", "remaining_entropy", "nats", "V2", found.codes.mean(axis=0), at=at)


def _record_code(
    name: str, states: npt.ArrayLike, labels: npt.NDArray[np.int64], config: AnalysisConfig, findings: Findings
) -> None:
    code = online_code(states, labels, np.arange(len(labels)), config=config.probe, seed=config.seed)
    for metric, ratio in (
        ("compression", code.compression),
        ("compression_of_prior", code.compression_of_prior),
        ("compression_of_shuffled", code.uniform_length / float(code.shuffled_lengths.mean())),
    ):
        one_code = Interval(ratio, None, None)
        at: At = {"state": name, "target": ANSWER}
        note = "one code of all instances: no interval"
        findings.add_interval("probes", metric, "ratio", "V3", one_code, documents=len(labels), at=at, note=note)


def measure_erasure(lens: Lens, samples: Sequence[Sample], config: AnalysisConfig, findings: Findings) -> None:
    """Erase what linear probes find of the answer in the states of meta-tokens, and ask for the answer again.

    Erasers are fitted to half of the instances and tested on the other half, where a probe says what of the answer the
    states hold before and after. Without a layer, all are erased one after the other, each eraser fitted to states
    that those before it have changed. The control erases shuffled labels.

    Raises:
        UsageError: fewer than two answers that occur.
    """
    occurring, counts = np.unique([sample.label for sample in samples], return_counts=True)
    kept = set(occurring[np.argsort(-counts, kind="stable")[:ERASED_LABELS]].tolist())
    chosen = [sample for sample in samples if sample.label in kept]
    fitted, tested = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    true = np.array([sample.label for sample in fitted])
    if min(len({sample.label for sample in half}) for half in (fitted, tested)) < 2:
        raise UsageError(
            "answers to erase",
            expected="at least 2 in each half of the instances",
            found=f"{len(kept)} in {len(chosen)} instances",
            remedy="raise subject.fitted_instances",
        )
    shuffled = np.random.Generator(np.random.PCG64(findings.seed)).permutation(true)
    full_loss, full_right = _ask(lens, tested, [])
    single = [[layer] for layer in range(len(lens.layout.blocks) - 1)]  # what leaves the last reaches no other token
    every = [layer for layers in single for layer in layers]
    for layers in [*single, *([every] if len(every) > 1 else [])]:
        layer: dict[str, int] = {"layer": layers[0]} if len(layers) == 1 else {}
        of_answer, of_shuffled = (fit_erasers(lens, fitted, labels, layers) for labels in (true, shuffled))
        (loss, right), (control_loss, control_right) = (_ask(lens, tested, one) for one in (of_answer, of_shuffled))
        for name, losses, rights in (("answer", loss, right), ("shuffled", control_loss, control_right)):
            at: At = {"erased": name, **layer}
            findings.add("probes", "erasure_loss", "nats", "E6", losses - full_loss, at=at)
            findings.add("probes", "erasure_accuracy", "1", "E6", rights - full_right, at=at)
        findings.add("probes", "erasure_excess", "nats", "E6", loss - control_loss, at=layer, test=True)
        if layer:
            for name, erasers in (("nothing", []), ("answer", of_answer)):
                _probe_meta_tokens(lens, tested, layers[0], erasers, name, config, findings)


def _probe_meta_tokens(
    lens: Lens,
    samples: Sequence[Sample],
    layer: int,
    erasers: Erasers,
    erased: str,
    config: AnalysisConfig,
    findings: Findings,
) -> None:
    """Record what a probe finds of the answer in the states that were, or were not, erased."""
    states, rows = meta_states(lens, samples, layer, erasers)
    labels = np.array([sample.label for sample in samples])[rows]
    try:
        found = v_information(states, labels, rows, config=config.probe, seed=config.seed)
    except UsageError as error:
        findings.not_run.append(f"probe of the erased states: {error}")
        return
    sums = DocumentSums.of_values(found.document_ids, found.pointwise.mean(axis=0))
    at: At = {"layer": layer, "erased": erased}
    findings.add("probes", "erasure_information", "nats", "E6", sums.means, at=at)


def measure_capacity(
    lens: Lens, encoder: TextEncoder, subject: TaskSubject, config: AnalysisConfig, findings: Findings
) -> None:
    """Record accuracy by the task's own size, from the smallest that it was asked at to twice the largest."""
    low, high = subject.difficulty.size
    sizes = sorted({round(size) for size in np.linspace(low, 2 * high, min(MOST_SIZES, 2 * high - low + 1))})
    for size in sizes:
        try:
            instances = make_test_instances(
                subject.task,
                subject.difficulty.model_copy(update={"size": (size, size)}),
                encoder=PieceEncoder(encoder),
                meta_token_id=int(lens.model.config.meta_token_id),
                seed=config.seed,
                instances=config.documents,
            )
        except UsageError:
            findings.not_run.append(f"capacity at size {size}: no prompt of these lengths")
            continue
        found = count_right_answers(lens.model, instances, batch_size=_BATCH)
        findings.add_accuracy("capacity", "E7", found.right_answers / found.answers, at={"size": size})


def fit_erasers(lens: Lens, samples: Sequence[Sample], labels: npt.NDArray[np.int64], layers: list[int]) -> Erasers:
    """Fit an eraser of labels, one a sample, to all meta-tokens before the answer, layer after layer."""
    erasers: Erasers = []
    for layer in layers:
        states, rows = meta_states(lens, samples, layer, erasers)
        erasers.append((layer, fit_eraser(states, labels[rows])))
    return erasers


def meta_states(
    lens: Lens, samples: Sequence[Sample], layer: int, erasers: Erasers
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return what leaves a layer at the meta-tokens before the answers, (n, C), and the sample of each state, (n,)."""
    name = f"blocks.{layer}.hook_resid_post"
    states, rows = [], []
    for start in range(0, len(samples), BATCH_SIZE):
        ids, is_meta = _padded(lens, samples[start : start + BATCH_SIZE])
        with lens.edit(*_edits(erasers, is_meta)), lens.capture([name], at=is_meta) as captured:
            lens(ids, use_cache=False, logits_to_keep=1)
        states.append(captured[name].double().numpy(force=True))
        rows.append(start + is_meta.nonzero()[:, 0].numpy(force=True))
    return np.concatenate(states), np.concatenate(rows)


def _ask(lens: Lens, samples: Sequence[Sample], erasers: Erasers) -> tuple[Array, Array]:
    """Return the cross-entropy of each answer's first token in nats, and 1 where it is the most likely text token."""
    losses, right = [], []
    for start in range(0, len(samples), BATCH_SIZE):
        batch = samples[start : start + BATCH_SIZE]
        ids, is_meta = _padded(lens, batch)
        last, label = (torch.tensor([getattr(s, key) for s in batch], device=ids.device) for key in ("last", "label"))
        positions, place = last.unique(return_inverse=True)
        with lens.edit(*_edits(erasers, is_meta)):
            logits = lens(ids, use_cache=False, logits_to_keep=positions).logits
        of_last = logits[torch.arange(len(batch), device=ids.device), place]
        scores = Scores.of_logits(of_last, label, label, int(lens.model.config.meta_token_id))
        losses.append(scores.cross_entropy)
        right.append(scores.accuracy)
    return np.concatenate(losses), np.concatenate(right)


def _padded(lens: Lens, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return the prompts (B, T) and their meta-tokens, (B, T) bool, none of which predicts an answer."""
    ids = padded_prompts(lens, samples)
    last = torch.tensor([sample.last for sample in samples], device=ids.device)
    is_before = torch.arange(ids.shape[1], device=ids.device) < last[:, None]
    return ids, (ids == lens.model.config.meta_token_id) & is_before


def _edits(erasers: Erasers, is_meta: Tensor) -> list[edits.Edit]:
    return [
        edits.transform(f"blocks.{layer}.hook_resid_post", partial(_erase, eraser), at=is_meta)
        for layer, eraser in erasers
    ]


def _erase(eraser: LinearEraser, states: Tensor) -> Tensor:
    mean, projection = (torch.from_numpy(array).to(states) for array in (eraser.mean, eraser.projection))
    return mean + (states - mean) @ projection
