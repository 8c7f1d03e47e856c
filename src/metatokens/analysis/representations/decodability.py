"""How much of the text before a token a linear map reads from its state, and linear CKA of two sets.

What is to be read is the mean of the token embeddings of the last w text tokens before the position, without position
encodings and without meta-tokens, whose embedding is always the same. Two numbers, both on documents that had no part
in the fit: R² of a ridge regression, and the mean reciprocal rank at which its prediction finds the own prefix
among the prefixes of other documents. Prefixes of the same document are no candidates: they overlap with the own one.

Shapes: n states, C hidden size, K size of the target; B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.inputs.documents import FloatArray, IntArray, sum_by_document
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Lines, Row, Rows, measure
from metatokens.analysis.representations.places import Places, places_of
from metatokens.config.analysis import MINIMUM_DOCUMENTS
from metatokens.errors import UsageError
from metatokens.evaluation.statistics import Interval
from metatokens.lens.lens import Lens
from metatokens.lens.residuals import capture_residuals, mean_of_last

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2)
WINDOWS = (1, 4, 16, 64)
FOLDS = 5
MINIMUM_FOLDS = 3  # one to test, one to choose the penalty, one to fit
MINIMUM_CKA_PAIRS = 4  # the unbiased estimate divides by n - 3
CKA_WINDOW = 16  # text tokens; one window, since every interval costs as many CKAs as there are documents
CKA_PAIRS = 2_000
"""Fewer give a note."""
_NORMAL_95 = 1.96
_CANDIDATES_AT_A_TIME = 2**24  # bounds the memory of the similarities


class Decodability(NamedTuple):
    """What a ridge regression reads, document by document, each held out of its fit; (num_documents,) each."""

    residual_squares: FloatArray
    """Sum of |y - prediction|^2 over the states of a document."""
    total_squares: FloatArray
    """Sum of |y - mean of the fit's documents|^2."""
    reciprocal_rank: FloatArray
    """Mean of 1 / rank of the own prefix."""
    chance: FloatArray
    """The mean reciprocal rank of a random order of as many candidates."""


def held_out_ridge(
    states_NC: Tensor,
    targets_NK: Tensor,
    documents: npt.ArrayLike,
    *,
    seed: int,
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
) -> Decodability:
    """Fit the targets linearly from the states on some documents and score the others, each document once.

    Documents are dealt into folds; one is scored, the next chooses the penalty, the rest are fitted. States are
    z-scored by the fitted documents. A pure function of its arguments; float64.

    Args:
        states_NC: (n, C).
        targets_NK: (n, K).
        documents: (n,) integers.
        seed: of the deal, PCG64.
        penalties: ridge penalties, per state and in units of a state dimension's variance.
        folds: at least 3.

    Raises:
        UsageError: fewer documents than folds.
        ValueError: fewer than 3 folds, or penalties that are not above 0.
    """
    return held_out_ridges(states_NC, targets_NK[None], documents, seed=seed, penalties=penalties, folds=folds)[0]


def held_out_ridges(
    states_NC: Tensor,
    targets_SNK: Tensor,
    documents: npt.ArrayLike,
    *,
    seed: int,
    penalties: Sequence[float] = PENALTIES,
    folds: int = FOLDS,
) -> list[Decodability]:
    """Do as `held_out_ridge` for several targets, (S, n, K), of the same states, which are decomposed once for all."""
    if folds < MINIMUM_FOLDS or min(penalties, default=0) <= 0:
        raise ValueError(f"a held-out ridge needs penalties above 0, not {penalties}, and 3 folds or more, not {folds}")
    _, group, sizes = np.unique(np.asarray(documents), return_inverse=True, return_counts=True)
    if len(sizes) < folds:
        raise UsageError(
            "held-out ridge",
            expected=f"at least {folds} documents",
            found=str(len(sizes)),
            remedy="measure more documents",
        )
    states, targets = states_NC.double().cpu(), targets_SNK.double().cpu()
    fold_of_document = np.random.Generator(np.random.PCG64(seed)).permutation(len(sizes)) % folds
    fold = torch.from_numpy(fold_of_document[group])
    residual, total, ranks = (torch.zeros(targets.shape[:2], dtype=torch.float64) for _ in range(3))
    for tested in range(folds):
        choosing = fold == (tested + 1) % folds
        test = fold == tested
        spectrum = Spectrum(states[~test & ~choosing])
        for number, of_set in enumerate(targets):
            fit = RidgePath(spectrum, of_set[~test & ~choosing])
            errors = fit.errors(states[choosing], of_set[choosing], penalties)
            predicted = fit.predict(states[test], penalties[int(np.argmin(errors))])
            residual[number, test] = (predicted - of_set[test]).square().sum(-1)
            total[number, test] = (of_set[test] - fit.target_mean).square().sum(-1)
            ranks[number, test] = reciprocal_ranks(
                predicted - fit.target_mean, of_set - fit.target_mean, own=test.nonzero()[:, 0], documents=group
            )
    chance = np.array([chance_reciprocal_rank(len(group) - size + 1) for size in sizes.tolist()])
    return [
        Decodability(
            residual_squares=sum_by_document(group, residual[number]),
            total_squares=sum_by_document(group, total[number]),
            reciprocal_rank=sum_by_document(group, ranks[number]) / sizes,
            chance=chance,
        )
        for number in range(len(targets))
    ]


class Spectrum:
    """The states of a data set, z-scored, and the eigendecomposition of their correlations."""

    def __init__(self, states: Tensor) -> None:
        """Decompose states (n, C), float64."""
        self.mean = states.mean(0)
        deviation = states.std(0, correction=0)
        self.scale = torch.where(deviation > 0, 1 / deviation, 0)
        self.inputs = (states - self.mean) * self.scale
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.inputs.T @ self.inputs / len(states))


class RidgePath:
    """Ridge regressions of one data set for any penalty."""

    def __init__(self, states: Spectrum, targets: Tensor) -> None:
        """Prepare the regressions of targets (n, K), float64, on states."""
        self.states = states
        self.target_mean = targets.mean(0)
        self.projected = states.eigenvectors.T @ (states.inputs.T @ (targets - self.target_mean) / len(targets))

    def weights(self, penalty: float) -> Tensor:
        """Return (C, K): a state less the mean of the states times these, plus `target_mean`, is the prediction."""
        spectrum = self.states
        of_scaled = spectrum.eigenvectors @ (self.projected / (spectrum.eigenvalues.clamp(min=0) + penalty)[:, None])
        weights: Tensor = spectrum.scale[:, None] * of_scaled
        return weights

    def predict(self, states: Tensor, penalty: float) -> Tensor:
        """Return the predictions (n, K) for states (n, C)."""
        predicted: Tensor = (states - self.states.mean) @ self.weights(penalty) + self.target_mean
        return predicted

    def errors(self, states: Tensor, targets: Tensor, penalties: Sequence[float]) -> list[float]:
        """Return the squared error of the predictions of targets (n, K) for states (n, C) at each penalty.

        In the basis of the eigenvectors a prediction is Z diag(d) P, where only d depends on the penalty, so that its
        error is |Y|^2 - 2 d . diag(Z^T Y P^T) + d . (Z^T Z * P P^T) d: one product for all penalties.
        """
        turned = (states - self.states.mean) * self.states.scale @ self.states.eigenvectors
        wanted = targets - self.target_mean
        linear = ((turned.T @ wanted) * self.projected).sum(-1)
        square = (turned.T @ turned) * (self.projected @ self.projected.T)
        factors = [1 / (self.states.eigenvalues.clamp(min=0) + penalty) for penalty in penalties]
        return [float(wanted.square().sum() - 2 * d @ linear + d @ square @ d) for d in factors]


def reciprocal_ranks(predictions_NK: Tensor, targets_MK: Tensor, *, own: Tensor, documents: IntArray) -> Tensor:
    """Return 1 / rank of each prediction's own target among it and the targets of other documents, by cosine.

    Of targets that are as near as the own one, half count as nearer, so a constant prediction ranks in the middle.

    Args:
        predictions_NK: (n, K).
        targets_MK: (m, K), the candidates.
        own: (n,) int64, the index of each prediction's own target.
        documents: (m,) integers, the document of each candidate.

    Returns:
        (n,) float64.
    """
    predictions = torch.nn.functional.normalize(predictions_NK.double(), dim=-1)
    targets = torch.nn.functional.normalize(targets_MK.double(), dim=-1)
    of_document = torch.from_numpy(np.asarray(documents, dtype=np.int64)).to(own.device)
    rows_at_a_time = max(1, _CANDIDATES_AT_A_TIME // max(len(targets), 1))
    ranks = []
    for rows, index in zip(predictions.split(rows_at_a_time), own.split(rows_at_a_time), strict=True):
        similarity = rows @ targets.T
        own_similarity = similarity.gather(1, index[:, None])
        other = of_document[None] != of_document[index][:, None]
        nearer, as_near = (similarity > own_similarity) & other, (similarity == own_similarity) & other
        ranks.append(1 + nearer.sum(1) + as_near.sum(1) / 2)
    return 1 / torch.cat(ranks).double()


def chance_reciprocal_rank(num_candidates: int) -> float:
    """Return the mean reciprocal rank of a random order: (1 + 1/2 + ... + 1/n) / n."""
    return float((1 / np.arange(1, num_candidates + 1)).mean())


def debiased_linear_cka(first_NC: Tensor, second_NK: Tensor) -> float:
    """Return the linear centred kernel alignment of two sets of states, by the unbiased HSIC.

    1 for the same states up to rotation, scale and offset; about 0 for independent ones, whatever the sizes, which the
    biased estimate is not (Kornblith et al. 2019; Song et al. 2012, eq. 5; Nguyen et al. 2021). Costs n C K: the n x n
    kernels are never made. NaN where it is undefined: of fewer than 4 pairs, or of a set without any variance.

    Args:
        first_NC: (n, C).
        second_NK: (n, K), the paired states.

    Raises:
        ValueError: sets of unequal size.
    """
    if len(first_NC) != len(second_NK):
        raise ValueError(f"CKA is of paired states, not of {len(first_NC)} and {len(second_NK)}")
    if len(first_NC) < MINIMUM_CKA_PAIRS:
        return math.nan
    first, second = (states.double() - states.double().mean(0) for states in (first_NC, second_NK))
    spread = _unbiased_hsic(first, first) * _unbiased_hsic(second, second)
    return float(_unbiased_hsic(first, second) / spread**0.5) if spread > 0 else math.nan


def cka_without_each_document(first_NC: Tensor, second_NK: Tensor, documents: npt.ArrayLike) -> FloatArray:
    """Return the CKA with each document left out in turn, (num_documents,) in order of their ids, for a jackknife."""
    ids = np.asarray(documents, dtype=np.int64)
    keeps = [torch.from_numpy(ids != left_out).to(first_NC.device) for left_out in np.unique(ids)]
    return np.array([debiased_linear_cka(first_NC[keep], second_NK[keep]) for keep in keeps])


def _unbiased_hsic(first: Tensor, second: Tensor) -> float:
    """Return Song's estimate for linear kernels K = X X^T and L = Y Y^T without their diagonals, from X and Y."""
    num = len(first)
    first_diagonal, second_diagonal = first.square().sum(-1), second.square().sum(-1)
    first_rows = first @ first.sum(0) - first_diagonal
    second_rows = second @ second.sum(0) - second_diagonal
    trace = (first.T @ second).square().sum() - first_diagonal @ second_diagonal
    totals = first_rows.sum() * second_rows.sum() / ((num - 1) * (num - 2))
    return float((trace + totals - 2 / (num - 2) * (first_rows @ second_rows)) / (num * (num - 3)))


class PrefixStates(NamedTuple):
    """States of all layers beside what is to be read from them; `held_out_ridge` and CKA take one layer and window."""

    states: Tensor
    """(L + 1, n, C) float32."""
    prefixes: Tensor
    """(num_windows, n, C) float32, see `mean_of_last`."""
    documents: IntArray
    """(n,)."""


def collect_prefix_states(lens: Lens, places: Places, windows: Sequence[int] = WINDOWS) -> PrefixStates:
    """Collect the states of some places and the text right before them; places with too little text are left out.

    Args:
        lens: on the model.
        places: of one kind.
        windows: numbers of text tokens.

    Raises:
        UsageError: no document has such a place.
    """
    states, prefixes, documents = [], [], []
    for number, input_ids, ends in places.by_document():
        text = ~lens.is_meta(input_ids)
        embeddings = lens.model.get_input_embeddings()(input_ids).detach().float()
        _, enough = mean_of_last(embeddings, text, max(windows))
        kept = ends & enough
        kept[:, : places.steps_back] = False
        read = torch.roll(kept, -places.steps_back, dims=1)
        states.append(torch.stack(capture_residuals(lens, input_ids, at=read)).cpu())
        means = [mean_of_last(embeddings, text, window)[0][kept].float() for window in windows]
        prefixes.append(torch.stack(means).cpu())
        documents.append(np.full(int(kept.sum()), number))
    return PrefixStates(torch.cat(states, dim=1), torch.cat(prefixes, dim=1), np.concatenate(documents))


# Measures --------------------------------------------------------------------------------------------------------


class _Read(NamedTuple):
    """What was read from the states of one kind of place."""

    state: str
    collected: PrefixStates
    windows: Sequence[int]
    by_window: Sequence[Sequence[Decodability]]
    """For each window, of each layer."""

    def rows(self) -> Iterator[tuple[dict[str, str | int], Decodability]]:
        """Yield the coordinates of each window and layer with what was read there."""
        for window, layers in zip(self.windows, self.by_window, strict=True):
            for layer, read in enumerate(layers):
                yield {"state": self.state, "layer": layer, "window": window}, read


@shared
def readings_of(inputs: Inputs) -> list[_Read]:
    """Return what a linear map reads of the last tokens from each layer's states, held out by document.

    Raises:
        UsageError: documents too short for any window, or too few of them.
    """
    shortest = min(document.input_ids.shape[1] for document in inputs.subject.documents)
    windows = [window for window in WINDOWS if window <= shortest // 4]
    if not windows:
        raise UsageError(
            "documents for decodability",
            expected=f"at least {4 * WINDOWS[0]} positions each",
            found="shorter ones",
            remedy="analyse longer documents",
        )

    readings = []
    for places in places_of(inputs):
        collected = collect_prefix_states(inputs.lens, places, windows)
        by_layer = [
            held_out_ridges(states, collected.prefixes, collected.documents, seed=inputs.config.seed)
            for states in collected.states
        ]
        by_window = [list(layers) for layers in zip(*by_layer, strict=True)]
        readings.append(_Read(places.name, collected, windows, by_window))
    return readings


@measure(
    "decodability",
    "1",
    axes=("state", "layer", "window"),
    statistic="explained",
    plot=Lines("layer", by="state", panels="window"),
)
def decodability(inputs: Inputs) -> Rows:
    """Held-out R² of a ridge regression from a state to the mean embedding of the last text tokens before it."""
    for reading in readings_of(inputs):
        for at, read in reading.rows():
            yield Row(at, np.stack([read.residual_squares, read.total_squares], axis=1))


@measure(
    "decodability",
    "1",
    axes=("state", "layer", "window"),
    plot=Lines("layer", by="state", panels="window", level="prefix_rank_chance"),
)
def prefix_rank(inputs: Inputs) -> Rows:
    """Mean reciprocal rank at which the regression finds the own prefix among those of other documents."""
    for reading in readings_of(inputs):
        for at, read in reading.rows():
            yield Row(at, read.reciprocal_rank)


@measure("decodability", "1", axes=("state", "window"))
def prefix_rank_chance(inputs: Inputs) -> Rows:
    """Mean reciprocal rank of a random order of as many prefixes."""
    for reading in readings_of(inputs):
        for window, layers in zip(reading.windows, reading.by_window, strict=True):
            yield Row({"state": reading.state, "window": window}, layers[-1].chance)


@measure("decodability", "1", axes=("state", "layer", "window"), statistic="given", plot=Lines("layer", by="state"))
def cka(inputs: Inputs) -> Rows:
    """Debiased linear CKA of states and the mean embeddings of the last tokens, with a jackknife interval."""
    for reading in readings_of(inputs):
        window = min(CKA_WINDOW, reading.windows[-1])
        targets = reading.collected.prefixes[reading.windows.index(window)]
        for layer, states in enumerate(reading.collected.states):
            at: dict[str, str | int] = {"state": reading.state, "layer": layer, "window": window}
            yield from _cka_row(at, states, targets, reading.collected.documents)


def _cka_row(at: dict[str, str | int], states: Tensor, targets: Tensor, documents: IntArray) -> Iterator[Row]:
    """Yield the CKA with a jackknife interval: in a bootstrap, a document drawn twice would resemble itself."""
    estimate = debiased_linear_cka(states, targets)
    without = cka_without_each_document(states, targets, documents)
    if not np.isfinite([estimate, *without]).all():  # before the first block all meta-tokens are the same
        return
    num_documents = len(without)
    variance = (num_documents - 1) / num_documents * ((without - without.mean()) ** 2).sum()
    reach = _NORMAL_95 * float(np.sqrt(variance))
    enough = num_documents >= MINIMUM_DOCUMENTS
    interval = Interval(estimate, estimate - reach, estimate + reach) if enough else Interval(estimate, None, None)
    notes = [] if enough else [f"fewer than {MINIMUM_DOCUMENTS} documents: no interval"]
    if len(states) < CKA_PAIRS:
        notes.append(f"{len(states)} pairs, of which {CKA_PAIRS} are wanted")
    yield Row(at, interval, num_documents, "; ".join(notes) or None)
