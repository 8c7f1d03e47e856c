"""How much of an answer a state can hold at a given rate: a variational information bottleneck on fixed states.

Paper section 5 and its rate-distortion study. An encoder q(z|x) with a diagonal Gaussian, a learned prior r(z) and a
linear decoder p(y|z) are trained on D + beta R over a grid of beta, on documents of their own. In nats, on the test
documents,

    R = mean KL(q(z|x) || r(z))        >= I(Z;X)
    D = mean over z ~ q of -ln p(y|z)  >= H(Y|Z) >= H(Y|X)       so  R + D >= H(Y)  and  I(Z;Y) >= H(Y) - D.

The rate is a bound on what z holds of the state, at small beta a loose one (several times the truth): curves are to be
compared at equal rate, on their lower convex hulls, never point by point. Deviation: the grid of beta goes from 1e-4 to
2; the paper's goes from 0.01 to 1, and the curves here reach rates on both sides of it.

All states are asked for the first token of the last answer. The paper's claim is judged by its own comparison, against
the last token, which has read the question too. Deviation: the meta-token's state is compared with six more states, of
which the token right before it has read the same prefix and is judged as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from metatokens.analysis.compression.bottleneck import BottleneckStack
from metatokens.analysis.compression.heads import (
    Array,
    Indices,
    LabelledStates,
    corrected_entropy,
    frequency_code,
    note_unfinished,
    select_heads,
    split_documents,
)
from metatokens.analysis.inputs.labelled_states import ANSWER, META_STATE, states_of
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Dots, Row, Rows, measure
from metatokens.config.analysis import RateDistortionConfig
from metatokens.errors import UsageError
from metatokens.evaluation.significance import bca_from_draws, check_documents
from metatokens.evaluation.statistics import BOOTSTRAP_RESAMPLES, Interval


@dataclass(frozen=True)
class RateDistortionCurve:
    """What the heads of one state reach on the test documents; every number is in nats."""

    betas: Array
    """(betas,), rising."""
    rates: Array
    """(betas, seeds, n): R of each test state."""
    distortions: Array
    """(betas, seeds, n): D of each test state."""
    converged: npt.NDArray[np.bool_]
    """(betas, seeds): False where the steps ran out before the validation loss stood still."""
    zero_rate_distortions: Array
    """(n,): D at rate 0, of a decoder that knows the frequencies of the training labels."""
    document_ids: Indices
    """(n,) of the test states."""

    @property
    def points(self) -> Array:
        """(betas, 2): rate and distortion, means over seeds and test states."""
        return np.stack([self.rates.mean(axis=(1, 2)), self.distortions.mean(axis=(1, 2))], axis=1)

    def hull(self) -> Array:
        """Return the lower hull of the points and of rate 0, (vertices, 2); see `lower_hull`."""
        return lower_hull(np.vstack([[0, self.zero_rate_distortions.mean()], self.points]))


class HullComparison(NamedTuple):
    """The first state's curve against the other's at equal rate; positive means lower distortion for the first."""

    area: Interval
    """Nats squared: the integral of the other's hull minus the first's, from rate 0 to the smaller of the two largest
    measured rates."""
    mean_gap: Interval
    """Nats: the area over the width of that range."""
    num_documents: int


def rate_distortion_curve(
    states: npt.ArrayLike,
    labels: npt.ArrayLike,
    document_ids: npt.ArrayLike,
    *,
    config: RateDistortionConfig,
    seed: int,
) -> RateDistortionCurve:
    """Train the heads of one state over the grid of beta, all seeds at once, and measure them on test documents.

    A pure function of its arguments. The split, first weights (at equal C), batches and noise depend on the seed, the
    documents and the config alone, so two states of the same documents are paired.

    Args:
        states: (n, C) finite.
        labels: (n,), such as the token ids of answers; every label that occurs is a class of the decoder.
        document_ids: (n,) integers; a document is in one part of the split alone.
        config: the grid, the head and its training.
        seed: of everything drawn.

    Raises:
        UsageError: too few documents.
        ValueError: shapes that do not fit, or a state that is not finite.
        NumericError: a head that diverged.
    """
    labelled = LabelledStates.check(states, labels, document_ids)
    split = split_documents(labelled.document_ids, config, seed=seed)
    heads = BottleneckStack(labelled, split, config, seed=seed)
    first = parameters = heads.init_parameters()
    at_betas = []
    for beta in reversed(config.betas):
        fit = heads.fit(parameters, beta)
        reached = heads.measure(fit.parameters)
        at_betas.append((reached.rates, reached.distortions, fit.converged))
        parameters = select_heads(reached.train_rates < config.collapsed_rate, first, fit.parameters)
    test_classes, train_classes = labelled.classes[split.test], labelled.classes[split.train]
    rates, distortions, converged = (np.stack(values) for values in zip(*reversed(at_betas), strict=True))
    return RateDistortionCurve(
        betas=np.array(config.betas),
        rates=rates,
        distortions=distortions,
        converged=converged,
        zero_rate_distortions=frequency_code(test_classes, train_classes, labelled.num_classes),
        document_ids=labelled.document_ids[split.test],
    )


def lower_hull(points: npt.ArrayLike) -> Array:
    """Return the vertices of the lower convex hull of points (n, 2), by rising rate and falling distortion.

    Any point of it is reached by sharing time between two heads. Past its last vertex a higher rate does not help, so
    the curve is flat there.
    """
    ordered = sorted(map(tuple, np.asarray(points, dtype=np.float64).tolist()))
    hull: list[tuple[float, ...]] = []
    for rate, distortion in ordered:
        if hull and distortion >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (rate - hull[-2][0]) >= (distortion - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((rate, distortion))
    return np.array(hull)


def hull_area(hull: Array, until: float) -> float:
    """Return the integral of a hull's distortion over rates from its first vertex to `until`, flat past its last."""
    inside = hull[hull[:, 0] < until]
    rates = np.append(inside[:, 0], until)
    distortions = np.append(inside[:, 1], np.interp(until, hull[:, 0], hull[:, 1]))
    return float(np.trapezoid(distortions, rates))


def compare_hulls(
    first: RateDistortionCurve,
    other: RateDistortionCurve,
    *,
    seed: int,
    resamples: int = BOOTSTRAP_RESAMPLES,
) -> HullComparison:
    """Return the area between two hulls with BCa intervals, resampling documents and seeds, the same for both.

    Both hulls start at rate 0, where neither state says anything. The range of rates is found anew in each resample.

    Args:
        first: the curve that is claimed to be lower.
        other: of the same test states, labels and seeds.
        seed: of the generator, PCG64.
        resamples: number of draws.

    Raises:
        UsageError: fewer than `MINIMUM_DOCUMENTS` test documents.
        ValueError: curves that are not paired.
    """
    if (
        first.rates.shape[1:] != other.rates.shape[1:]
        or not np.array_equal(first.document_ids, other.document_ids)
        or not np.array_equal(first.zero_rate_distortions, other.zero_rate_distortions)
    ):
        raise ValueError("curves are compared on the same test states, labels and number of seeds")
    num_documents, num_seeds = len(np.unique(first.document_ids)), first.rates.shape[1]
    check_documents(num_documents)
    sums = _DocumentSums(first), _DocumentSums(other)
    generator = np.random.Generator(np.random.PCG64(seed))
    draws = np.array(
        [_gap(sums, _draw(generator, num_documents), _draw(generator, num_seeds)) for _ in range(resamples)]
    )
    ones = np.ones(num_documents), np.ones(num_seeds)
    left_out = [np.array([_gap(sums, ones[0] - unit, ones[1]) for unit in np.eye(num_documents)])]
    if num_seeds > 1:
        left_out.append(np.array([_gap(sums, ones[0], ones[1] - unit) for unit in np.eye(num_seeds)]))
    estimate = _gap(sums, *ones)
    area, mean_gap = (
        bca_from_draws(estimate[column], draws[:, column], [values[:, column] for values in left_out])
        for column in (0, 1)
    )
    return HullComparison(area, mean_gap, num_documents)


class _DocumentSums:
    """Sums over the test states of each document, so that a resample of documents is a product."""

    def __init__(self, curve: RateDistortionCurve) -> None:
        order = np.argsort(curve.document_ids, kind="stable")
        _, starts, counts = np.unique(curve.document_ids[order], return_index=True, return_counts=True)
        self.counts: Array = counts.astype(np.float64)
        self.zero_rate: Array = np.add.reduceat(curve.zero_rate_distortions[order], starts)
        # documents come last, after betas and seeds
        self.rates: Array = np.add.reduceat(curve.rates[..., order], starts, axis=-1)
        self.distortions: Array = np.add.reduceat(curve.distortions[..., order], starts, axis=-1)

    def points(self, documents: Array, seeds: Array) -> Array:
        """Return the points (1 + betas, 2) of documents and seeds by how often each was drawn."""
        total = float(self.counts @ documents)
        rates, distortions = (
            (values @ documents) @ seeds / (total * seeds.sum()) for values in (self.rates, self.distortions)
        )
        zero = [[0.0, float(self.zero_rate @ documents) / total]]
        return np.vstack([zero, np.stack([rates, distortions], axis=1)])


def _draw(generator: np.random.Generator, num_units: int) -> Array:
    """Return how often each unit is in a resample with replacement, (num_units,)."""
    return np.bincount(generator.integers(num_units, size=num_units), minlength=num_units).astype(np.float64)


def _gap(sums: tuple[_DocumentSums, _DocumentSums], documents: Array, seeds: Array) -> tuple[float, float]:
    """Return the area between the hulls and the mean gap."""
    first, other = (one.points(documents, seeds) for one in sums)
    until = float(min(first[:, 0].max(), other[:, 0].max()))
    area = hull_area(lower_hull(other), until) - hull_area(lower_hull(first), until)
    return area, area / until if until > 0 else 0.0


# Measures --------------------------------------------------------------------------------------------------------


@shared
def curves_of(inputs: Inputs) -> dict[str, RateDistortionCurve]:
    """Return the curve of every state, all asked for the answer's first token.

    Raises:
        UsageError: all instances have the same answer, or there are too few of them.
    """
    collected = states_of(inputs)
    labels = collected.labels[ANSWER]
    if len(np.unique(labels)) < 2:
        raise UsageError(
            "answers", expected="at least 2 that differ", found="one alone", remedy="choose another task or tokenizer"
        )
    config = inputs.config
    curves = {}
    for name, states in collected.states.items():
        curve = rate_distortion_curve(
            states, labels, np.arange(len(labels)), config=config.rate_distortion, seed=config.seed
        )
        note_unfinished(inputs, "rate_distortion", f"heads of {name}", curve.converged)
        curves[name] = curve
    return curves


@shared
def comparisons_of(inputs: Inputs) -> dict[str, HullComparison]:
    """Return how the last meta-token's hull compares with those of the other states."""
    curves = curves_of(inputs)
    if META_STATE not in curves:
        return {}
    own, seed = curves[META_STATE], inputs.config.seed
    return {name: compare_hulls(own, curve, seed=seed) for name, curve in curves.items() if name != META_STATE}


@measure("rate_distortion", "nats", axes=("state", "beta"), subject="task")
def rate(inputs: Inputs) -> Rows:
    """Rate of the bottleneck's code, KL from its prior, on test instances, mean over heads."""
    for name, curve in curves_of(inputs).items():
        for index, beta in enumerate(curve.betas):
            yield Row({"state": name, "beta": float(beta)}, curve.rates[index].mean(axis=0))


@measure("rate_distortion", "nats", axes=("state", "beta"), subject="task")
def distortion(inputs: Inputs) -> Rows:
    """Cross-entropy of the answer given the bottleneck's code, on test instances, mean over heads."""
    for name, curve in curves_of(inputs).items():
        for index, beta in enumerate(curve.betas):
            yield Row({"state": name, "beta": float(beta)}, curve.distortions[index].mean(axis=0))


@measure("rate_distortion", "nats", statistic="given", subject="task")
def answer_entropy(inputs: Inputs) -> Rows:
    """Entropy of the answers, corrected for their number (Miller and Madow): many labels, few instances."""
    labels = states_of(inputs).labels[ANSWER]
    note = f"of the labels of {len(labels)} instances, Miller-Madow: no interval"
    yield Row({}, Interval(corrected_entropy(labels), None, None), len(labels), note)


@measure(
    "rate_distortion",
    "nats²",
    axes=("against",),
    statistic="given",
    subject="task",
    plot=Dots("against"),
    positive="the meta-token's has the lower distortion at equal rate",
)
def area(inputs: Inputs) -> Rows:
    """Area between the hulls of another state and of the last meta-token."""
    for name, compared in comparisons_of(inputs).items():
        yield Row({"against": name}, compared.area, compared.num_documents)


@measure(
    "rate_distortion",
    "nats",
    axes=("against",),
    statistic="given",
    subject="task",
    positive="the meta-token's has the lower distortion at equal rate",
)
def mean_gap(inputs: Inputs) -> Rows:
    """Area between the two hulls over the width of their common range of rates."""
    for name, compared in comparisons_of(inputs).items():
        yield Row({"against": name}, compared.mean_gap, compared.num_documents)
