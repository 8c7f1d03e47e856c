"""How alike the residual of a meta-token and those of the tokens before it are.

Residuals of a language model share a large mean and a few dimensions that outweigh all others (Ethayarajh 2019,
arXiv 1909.00512; Timkey and van Schijndel 2021, arXiv 2109.04404), so a raw cosine near 1 says nothing. Three forms
are measured:

    raw        cos(r_m, r_{m-d})
    centred    after subtracting the mean over all tokens of a calibration text
    z_scored   centred, and each dimension divided by its standard deviation there

The calibration documents are others than the measured ones. Two controls, measured at the same pairs of positions:

    ordinary   the same document at the same position m and distance d, in a run in which other meta-tokens were
               injected, so that an ordinary token stands at m. (The neighbouring ordinary token of the same run is
               not used: it differs in position, and right before a meta-token it has a special place.)
    shuffled   the same m, but the residual at m - d of another document: what position and anisotropy alone give

Pairs whose earlier token is a meta-token are left out: two meta-tokens have the same embedding.

Shapes: B rows, one a document, T positions, C hidden size, states of L + 1 layers: before the first block and after
each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from metatokens.analysis.inputs.documents import FloatArray, choose_other_documents
from metatokens.analysis.inputs.subject import Inputs, shared, stack
from metatokens.analysis.measures import Lines, Row, Rows, measure, rows_over
from metatokens.errors import UsageError
from metatokens.lens.lens import Lens
from metatokens.lens.residuals import capture_residuals

Form = Literal["raw", "centred", "z_scored"]
FORMS: tuple[Form, ...] = get_args(Form)
CENTRED = FORMS.index("centred")
_BATCH = 16


class Calibration(NamedTuple):
    """Mean and deviation of the states of one layer over the calibration text."""

    mean: Tensor
    """(C,) float64."""
    deviation: Tensor
    """(C,) float64, of the states as they are and not of a population behind them."""

    @classmethod
    def of(cls, states_NC: Tensor) -> Calibration:
        """Return that of states (n, C)."""
        deviation, mean = torch.std_mean(states_NC.double(), dim=0, correction=0)
        return cls(mean, deviation)


def calibrate(lens: Lens, documents: Sequence[Tensor]) -> list[Calibration]:
    """Return the calibration of each of the L + 1 layers.

    Args:
        lens: on the model.
        documents: ids (1, T) with meta-tokens injected as in what is measured, at least one.
    """
    states = [capture_residuals(lens, input_ids) for input_ids in documents]
    return [Calibration.of(torch.cat(layer, dim=1)[0]) for layer in zip(*states, strict=True)]


def standardize(states_BTC: Tensor, calibration: Calibration, form: Form) -> Tensor:
    """Return the states (B, T, C) of a layer as that form of the cosine takes them; a new tensor but for "raw".

    A dimension that was constant in the calibration text becomes 0 in "z_scored".
    """
    if form == "raw":
        return states_BTC
    centred = states_BTC - calibration.mean.to(states_BTC)
    if form == "centred":
        return centred
    return centred * torch.where(calibration.deviation > 0, 1 / calibration.deviation, 0).to(states_BTC)


def select_pairs(queries_BT: Tensor, keys_BT: Tensor, distances: Sequence[int]) -> Tensor:
    """Tell which pairs (m, m - d) are measured: (B, T, num_distances) bool, True if m is a query and m - d a key.

    Args:
        queries_BT: (B, T) bool.
        keys_BT: (B, T) bool.
        distances: at least 1 each.

    Raises:
        ValueError: a distance below 1.
    """
    if min(distances, default=1) < 1:
        raise ValueError(f"distances count from 1, not {distances}")
    pairs = torch.zeros(*queries_BT.shape, len(distances), dtype=torch.bool, device=queries_BT.device)
    for index, distance in enumerate(distances):
        pairs[:, distance:, index] = queries_BT[:, distance:] & keys_BT[:, : max(keys_BT.shape[1] - distance, 0)]
    return pairs


def matched_pairs(is_meta_BT: Tensor, is_control_BT: Tensor, distances: Sequence[int], partners: Tensor) -> Tensor:
    """Return the pairs, (B, T, num_distances) bool, at which `Cosines` can be measured in all three ways.

    Args:
        is_meta_BT: (B, T) bool, the meta-tokens of the run that is asked about.
        is_control_BT: (B, T) bool, those of the same texts with other meta-tokens.
        distances: see `select_pairs`.
        partners: (B,) int64, the row of another document for each row.
    """
    ordinary = ~is_meta_BT & ~is_control_BT
    return select_pairs(is_meta_BT & ~is_control_BT, ordinary & ordinary[partners], distances)


def mean_cosines(
    states: Sequence[Tensor],
    pairs: Tensor,
    distances: Sequence[int],
    *,
    calibrations: Sequence[Calibration],
    partners: Tensor | None = None,
) -> FloatArray:
    """Return, row by row, the mean of cos(state at m, state at m - d) over its pairs, by form, layer and distance d.

    The cosine with a vector of zeros is 0. Cosines have the dtype of the states; means are float64.

    Args:
        states: of L + 1 layers, (B, T, C) each.
        pairs: (B, T, num_distances) bool, see `select_pairs`.
        distances: of the pairs.
        calibrations: of the L + 1 layers.
        partners: (B,) int64, the row that the earlier state is taken from; None takes it from the same row.

    Returns:
        (B, forms, L + 1, num_distances), NaN where a row has no pair.
    """
    sums = np.zeros((len(pairs), len(FORMS), len(states), len(distances)))
    for layer, (raw, calibration) in enumerate(zip(states, calibrations, strict=True)):
        for number, form in enumerate(FORMS):
            units = torch.nn.functional.normalize(standardize(raw, calibration, form), dim=-1)
            earlier = units if partners is None else units[partners]
            for index, distance in enumerate(distances):
                rows, positions = pairs[..., index].nonzero(as_tuple=True)
                cosines = (units[rows, positions] * earlier[rows, positions - distance]).sum(-1)
                place = sums[:, number, layer, index]
                np.add.at(place, rows.numpy(force=True), cosines.double().numpy(force=True))
    counts = pairs.sum(1).numpy(force=True)[:, None, None]
    means: FloatArray = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means


class Cosines(NamedTuple):
    """Cosines with earlier text tokens, at the same pairs, (documents, forms, L + 1, num_distances) each."""

    meta: FloatArray
    """Of meta-tokens."""
    shuffled: FloatArray
    """Of meta-tokens with the earlier state of another document."""
    ordinary: FloatArray
    """Of the ordinary tokens that stand at their places in the other run."""

    @property
    def excess(self) -> FloatArray:
        """Those of meta-tokens minus those of ordinary tokens."""
        excess: FloatArray = self.meta - self.ordinary
        return excess


def compare_cosines(
    lens: Lens,
    meta_run: Tensor,
    control_run: Tensor,
    *,
    calibrations: Sequence[Calibration],
    distances: Sequence[int],
    seed: int,
) -> Cosines:
    """Measure meta-tokens, and ordinary tokens at the same places, in two forward passes.

    Args:
        lens: on the model.
        meta_run: (B, T) ids with meta-tokens, at least two rows, without padding.
        control_run: (B, T), the same texts with as many meta-tokens injected under another seed.
        calibrations: of the L + 1 layers.
        distances: in positions, meta-tokens counted.
        seed: of the choice of the other document, PCG64.

    Raises:
        ValueError: the runs are not of the same texts, or a single row.
    """
    is_meta, is_control_meta = lens.is_meta(meta_run), lens.is_meta(control_run)
    same_shape = meta_run.shape == control_run.shape and torch.equal(is_meta.sum(1), is_control_meta.sum(1))
    if not same_shape or not torch.equal(meta_run[~is_meta], control_run[~is_control_meta]):
        raise ValueError("the control run must hold the same texts, each with as many meta-tokens at other places")
    partners = torch.from_numpy(choose_other_documents(len(meta_run), seed=seed)).to(meta_run.device)
    pairs = matched_pairs(is_meta, is_control_meta, distances, partners)
    states = capture_residuals(lens, meta_run)
    return Cosines(
        meta=mean_cosines(states, pairs, distances, calibrations=calibrations),
        shuffled=mean_cosines(states, pairs, distances, calibrations=calibrations, partners=partners),
        ordinary=mean_cosines(capture_residuals(lens, control_run), pairs, distances, calibrations=calibrations),
    )


# Measures --------------------------------------------------------------------------------------------------------


@shared
def distances_of(inputs: Inputs) -> list[int]:
    """Return the distances of the config that fit into half of a document.

    Raises:
        UsageError: none does.
    """
    longest = inputs.subject.documents[0].input_ids.shape[1]
    distances = [distance for distance in inputs.config.distances if distance < longest // 2]
    if not distances:
        raise UsageError(
            "distances",
            expected=f"one below {longest // 2}, half a document",
            found=str(inputs.config.distances),
            remedy="lower them, or raise subject.window",
        )
    if len(distances) < len(inputs.config.distances):
        inputs.skip(f"similarity at distances from {longest // 2}, half a document")
    return distances


@shared
def calibrations_of(inputs: Inputs) -> list[Calibration]:
    """Return mean and deviation of the states of the calibration documents."""
    return calibrate(inputs.lens, [document.input_ids for document in inputs.subject.calibration])


@shared
def cosines_of(inputs: Inputs) -> Cosines:
    """Return the cosines of meta-tokens with earlier text, beside those of ordinary tokens at the same places."""
    documents, control = inputs.subject.documents, inputs.subject.control
    lengths = {document.input_ids.shape[1] for document in documents}
    if len(documents) < 2 or len(lengths) > 1 or len(control) != len(documents) or not inputs.subject.calibration:
        raise UsageError(
            "documents for cosines",
            expected="two or more of one length, a control of each, and documents for calibration",
            found=f"{len(documents)} of {len(lengths)} lengths, {len(control)} controls, "
            f"{len(inputs.subject.calibration)} for calibration",
            remedy="give the subject what is missing",
        )
    # even batches, since the shuffled control of a document is another one of its batch
    batches = np.array_split(np.arange(len(documents)), math.ceil(len(documents) / _BATCH))
    parts = [
        compare_cosines(
            inputs.lens,
            stack([documents[row] for row in rows]),
            stack([control[row] for row in rows]),
            calibrations=calibrations_of(inputs),
            distances=distances_of(inputs),
            seed=inputs.config.seed,
        )
        for rows in batches
    ]
    return Cosines(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@measure(
    "similarity",
    "1",
    axes=("kind", "form", "layer", "distance"),
    subject="text",
    plot=Lines("distance", by="layer", panels="kind"),
)
def cosine(inputs: Inputs) -> Rows:
    """Cosine of a token's state with that of the text token a distance before it: raw, centred or z-scored.

    Of meta-tokens, of ordinary tokens at the same places, and of meta-tokens with another document.
    """
    found = cosines_of(inputs)
    kinds = {"meta": found.meta, "ordinary": found.ordinary, "meta, shuffled": found.shuffled}
    for kind, means in kinds.items():
        axes = FORMS, range(means.shape[2]), distances_of(inputs)
        for row in rows_over(means, *axes, names=("form", "layer", "distance")):
            yield row._replace(at={"kind": kind, **row.at})


@measure(
    "similarity",
    "1",
    axes=("layer", "distance"),
    test=True,
    subject="text",
    plot=Lines("distance", by="layer"),
    positive="the meta-token resembles that text more",
)
def excess_cosine(inputs: Inputs) -> Rows:
    """Centred cosine of a meta-token minus that of an ordinary token at the same place."""
    excess = cosines_of(inputs).excess[:, CENTRED]
    yield from rows_over(excess, range(excess.shape[1]), distances_of(inputs), names=("layer", "distance"))


@measure("similarity", "1", test=True, subject="text", positive="the meta-token resembles the text before it more")
def near_excess_cosine(inputs: Inputs) -> Rows:
    """Excess cosine at distance 1, mean over the layers after the first block's entry."""
    if 1 not in distances_of(inputs):
        inputs.skip("similarity: near_excess_cosine needs distance 1")
        return
    yield Row({}, cosines_of(inputs).excess[:, CENTRED, 1:, 0].mean(axis=1))


@measure("similarity", "1", test=True, subject="text", positive="the resemblance fades")
def fading_cosine(inputs: Inputs) -> Rows:
    """Centred cosine of meta-tokens at distance 1 minus that at the largest distance, mean over layers."""
    distances = distances_of(inputs)
    if distances[0] != 1 or len(distances) < 2:
        inputs.skip("similarity: fading_cosine needs distance 1 and a larger one")
        return
    means = cosines_of(inputs).meta[:, CENTRED, 1:]
    yield Row({}, (means[..., 0] - means[..., -1]).mean(axis=1))
