"""How alike the residual of a meta-token and those of the tokens before it are.

Residuals of a language model share a large mean and a few dimensions that outweigh all others (Ethayarajh 2019,
arXiv 1909.00512; Timkey and van Schijndel 2021, arXiv 2109.04404), so a raw cosine near 1 says nothing. Four variants
are measured:

    raw               cos(r_m, r_{m-d})
    centred           after subtracting the mean over all tokens of a calibration text
    z_scored          centred, and each dimension divided by its standard deviation there
    centred_by_kind   after subtracting the mean over the tokens of the same kind, meta-tokens or text: what all
                      meta-tokens share because they have one embedding is then gone as well

The calibration text is another one than the measured. Two controls, measured at the same pairs of positions:

    ordinary   the same document at the same position m and distance d, in a run in which other meta-tokens were
               injected, so that an ordinary token stands at m. (The neighbouring ordinary token of the same run is
               not used: it differs in position, and right before a meta-token it has a special place.)
    shuffled   the same m, but the residual at m - d of another document: what position and anisotropy alone give

Pairs whose earlier token is a meta-token are left out: two meta-tokens have the same embedding.

Shapes: B rows, T positions, C hidden size, states of L + 1 layers: before the first block and after each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.inputs.documents import DocumentSums, FloatArray, choose_other_documents, merge_documents
from metatokens.analysis.inputs.subject import Inputs, shared, stack
from metatokens.analysis.measures import Lines, Row, Rows, measure, rows_over
from metatokens.errors import UsageError
from metatokens.lens.lens import Lens
from metatokens.lens.residuals import capture_residuals, real_tokens

Variant = Literal["raw", "centred", "z_scored", "centred_by_kind"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
DISTANCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FORMS: tuple[Variant, ...] = ("raw", "centred", "z_scored")
"""Those that `cosine` records."""
CENTRED = FORMS.index("centred")
_BATCH = 16


@dataclass(frozen=True)
class Moments:
    """Mean and variance of states seen once, in pieces; float64 (Welford 1962, for pieces Chan et al. 1979)."""

    count: int
    mean: Tensor
    """(C,) float64."""
    squares: Tensor
    """(C,) float64, sum of the squared deviations from the mean."""

    @classmethod
    def empty(cls, width: int) -> Self:
        """Return the moments of no state of so many dimensions."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))

    def add(self, states_NC: Tensor) -> Moments:
        """Return the moments of what was seen so far and of states (n, C), n >= 0."""
        if not len(states_NC):
            return self
        states_NC = states_NC.to(torch.float64)
        mean = states_NC.mean(0)
        return self.merge(Moments(len(states_NC), mean, (states_NC - mean).square().sum(0)))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        squares = self.squares + other.squares + delta.square() * (self.count * other.count / count)
        return Moments(count, mean, squares)

    @property
    def deviation(self) -> Tensor:
        """(C,) float64 standard deviation, of the states as they are and not of a population behind them."""
        return (self.squares / max(self.count, 1)).sqrt()


@dataclass(frozen=True)
class Calibration:
    """Moments of the states of one layer in the calibration text."""

    text: Moments
    meta: Moments
    """Of the meta-tokens; empty where the text has none."""

    @classmethod
    def empty(cls, width: int) -> Self:
        """Return the calibration by no state of so many dimensions."""
        return cls(Moments.empty(width), Moments.empty(width))

    def add(self, states_NC: Tensor, is_meta_N: Tensor) -> Calibration:
        """Return the calibration with states (n, C) added, where `is_meta_N` (n,) bool tells their kind."""
        return Calibration(self.text.add(states_NC[~is_meta_N]), self.meta.add(states_NC[is_meta_N]))


_NO_CALIBRATION = Calibration.empty(0)


def standardize(states_BTC: Tensor, is_meta_BT: Tensor, calibration: Calibration, variant: Variant) -> Tensor:
    """Return the states (B, T, C) of a layer as the variant of the cosine takes them; a new tensor but for "raw".

    A dimension that was constant in the calibration text becomes 0 in "z_scored".

    Raises:
        UsageError: nothing was calibrated, or no meta-token for "centred_by_kind" of states with meta-tokens.
    """
    if variant == "raw":
        return states_BTC
    together = calibration.text.merge(calibration.meta)
    if not together.count or (variant == "centred_by_kind" and is_meta_BT.any() and not calibration.meta.count):
        raise UsageError(
            f"cosine {variant}",
            expected="a calibration text with tokens of the kinds that are measured",
            found=f"{calibration.text.count} text tokens and {calibration.meta.count} meta-tokens in it",
            remedy="calibrate on text into which meta-tokens were injected alike",
        )
    if variant == "centred_by_kind":
        means = torch.stack([calibration.text.mean, calibration.meta.mean]).to(states_BTC)
        return states_BTC - means[is_meta_BT.long()]
    centred = states_BTC - together.mean.to(states_BTC)
    if variant == "centred":
        return centred
    deviation = together.deviation
    return centred * torch.where(deviation > 0, 1 / deviation, 0).to(states_BTC)


def select_pairs(queries_BT: Tensor, keys_BT: Tensor, distances: Sequence[int]) -> Tensor:
    """Tell which pairs (m, m - d) are measured: (B, T, num_distances) bool, True if m is a query and m - d a key.

    Args:
        queries_BT: (B, T) bool.
        keys_BT: (B, T) bool.
        distances: at least 1 each.
    """
    if min(distances, default=1) < 1:
        raise UsageError("distances", expected="integers above 0", found=str(distances), remedy="count from 1")
    pairs = torch.zeros(*queries_BT.shape, len(distances), dtype=torch.bool, device=queries_BT.device)
    for index, distance in enumerate(distances):
        pairs[:, distance:, index] = queries_BT[:, distance:] & keys_BT[:, : max(keys_BT.shape[1] - distance, 0)]
    return pairs


def sum_cosines(queries_BTC: Tensor, keys_BTC: Tensor, pairs: Tensor, distances: Sequence[int]) -> FloatArray:
    """Return, for each row and distance d, the sum over its pairs of cos(query state at m, key state at m - d).

    The cosine with a vector of zeros is 0. Cosines have the dtype of the states; sums are float64.

    Args:
        queries_BTC: (B, T, C).
        keys_BTC: (B, T, C), the same tensor or, for the control, that of other documents.
        pairs: (B, T, num_distances) bool, see `select_pairs`.
        distances: as for `select_pairs`.

    Returns:
        (B, num_distances).
    """
    unit_queries = torch.nn.functional.normalize(queries_BTC, dim=-1)
    unit_keys = unit_queries if keys_BTC is queries_BTC else torch.nn.functional.normalize(keys_BTC, dim=-1)
    sums = np.zeros((pairs.shape[0], len(distances)))
    for index, distance in enumerate(distances):
        rows, positions = pairs[..., index].nonzero(as_tuple=True)
        cosines = (unit_queries[rows, positions] * unit_keys[rows, positions - distance]).sum(-1)
        np.add.at(sums[:, index], rows.numpy(force=True), cosines.double().numpy(force=True))
    return sums


@dataclass(frozen=True)
class CosineCurves:
    """Cosine by layer and distance, for one kind of token, and its control."""

    variants: tuple[Variant, ...]
    distances: tuple[int, ...]
    own: DocumentSums
    """(num_documents, num_variants, L + 1, num_distances)."""
    shuffled: DocumentSums
    """The same with the earlier state of another document, at the same pairs."""

    @classmethod
    def merge(cls, parts: Sequence[CosineCurves]) -> Self:
        """Add up what was measured in several batches."""
        own, shuffled = merge_documents([p.own for p in parts]), merge_documents([p.shuffled for p in parts])
        return cls(parts[0].variants, parts[0].distances, own, shuffled)


@dataclass(frozen=True)
class ExcessCosine:
    """Meta-tokens beside ordinary tokens at the same positions of the same documents; all arms at the same pairs."""

    meta: CosineCurves
    ordinary: CosineCurves

    @classmethod
    def merge(cls, parts: Sequence[ExcessCosine]) -> Self:
        """Add up what was measured in several batches."""
        return cls(CosineCurves.merge([p.meta for p in parts]), CosineCurves.merge([p.ordinary for p in parts]))

    @property
    def over_ordinary(self) -> DocumentSums:
        """R2: meta-tokens minus ordinary tokens."""
        return self.meta.own - self.ordinary.own

    @property
    def over_shuffled(self) -> DocumentSums:
        """Meta-tokens with their own past minus with that of another document."""
        return self.meta.own - self.meta.shuffled


def matched_pairs(
    meta_run_BT: Tensor, control_run_BT: Tensor, distances: Sequence[int], *, partners: Tensor, keep_BT: Tensor
) -> Tensor:
    """Return the pairs, (B, T, num_distances) bool, at which all arms of `ExcessCosine` can be measured.

    Args:
        meta_run_BT: (B, T) bool, the meta-tokens of the run that is asked about.
        control_run_BT: (B, T) bool, those of the same texts with other meta-tokens.
        distances: see `select_pairs`.
        partners: (B,) int64, the row of another document for each row.
        keep_BT: (B, T) bool, False at padding of either run.
    """
    queries = meta_run_BT & ~control_run_BT & keep_BT
    ordinary = ~meta_run_BT & ~control_run_BT & keep_BT
    return select_pairs(queries, ordinary & ordinary[partners], distances)


# on a model ------------------------------------------------------------------------------------------------------


def calibrate(lens: Lens, batches: Iterable[Mapping[str, Tensor]]) -> list[Calibration]:
    """Return the moments of each of the L + 1 layers over a text that is not measured.

    Args:
        lens: on the model.
        batches: its inputs, `input_ids` (B, T) with meta-tokens injected as in what is measured, and where there is
            padding `attention_mask`; other entries are ignored.

    Raises:
        UsageError: no batch.
    """
    calibrations: list[Calibration] = []
    for batch in batches:
        input_ids, attention_mask = batch["input_ids"], batch.get("attention_mask")
        states = capture_residuals(lens, input_ids, attention_mask=attention_mask)
        keep, is_meta = real_tokens(input_ids, attention_mask), lens.is_meta(input_ids)
        calibrations = calibrations or [Calibration.empty(states[0].shape[-1]) for _ in states]
        calibrations = [
            calibration.add(layer[keep].cpu(), is_meta[keep].cpu())
            for calibration, layer in zip(calibrations, states, strict=True)
        ]
    if not calibrations:
        raise UsageError("calibration", expected="a text", found="no batch", remedy="hold back some documents")
    return calibrations


def measure_cosines(
    lens: Lens,
    input_ids: Tensor,
    pairs: Tensor,
    *,
    documents: npt.ArrayLike,
    partners: Tensor,
    calibrations: Sequence[Calibration],
    distances: Sequence[int] = DISTANCES,
    variants: Sequence[Variant] = VARIANTS,
    attention_mask: Tensor | None = None,
) -> CosineCurves:
    """Measure R1 in one forward pass, for any kind of token and any model that the lens takes.

    Args:
        lens: on the model.
        input_ids: (B, T).
        pairs: (B, T, num_distances) bool, see `select_pairs`; m - d must be a real token in the partner's row too.
        documents: (B,) integers, the document of each row.
        partners: (B,) int64, the row of another document for each row; see `choose_other_documents`.
        calibrations: of the L + 1 layers; may be empty where `variants` is ("raw",).
        distances: of the pairs.
        variants: of the cosine.
        attention_mask: (B, T), 0 at padding.
    """
    is_meta = lens.is_meta(input_ids)
    own, shuffled = [], []
    for layer, raw in enumerate(capture_residuals(lens, input_ids, attention_mask=attention_mask)):
        for variant in variants:
            calibration = calibrations[layer] if variant != "raw" else _NO_CALIBRATION
            states = standardize(raw, is_meta, calibration, variant)
            own.append(sum_cosines(states, states, pairs, distances))
            shuffled.append(sum_cosines(states, states[partners], pairs, distances))
    counts = pairs.sum(1).numpy(force=True)[:, None, None]

    def by_document(sums: list[FloatArray]) -> DocumentSums:
        layers_first = np.stack(sums, axis=1).reshape(len(input_ids), -1, len(variants), len(distances))
        return DocumentSums.of_sums(documents, layers_first.swapaxes(1, 2), counts)

    return CosineCurves(tuple(variants), tuple(distances), by_document(own), by_document(shuffled))


def measure_excess_cosine(
    lens: Lens,
    meta_run: Tensor,
    control_run: Tensor,
    *,
    documents: npt.ArrayLike,
    calibrations: Sequence[Calibration],
    seed: int,
    distances: Sequence[int] = DISTANCES,
    variants: Sequence[Variant] = VARIANTS,
    attention_mask: Tensor | None = None,
) -> ExcessCosine:
    """Measure R2 in two forward passes: meta-tokens, and ordinary tokens at the same places.

    Args:
        lens: on the model.
        meta_run: (B, T) ids with meta-tokens.
        control_run: (B, T), the same texts with as many meta-tokens injected under another seed.
        documents: (B,) integers, the document of each row; at least two.
        calibrations: see `measure_cosines`.
        seed: of the choice of the other document, PCG64.
        distances: in positions, meta-tokens counted.
        variants: of the cosine.
        attention_mask: (B, T), 0 at padding, which is the same in both runs.

    Raises:
        UsageError: the runs are not of the same texts, or one document has more than half of the rows.
    """
    is_meta, is_control_meta = lens.is_meta(meta_run), lens.is_meta(control_run)
    same_shape = meta_run.shape == control_run.shape and torch.equal(is_meta.sum(1), is_control_meta.sum(1))
    if not same_shape or not torch.equal(meta_run[~is_meta], control_run[~is_control_meta]):
        raise UsageError(
            "control run",
            expected="the same text in every row, with as many meta-tokens at other places",
            found="another text" if same_shape else "rows with other numbers of tokens",
            remedy="inject into the same blocks with another seed",
        )
    partners = torch.from_numpy(choose_other_documents(documents, seed=seed)).to(meta_run.device)
    keep = real_tokens(meta_run, attention_mask)
    pairs = matched_pairs(is_meta, is_control_meta, distances, partners=partners, keep_BT=keep)
    meta, ordinary = (
        measure_cosines(
            lens,
            input_ids,
            pairs,
            documents=documents,
            partners=partners,
            calibrations=calibrations,
            distances=distances,
            variants=variants,
            attention_mask=attention_mask,
        )
        for input_ids in (meta_run, control_run)
    )
    return ExcessCosine(meta, ordinary)


# Measures --------------------------------------------------------------------------------------------------------


@shared
def distances_of(inputs: Inputs) -> list[int]:
    """Return the distances of the config that fit into half of a document."""
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
    """Return the mean states of the calibration documents."""
    return calibrate(inputs.lens, [{"input_ids": document.input_ids} for document in inputs.subject.calibration])


@shared
def cosines_of(inputs: Inputs) -> ExcessCosine:
    """Return the cosines of meta-tokens with earlier text, beside those of ordinary tokens at the same places."""
    documents, control = inputs.subject.documents, inputs.subject.control
    # even batches, since the shuffled control of a document is another one of its batch
    batches = np.array_split(np.arange(len(documents)), math.ceil(len(documents) / _BATCH))
    return ExcessCosine.merge(
        [
            measure_excess_cosine(
                inputs.lens,
                stack([documents[row] for row in rows]),
                stack([control[row] for row in rows]),
                documents=rows,
                calibrations=calibrations_of(inputs),
                seed=inputs.config.seed,
                distances=distances_of(inputs),
                variants=FORMS,
            )
            for rows in batches
        ]
    )


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
    found, distances = cosines_of(inputs), distances_of(inputs)
    curves = {"meta": found.meta.own, "ordinary": found.ordinary.own, "meta, shuffled": found.meta.shuffled}
    for kind, sums in curves.items():
        means = sums.means  # (documents, forms, layers + 1, distances)
        axes = FORMS, range(means.shape[2]), distances
        for row in rows_over(means, *axes, names=("form", "layer", "distance")):
            yield row._replace(at={"kind": kind, **row.at})


@measure("similarity", "1", axes=("layer", "distance"), test=True, subject="text", plot=Lines("distance", by="layer"))
def excess_cosine(inputs: Inputs) -> Rows:
    """Centred cosine of a meta-token minus that of an ordinary token at the same place."""
    excess = cosines_of(inputs).over_ordinary.means[:, CENTRED]
    yield from rows_over(excess, range(excess.shape[1]), distances_of(inputs), names=("layer", "distance"))


@measure("similarity", "1", test=True, subject="text")
def near_excess_cosine(inputs: Inputs) -> Rows:
    """Excess cosine at distance 1, mean over the layers behind the first block's entry."""
    if distances_of(inputs)[0] == 1:
        yield Row({}, cosines_of(inputs).over_ordinary.means[:, CENTRED, 1:, 0].mean(axis=1))


@measure("similarity", "1", test=True, subject="text")
def fading_cosine(inputs: Inputs) -> Rows:
    """Centred cosine of meta-tokens at distance 1 minus that at the largest distance, mean over layers."""
    distances = distances_of(inputs)
    if distances[0] == 1 and len(distances) > 1:
        means = cosines_of(inputs).meta.own.means[:, CENTRED, 1:]
        yield Row({}, (means[..., 0] - means[..., -1]).mean(axis=1))
