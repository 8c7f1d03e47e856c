"""Whether the model uses what a probe finds: the answer taken out of the meta-tokens' states, and asked for again.

A linear eraser (LEACE, Belrose et al. 2023) removes what linear probes find of the answer from the states of all
meta-tokens, behind one layer or behind all, one after the other. Erasers are fitted to half of the instances and tested
on the other half. The control erases shuffled labels; what costs no more than that is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.compression.heads import LabelledStates
from metatokens.analysis.compression.probes import v_information
from metatokens.analysis.inputs.documents import sum_by_document
from metatokens.analysis.inputs.labelled_states import BATCH_SIZE, Sample, padded_prompts, samples_of
from metatokens.analysis.inputs.scores import Scores, logits_at
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Dots, Row, Rows, measure
from metatokens.errors import UsageError
from metatokens.lens import edits
from metatokens.lens.lens import Lens

ERASED_LABELS = 16
"""The most frequent answers, whose instances alone are erased and asked: with as many labels as dimensions an eraser
takes everything."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LinearEraser:
    """A projection after which no linear probe tells the labels apart better than their frequencies do."""

    mean: Array
    """(C,): stays where it is."""
    projection: Array
    """(C, C): x becomes mean + (x - mean) @ projection."""

    def erase(self, states: Tensor) -> Tensor:
        """Return states (..., C) without the information, in their dtype."""
        mean, projection = (torch.from_numpy(array).to(states) for array in (self.mean, self.projection))
        return mean + (states - mean) @ projection


def fit_eraser(states: npt.ArrayLike, labels: npt.ArrayLike) -> LinearEraser:
    """Return the least change of the states after which every label has the same mean state (LEACE).

    With W the inverse root of the states' covariance and P the projection onto the span of W cov(x, labels), a state
    loses W^+ P W (x - mean). Exact for the states it is fitted to; a pure function.

    Args:
        states: (n, C) finite, such as those of training documents.
        labels: (n,)

    Raises:
        ValueError: shapes that do not fit, fewer than two labels, or a state that is not finite.
    """
    labelled = LabelledStates.check(states, labels, np.zeros(len(np.asarray(labels))))
    mean = labelled.states.mean(axis=0)
    centered = labelled.states - mean
    one_hot = np.eye(labelled.num_classes)[labelled.classes]
    variances, directions = np.linalg.eigh(centered.T @ centered / len(centered))
    # directions in which the states do not move carry nothing
    kept = variances > variances.max() * len(mean) * np.finfo(np.float64).eps
    roots, basis = np.sqrt(variances[kept]), directions[:, kept]
    whitener, inverse = (basis / roots) @ basis.T, (basis * roots) @ basis.T
    left, singular, _ = np.linalg.svd(whitener @ (centered.T @ (one_hot - one_hot.mean(axis=0))), full_matrices=False)
    span = left[:, singular > singular.max() * len(mean) * np.finfo(np.float64).eps]
    return LinearEraser(mean, np.eye(len(mean)) - whitener @ span @ span.T @ inverse)


Erasers = list[tuple[int, LinearEraser]]
"""Layers, rising, and what is done to the meta-tokens that leave them."""


@dataclass(frozen=True)
class Erasure:
    """What an erasure behind some layers changed; arrays of shape (tested instances,)."""

    at: dict[str, str | int]
    """The layer; nothing where all were erased."""
    erased: Erasers
    """Of the answer."""
    loss: Array
    """Rise of the answer's cross-entropy, nats."""
    loss_of_shuffled: Array
    accuracy: Array
    """Change of whether the answer is the most likely text token."""
    accuracy_of_shuffled: Array


@dataclass(frozen=True)
class Erasures:
    """All erasures of a model, and the instances that they were tested on."""

    tested: list[Sample]
    found: list[Erasure]


@shared
def erasures_of(inputs: Inputs) -> Erasures:
    """Erase the answer behind each layer, and behind all one after the other, and ask for it again.

    Raises:
        UsageError: fewer than two answers in a half of the instances.
    """
    lens, samples = inputs.lens, samples_of(inputs)
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
    shuffled = np.random.Generator(np.random.PCG64(inputs.config.seed)).permutation(true)
    full_loss, full_right = _ask(lens, tested, [])
    single = [[layer] for layer in range(len(lens.layout.blocks) - 1)]  # what leaves the last reaches no other token
    every = [layer for layers in single for layer in layers]
    found = []
    for layers in [*single, *([every] if len(every) > 1 else [])]:
        of_answer, of_shuffled = (fit_erasers(lens, fitted, labels, layers) for labels in (true, shuffled))
        (loss, right), (control_loss, control_right) = (_ask(lens, tested, one) for one in (of_answer, of_shuffled))
        found.append(
            Erasure(
                at={"layer": layers[0]} if len(layers) == 1 else {},
                erased=of_answer,
                loss=loss - full_loss,
                loss_of_shuffled=control_loss - full_loss,
                accuracy=right - full_right,
                accuracy_of_shuffled=control_right - full_right,
            )
        )
    return Erasures(tested, found)


@measure(
    "probes",
    "nats",
    axes=("layer", "erased"),
    subject="task",
    plot=Dots("layer", by="erased"),
    positive="the model uses what was erased",
)
def erasure_loss(inputs: Inputs) -> Rows:
    """Rise of the answer's loss once the answer, or shuffled labels, are erased from the meta-tokens."""
    for one in erasures_of(inputs).found:
        yield Row({**one.at, "erased": "answer"}, one.loss)
        yield Row({**one.at, "erased": "shuffled"}, one.loss_of_shuffled)


@measure(
    "probes",
    "nats",
    axes=("layer",),
    test=True,
    subject="task",
    plot=Dots("layer"),
    positive="the model uses what was erased",
)
def erasure_excess(inputs: Inputs) -> Rows:
    """Rise of the answer's loss once it is erased, minus that of erasing shuffled labels."""
    for one in erasures_of(inputs).found:
        yield Row(one.at, one.loss - one.loss_of_shuffled)


@measure("probes", "1", axes=("layer", "erased"), subject="task", positive="the model uses what was erased")
def answers_lost_to_erasure(inputs: Inputs) -> Rows:
    """Accuracy of the whole model minus that once the answer, or shuffled labels, are erased."""
    for one in erasures_of(inputs).found:
        yield Row({**one.at, "erased": "answer"}, -one.accuracy)
        yield Row({**one.at, "erased": "shuffled"}, -one.accuracy_of_shuffled)


@measure("probes", "nats", axes=("layer", "erased"), subject="task")
def erasure_information(inputs: Inputs) -> Rows:
    """What a probe finds of the answer in a meta-token's state after a layer, before and after the erasure."""
    erasures = erasures_of(inputs)
    for one in erasures.found:
        for name, erasers in (("nothing", []), ("answer", one.erased)) if one.at else ():
            yield from _probe_meta_tokens(inputs, erasures.tested, int(one.at["layer"]), erasers, name)


def _probe_meta_tokens(
    inputs: Inputs, samples: Sequence[Sample], layer: int, erasers: Erasers, erased: str
) -> Iterator[Row]:
    """Yield what a probe finds of the answer in the states that were, or were not, erased."""
    states, rows = meta_states(inputs.lens, samples, layer, erasers)
    labels = np.array([sample.label for sample in samples])[rows]
    try:
        found = v_information(states, labels, rows, config=inputs.config.probe, seed=inputs.config.seed)
    except UsageError as error:
        inputs.skip(f"probe of the erased states: {error}")
        return
    documents, gained = found.document_ids, found.pointwise.mean(axis=0)
    means = sum_by_document(documents, gained) / sum_by_document(documents, np.ones(len(documents)))
    yield Row({"layer": layer, "erased": erased}, means)


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
            lens.run(ids)
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
        with lens.edit(*_edits(erasers, is_meta)):
            scores = Scores.of_logits(logits_at(lens, ids, last), label, label, lens.meta_token_id)
        losses.append(scores.cross_entropy)
        right.append(scores.accuracy)
    return np.concatenate(losses), np.concatenate(right)


def _padded(lens: Lens, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return the prompts (B, T) and their meta-tokens, (B, T) bool, none of which predicts an answer."""
    ids = padded_prompts(lens, samples)
    last = torch.tensor([sample.last for sample in samples], device=ids.device)
    is_before = torch.arange(ids.shape[1], device=ids.device) < last[:, None]
    return ids, lens.is_meta(ids) & is_before


def _edits(erasers: Erasers, is_meta: Tensor) -> list[edits.Edit]:
    return [edits.transform(f"blocks.{layer}.hook_resid_post", eraser.erase, at=is_meta) for layer, eraser in erasers]
