"""What a probe can read from a state: usable information, and the length of an online code.

V-information (Xu et al. 2020) is what a family of predictors gains from the state, I_V = H_V(Y|nothing) - H_V(Y|X) on
documents that were not trained on, its share of one state the PVI (Ethayarajh et al. 2022). The online code (Voita and
Titov 2020) pays for the labels block by block, each with a probe trained on those before, and so counts the size of the
probe too. Both have a control with shuffled labels: what a probe "finds" there, it made up. All in nats. Deliberately
not here: what the labels are, and the states to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from metatokens.analysis.compression.heads import (
    Array,
    Fit,
    Indices,
    LabelledStates,
    Parameters,
    cross_entropies,
    draw_batches,
    fit_stack,
    frequency_code,
    init_linear,
    linear,
    note_unfinished,
    random_generator,
    split_documents,
    stack_generators,
)
from metatokens.analysis.inputs.labelled_states import ANSWER, META_STATE, States, states_of
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Dots, Row, Rows, measure
from metatokens.config.analysis import FittedState, MlpProbe, ProbeConfig
from metatokens.data.injection import IntArray
from metatokens.errors import UsageError
from metatokens.evaluation.significance import check_documents
from metatokens.evaluation.statistics import Interval

FIRST_BLOCK_DOCUMENTS = 2
"""The fewest documents of the online code's first block: one to train on and one to stop on."""
PAST_STATES: tuple[FittedState, ...] = (META_STATE, "token before it", "untrained")
"""Asked for what stands before them, too."""
ITSELF = ("token before it", "the token before")
"""State and target that are one token."""
CODED_STATES: tuple[FittedState, ...] = (META_STATE, "token before it", "last token")
"""Of which an online code is made: ten probes each."""


class VInformation(NamedTuple):
    """What the probes of one state gain on the test documents, in nats; G seeds, n test states."""

    pointwise: Array
    """(G, n): PVI, ln p(y|x) - ln p(y); its mean is I_V, negative where the probe learned what does not hold."""
    shuffled_pointwise: Array
    """(G, n): the same where labels were shuffled over all states before training; about 0 or below."""
    codes: Array
    """(G, n): -ln p(y|x), what the probe leaves of each label; its mean is H_V(Y|X)."""
    converged: npt.NDArray[np.bool_]
    """(G,)"""
    document_ids: Indices
    """(n,) of the test states."""


class OnlineCode(NamedTuple):
    """The length in nats of all labels of one state, sent block by block; G seeds."""

    lengths: Array
    """(G,): the first block at ln K a label, each other with the probe of the blocks before."""
    shuffled_lengths: Array
    """(G,): the same for shuffled labels."""
    uniform_length: float
    """n ln K: no model at all."""
    prior_length: float
    """The first block at ln K a label, each other with the frequencies of the blocks before: what labels alone tell."""
    block_ends: tuple[int, ...]
    """Number of states up to the end of each block."""
    converged: npt.NDArray[np.bool_]
    """(G,): of the probes of all blocks."""


def v_information(
    states: npt.ArrayLike, labels: npt.ArrayLike, document_ids: npt.ArrayLike, *, config: ProbeConfig, seed: int
) -> VInformation:
    """Train probes of all seeds, and their controls, and measure what they gain on test documents.

    A pure function of its arguments. The split depends on the seed, the documents and the config alone, so two states
    of the same documents are paired.

    Args:
        states: (n, C) finite.
        labels: (n,); every label that occurs is a class.
        document_ids: (n,) integers; a document is in one part of the split alone.
        config: the probe and its training.
        seed: of everything drawn.

    Raises:
        UsageError: too few documents.
        ValueError: shapes that do not fit, or a state that is not finite.
        NumericError: a probe that diverged.
    """
    labelled = LabelledStates.check(states, labels, document_ids)
    split = split_documents(labelled.document_ids, config, seed=seed)
    scaled = labelled.standardized(split.train)
    classes = _with_shuffled(labelled, config.num_seeds, seed)
    fit = _fit_probes(labelled, scaled, classes, split.train, split.validation, config, seed)
    test_classes = classes[:, split.test]
    codes = cross_entropies(_logits(fit.parameters, scaled[split.test]), test_classes).double().numpy()
    pairs = zip(test_classes.numpy(), classes[:, split.train].numpy(), strict=True)
    null = np.stack([frequency_code(test, train, labelled.num_classes) for test, train in pairs])
    num_seeds = config.num_seeds
    return VInformation(
        pointwise=(null - codes)[:num_seeds],
        shuffled_pointwise=(null - codes)[num_seeds:],
        codes=codes[:num_seeds],
        converged=fit.converged[:num_seeds],
        document_ids=labelled.document_ids[split.test],
    )


def online_code(
    states: npt.ArrayLike, labels: npt.ArrayLike, document_ids: npt.ArrayLike, *, config: ProbeConfig, seed: int
) -> OnlineCode:
    """Return the length of the labels' online code given the states.

    Documents are shuffled, and a block ends with a document. The states are known to both sides, so all of them
    standardise; a probe stops on the last `validation_share` of the documents before its block.

    Args:
        states: (n, C) finite.
        labels: (n,); every label that occurs is a class.
        document_ids: (n,) integers.
        config: the probe, its training and the blocks.
        seed: of everything drawn.

    Raises:
        UsageError: fewer documents than `minimum_documents`.
        ValueError: shapes that do not fit, or a state that is not finite.
        NumericError: a probe that diverged.
    """
    labelled = LabelledStates.check(states, labels, document_ids)
    documents, places = np.unique(labelled.document_ids, return_inverse=True)
    check_documents(len(documents), config.minimum_documents)
    ranks = random_generator(seed, "blocks").permutation(len(documents))[places]
    scaled = labelled.standardized(np.arange(len(ranks)))
    classes = _with_shuffled(labelled, config.num_seeds, seed)
    # blocks that are too short for a document of their own merge
    ends = sorted({max(FIRST_BLOCK_DOCUMENTS, math.ceil(share * len(documents))) for share in config.code_shares})
    uniform = math.log(labelled.num_classes)
    first = int((ranks < ends[0]).sum()) * uniform
    lengths, prior_length = np.full(len(classes), first), first
    converged = np.ones(len(classes), dtype=bool)
    for end, next_end in pairwise(ends):
        start = end - min(max(1, round(config.validation_share * end)), end - 1)
        train, validation, block = (
            np.flatnonzero((ranks >= low) & (ranks < high)) for low, high in ((0, start), (start, end), (end, next_end))
        )
        fit = _fit_probes(labelled, scaled, classes, train, validation, config, seed)
        codes = cross_entropies(_logits(fit.parameters, scaled[block]), classes[:, block])
        lengths = lengths + codes.double().sum(1).numpy()
        converged &= fit.converged
        seen = labelled.classes[ranks < end]
        prior_length += float(frequency_code(labelled.classes[block], seen, labelled.num_classes).sum())
    num_seeds = config.num_seeds
    return OnlineCode(
        lengths=lengths[:num_seeds],
        shuffled_lengths=lengths[num_seeds:],
        uniform_length=len(ranks) * uniform,
        prior_length=prior_length,
        block_ends=tuple(int((ranks < end).sum()) for end in ends),
        converged=converged[:num_seeds],
    )


def _with_shuffled(labelled: LabelledStates, num_seeds: int, seed: int) -> Tensor:
    """Return classes (2 G, n): the true ones for each seed, then each seed's shuffled ones."""
    shuffled = [random_generator(seed, "labels", head).permutation(labelled.classes) for head in range(num_seeds)]
    return torch.from_numpy(np.stack([labelled.classes] * num_seeds + shuffled))


def _fit_probes(
    labelled: LabelledStates,
    scaled: Tensor,
    classes: Tensor,
    train: Indices,
    validation: Indices,
    config: ProbeConfig,
    seed: int,
) -> Fit:
    """Train one probe for each row of classes (2 G, n); a probe and its control draw the same.

    They start as predictors that ignore the state, with the labels' frequencies, which the family thus contains.
    """

    def generators(purpose: str) -> list[torch.Generator]:
        return [one for _ in range(2) for one in stack_generators(config.num_seeds, seed=seed, purpose=purpose)]

    parameters: Parameters = {}
    num_inputs = scaled.shape[1]
    if isinstance(config.probe, MlpProbe):
        size = config.probe.hidden_size
        parameters["hidden.weight"], parameters["hidden.bias"] = init_linear(generators("weights"), num_inputs, size)
        num_inputs = size
    parameters["output.weight"] = torch.zeros(len(classes), num_inputs, labelled.num_classes)
    every_class = np.arange(labelled.num_classes)
    codes = [frequency_code(every_class, one, labelled.num_classes) for one in classes[:, train].numpy()]
    parameters["output.bias"] = -torch.from_numpy(np.stack(codes)).float().unsqueeze(1)
    batch_generators = generators("batches")
    train_states, train_classes = scaled[train], classes[:, train]
    heads = torch.arange(len(classes)).unsqueeze(1)

    def batch_loss(current: Parameters) -> Tensor:
        rows = draw_batches(batch_generators, len(train), config.batch_size)
        return cross_entropies(_logits(current, train_states[rows]), train_classes[heads, rows]).mean(1)

    def validation_loss(current: Parameters) -> Tensor:
        return cross_entropies(_logits(current, scaled[validation]), classes[:, validation]).mean(1)

    return fit_stack(parameters, batch_loss, validation_loss, config)


def _logits(parameters: Parameters, states: Tensor) -> Tensor:
    """Return logits (G, n, classes) of states (G, n, C), or (n, C) for all probes alike."""
    if "hidden.weight" in parameters:
        states = functional.gelu(linear(states, parameters["hidden.weight"], parameters["hidden.bias"]))
    return linear(states, parameters["output.weight"], parameters["output.bias"])


# Measures --------------------------------------------------------------------------------------------------------


@shared
def probes_of(inputs: Inputs) -> dict[tuple[str, str], VInformation]:
    """Return the probes of the answer in every state, and of the other labels in some, by (state, target)."""
    collected = states_of(inputs)
    found = {}
    for name, states in collected.states.items():
        for target, labels in collected.labels.items():
            if target == ANSWER or (name in PAST_STATES and (name, target) != ITSELF):
                probe = _probe(inputs, name, states, target, labels)
                if probe is not None:
                    found[name, target] = probe
    return found


def _probe(inputs: Inputs, name: str, states: States, target: str, labels: IntArray) -> VInformation | None:
    """Fit a probe of a label; where too few instances have one, or all the same, say so."""
    exists = labels >= 0
    if len(np.unique(labels[exists])) < 2:
        inputs.skip(f"probe of {target}: it is the same in all instances")
        return None
    config = inputs.config
    try:
        found = v_information(
            states[exists], labels[exists], np.flatnonzero(exists), config=config.probe, seed=config.seed
        )
    except UsageError as error:
        inputs.skip(f"probe of {target} in {int(exists.sum())} instances that have it: {error}")
        return None
    note_unfinished(inputs, "probes", f"heads of {name} for {target}", found.converged)
    return found


@measure(
    "probes",
    "nats",
    axes=("state", "target"),
    subject="task",
    plot=Dots("state", by="target"),
    positive="the state tells the label",
)
def usable_information(inputs: Inputs) -> Rows:
    """Usable information of a probe about a label: what it saves over the labels' frequencies."""
    for (state, target), found in probes_of(inputs).items():
        yield Row({"state": state, "target": target}, found.pointwise.mean(axis=0))


@measure(
    "probes",
    "nats",
    axes=("state", "target"),
    subject="task",
    plot=Dots("state", by="target"),
    positive="the state tells the label",
)
def selectivity(inputs: Inputs) -> Rows:
    """Usable information minus what a probe of shuffled labels finds."""
    for (state, target), found in probes_of(inputs).items():
        gained = found.pointwise.mean(axis=0) - found.shuffled_pointwise.mean(axis=0)
        yield Row({"state": state, "target": target}, gained)


@measure("probes", "nats", axes=("state", "target"), subject="task")
def remaining_entropy(inputs: Inputs) -> Rows:
    """Cross-entropy of the answer under the probe's prediction."""
    for (state, target), found in probes_of(inputs).items():
        if target == ANSWER:
            yield Row({"state": state, "target": target}, found.codes.mean(axis=0))


@shared
def codes_of(inputs: Inputs) -> dict[str, OnlineCode]:
    """Return the online codes of the answers by some states."""
    collected = states_of(inputs)
    answers = collected.labels[ANSWER]
    if len(np.unique(answers)) < 2:
        return {}
    config, numbers = inputs.config, np.arange(len(answers))
    codes: dict[str, OnlineCode] = {}
    for name, states in collected.states.items():
        if name in CODED_STATES:
            codes[name] = online_code(states, answers, numbers, config=config.probe, seed=config.seed)
            note_unfinished(inputs, "probes", f"heads of {name} for the online code", codes[name].converged)
    return codes


@measure("probes", "ratio", axes=("state",), statistic="given", subject="task", plot=Dots("state"))
def compression(inputs: Inputs) -> Rows:
    """Length n ln K of all answers over that of the probe's online code."""
    yield from _code_rows(inputs, lambda code: code.uniform_length / code.lengths.mean())


@measure("probes", "ratio", axes=("state",), statistic="given", subject="task")
def compression_of_prior(inputs: Inputs) -> Rows:
    """Length of all answers coded by their frequencies over that of the probe's online code.

    Above 1, the state tells more than it costs to learn.
    """
    yield from _code_rows(inputs, lambda code: code.prior_length / code.lengths.mean())


@measure("probes", "ratio", axes=("state",), statistic="given", subject="task")
def compression_of_shuffled(inputs: Inputs) -> Rows:
    """Length n ln K of all answers over that of the online code where they were shuffled."""
    yield from _code_rows(inputs, lambda code: code.uniform_length / code.shuffled_lengths.mean())


def _code_rows(inputs: Inputs, ratio: Callable[[OnlineCode], float]) -> Iterator[Row]:
    num_labels = len(states_of(inputs).labels[ANSWER])
    for name, code in codes_of(inputs).items():
        note = "one code of all instances: no interval"
        yield Row({"state": name}, Interval(float(ratio(code)), None, None), num_labels, note)
