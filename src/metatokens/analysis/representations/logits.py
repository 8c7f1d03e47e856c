"""What the model's own output head makes of a state, and what meta-tokens change in the output.

    logit lens          the head applied to the states of earlier layers (nostalgebraist 2020), as they are or put
                        through the affine map to the final state that a regression finds (Din et al. 2023)
    output statistics   what the distribution over the next token is like, in numbers that no shift of the logits moves

All logs are natural. The softmax runs over the whole vocabulary, as in training; no loss ever asked for the meta-token,
so its own probability means nothing. No (B, T, V) tensor is made.

Shapes: n positions, C hidden size, V vocabulary; states of L + 1 layers: before the first block and after each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from metatokens.analysis.inputs.documents import FloatArray
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Dots, Lines, Row, Rows, measure, over_layers, rows_over
from metatokens.analysis.representations.decodability import PENALTIES, RidgePath, Spectrum
from metatokens.analysis.representations.places import places_of
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import ZeroEmbedding, intervene
from metatokens.lens.lens import Lens
from metatokens.lens.residuals import capture_residuals
from metatokens.model.loss import IGNORE_INDEX, targets_of_labels

DISTANCES = (1, 2, 4, 8, 16, 32, 64)
_LOGITS_AT_A_TIME = 2**23  # 32 MiB of float32


@dataclass(frozen=True)
class OutputHead:
    """Final LayerNorm and output projection."""

    gain: Tensor
    """(C,) of the norm."""
    norm_bias: Tensor
    """(C,)."""
    epsilon: float
    weight: Tensor
    """(V, C)."""
    bias: Tensor | None = None
    """(V,)."""

    @classmethod
    def of(cls, lens: Lens) -> Self:
        """Return the head of a model, float32."""
        norm: Any = lens.layout.final_norm
        head: Any = lens.layout.head
        bias = None if head.bias is None else head.bias.detach().float()
        tensors = (norm.weight.detach().float(), norm.bias.detach().float(), norm.eps, head.weight.detach().float())
        return cls(*tensors, bias)

    def scale(self, residual_NC: Tensor) -> Tensor:
        """Return the norm's divisor (n, 1) for residuals (n, C)."""
        return (residual_NC.var(-1, correction=0, keepdim=True) + self.epsilon).sqrt()

    def log_probabilities(self, residual_NC: Tensor) -> Tensor:
        """Return ln p (n, V) of the next token for residuals (n, C) before the final norm."""
        centred = residual_NC - residual_NC.mean(-1, keepdim=True)
        return self.project(centred / self.scale(residual_NC) * self.gain + self.norm_bias).log_softmax(-1)

    def project(self, normalized_NC: Tensor) -> Tensor:
        """Return the logits (n, V) of normed states (n, C)."""
        return torch.nn.functional.linear(normalized_NC, self.weight, self.bias)

    def centred(self) -> OutputHead:
        """Return the head whose logits are these minus their mean over the vocabulary, which no softmax sees."""
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return replace(self, weight=self.weight - self.weight.mean(0), bias=bias)


# logit lens ------------------------------------------------------------------------------------------------------


def preceding_text(input_ids: Tensor, text_BT: Tensor, distances: Sequence[int]) -> Tensor:
    """Return the ids of the text tokens that stand d text tokens before each position; -100 where there is none.

    Distance 1 is the last text token strictly before the position.

    Args:
        input_ids: (B, T).
        text_BT: (B, T) bool, True at text tokens.
        distances: at least 1 each.

    Returns:
        (B, T, num_distances) int64.
    """
    before = text_BT.long().cumsum(1) - text_BT.long()
    order = torch.argsort((~text_BT).to(torch.int8), dim=1, stable=True)  # text first, in its order
    text_ids = input_ids.gather(1, order)
    columns = [before - distance for distance in distances]
    ids = [torch.where(column >= 0, text_ids.gather(1, column.clamp(min=0)), IGNORE_INDEX) for column in columns]
    return torch.stack(ids, dim=-1)


class LogitLens(NamedTuple):
    """What each layer would predict, had it been the last."""

    rank: Tensor
    """(L + 1, n, num_tokens) float64: 1 for the most probable token; of equal ones, half count as more probable. NaN
    for no token."""
    log_probability: Tensor
    """(L + 1, n, num_tokens) float64, in nats; NaN for no token."""
    divergence: Tensor
    """(L + 1, n) float64, KL(final || layer) in nats: what predicting by the layer would cost; 0 for the last."""


def logit_lens(states: Sequence[Tensor], head: OutputHead, token_ids: Tensor) -> LogitLens:
    """Apply the head to the states of every layer.

    Args:
        states: L + 1 of (n, C), the last one final.
        head: of the model.
        token_ids: (n, num_tokens) int64, whose place is asked for, such as of preceding tokens; -100 for none.
    """
    exists = token_ids != IGNORE_INDEX
    shape = (len(states), *token_ids.shape)
    rank, log_probability = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
    divergence = torch.zeros(shape[:2], dtype=torch.float64)
    for rows in _row_chunks(len(token_ids), len(head.weight)):
        final = head.log_probabilities(states[-1][rows])
        final_p = final.exp()
        ids, there = token_ids[rows].clamp(min=0), exists[rows]
        for layer, layer_states in enumerate(states):
            is_final = layer == len(states) - 1
            predicted = final if is_final else head.log_probabilities(layer_states[rows])
            taken = predicted.gather(1, ids)
            ranks = torch.stack([_rank(predicted, column) for column in taken.T], dim=-1)
            rank[layer, rows] = torch.where(there, ranks, torch.nan).cpu()
            log_probability[layer, rows] = torch.where(there, taken.double(), torch.nan).cpu()
            if not is_final:
                divergence[layer, rows] = (final_p * (final - predicted)).sum(-1).double().cpu()
    return LogitLens(rank, log_probability, divergence)


class AffineMap(NamedTuple):
    """From the state of a layer to what a regression expects of the final state."""

    weight: Tensor
    """(C, C) float32."""
    bias: Tensor
    """(C,) float32."""

    def __call__(self, states_NC: Tensor) -> Tensor:
        """Map states (n, C)."""
        return states_NC @ self.weight + self.bias


def fit_affine_maps(lens: Lens, documents: Sequence[Tensor]) -> list[AffineMap]:
    """Return the map of each layer but the last, L in all, fitted to the states of all tokens of some documents.

    A closed form of a tuned lens: it asks for the final state in place of the final distribution. The penalty of the
    ridge regression is the best for the last quarter of the documents, when the others are fitted; then all are.

    Args:
        lens: on the model.
        documents: (1, T) each, with meta-tokens, not those that are looked at.

    Raises:
        UsageError: fewer than two documents.
    """
    if len(documents) < 2:
        raise UsageError(
            "documents for affine maps",
            expected="at least 2, one to fit and one to choose the penalty",
            found=str(len(documents)),
            remedy="raise calibration_documents",
        )
    num_chosen = max(1, len(documents) // 4)
    fitted, choosing = (
        [torch.cat(layer).double().cpu() for layer in zip(*(_states_of(lens, ids) for ids in part), strict=True)]
        for part in (documents[:-num_chosen], documents[-num_chosen:])
    )
    maps = []
    for fit_states, choose_states in zip(fitted[:-1], choosing[:-1], strict=True):
        path = RidgePath(Spectrum(fit_states), fitted[-1])
        errors = path.errors(choose_states, choosing[-1], PENALTIES)
        penalty = PENALTIES[int(np.argmin(errors))]
        spectrum = Spectrum(torch.cat([fit_states, choose_states]))
        path = RidgePath(spectrum, torch.cat([fitted[-1], choosing[-1]]))
        weight = path.weights(penalty)
        bias = path.target_mean - spectrum.mean @ weight
        maps.append(AffineMap(*(tensor.float().to(lens.model.device) for tensor in (weight, bias))))
    return maps


def _states_of(lens: Lens, input_ids: Tensor) -> list[Tensor]:
    """Return the L + 1 states (T, C) of one document."""
    return [states[0] for states in capture_residuals(lens, input_ids)]


def _rank(values_NV: Tensor, own_N: Tensor) -> Tensor:
    more = (values_NV > own_N[:, None]).sum(-1)
    equal = (values_NV == own_N[:, None]).sum(-1)  # the own one among them
    return 1 + more + (equal - 1).double() / 2


# output statistics -----------------------------------------------------------------------------------------------


def output_statistics(normalized_NC: Tensor, head: OutputHead, targets_N: Tensor) -> dict[str, Tensor]:
    """Describe the distribution over the next token at n positions, in numbers that no shift of the logits moves.

    Args:
        normalized_NC: (n, C) states after the final norm.
        head: of the model.
        targets_N: (n,) int64, what the position must predict, -100 for nothing.

    Returns:
        (n,) float64 each: "max_over_mean", the largest logit minus the mean one; "max_log_probability" and "entropy",
        nats; "cross_entropy", nats, NaN at positions without a target.
    """
    columns: dict[str, list[Tensor]] = {}
    for rows in _row_chunks(len(targets_N), len(head.weight)):
        logits = head.project(normalized_NC[rows])
        log_p = logits.log_softmax(-1)
        targets = targets_N[rows]
        picked = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        chunk = {
            "max_over_mean": logits.max(-1).values - logits.mean(-1),
            "max_log_probability": log_p.max(-1).values,
            "entropy": torch.special.entr(log_p.exp()).sum(-1),
            "cross_entropy": torch.where(targets == IGNORE_INDEX, torch.nan, -picked),
        }
        for name, values in chunk.items():
            columns.setdefault(name, []).append(values.double())
    return {name: torch.cat(parts) for name, parts in columns.items()}


def predicting_positions(is_meta: Tensor, loss_policy: str) -> Tensor:
    """Return which position predicts each token, (T,) int64; -1 for meta-tokens and for a token that none predicts.

    Under "skip" the token before predicts, whatever it is; under "retarget" the last text token before.
    """
    positions = torch.arange(len(is_meta), device=is_meta.device)
    before = positions - 1
    if loss_policy == "retarget":
        last_text = torch.where(is_meta, -1, positions).cummax(0).values
        before = torch.nn.functional.pad(last_text[:-1], (1, 0), value=-1)
    return torch.where(is_meta, -1, before)


def _row_chunks(num_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, _LOGITS_AT_A_TIME // vocab_size)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


# on a model ------------------------------------------------------------------------------------------------------


def measure_logit_lens(
    lens: Lens,
    input_ids: Tensor,
    *,
    at: Tensor,
    distances: Sequence[int] = DISTANCES,
    maps: Sequence[AffineMap] | None = None,
) -> LogitLens:
    """Measure how well the text before some positions can be read from them through the model's own head.

    Args:
        lens: on the model.
        input_ids: (B, T).
        at: (B, T) bool, n positions, such as the meta-tokens, or ordinary tokens to compare with.
        distances: in text tokens; 1 is the last one before the position.
        maps: of `fit_affine_maps`, through which the states of all layers but the last go; None takes them as they are.
    """
    states = capture_residuals(lens, input_ids, at=at)
    return _lens_on(lens, input_ids, states, at=at, distances=distances, maps=maps)


def _lens_on(
    lens: Lens,
    input_ids: Tensor,
    states: Sequence[Tensor],
    *,
    at: Tensor,
    distances: Sequence[int],
    maps: Sequence[AffineMap] | None,
) -> LogitLens:
    """Do as `measure_logit_lens` with states that have been captured."""
    if maps is not None:
        states = [*(to_final(layer) for to_final, layer in zip(maps, states[:-1], strict=True)), states[-1]]
    text = preceding_text(input_ids, ~lens.is_meta(input_ids), distances)
    return logit_lens(states, OutputHead.of(lens), text[at])


def measure_outputs(lens: Lens, input_ids: Tensor, *, at: Tensor) -> dict[str, Tensor]:
    """Return the `output_statistics` of some positions; run once within an edit and once without, and take differences.

    Targets are those of the model's loss policy; a position whose target is dropped has no cross-entropy.
    """
    policy = lens.loss_policy
    targets = targets_of_labels(input_ids, lens.is_meta(input_ids), policy)
    with lens.capture(["ln_final.hook_normalized"], at=at, dtype=torch.float32) as captured:
        lens.run(input_ids)
    return output_statistics(captured["ln_final.hook_normalized"], OutputHead.of(lens), targets[at])


# Measures --------------------------------------------------------------------------------------------------------


@shared
def curves_of(inputs: Inputs) -> dict[tuple[str, str], dict[str, FloatArray]]:
    """Return the logit lens's statistics, (documents, layers, ...) by name, of each (state, reading).

    Raises:
        UsageError: fewer than two calibration documents.
    """
    lens = inputs.lens
    maps = fit_affine_maps(lens, [document.input_ids for document in inputs.subject.calibration])
    readings: tuple[tuple[str, Sequence[AffineMap] | None], ...] = (("state", None), ("mapped state", maps))
    found = {}
    for places in places_of(inputs):
        if places.steps_back:
            continue  # its own token would stand where the others have the last one before them
        texts = [(ids, ends, capture_residuals(lens, ids, at=ends)) for _, ids, ends in places.by_document()]
        for reading, through in readings:
            lenses = [
                _lens_on(lens, ids, states, at=ends, distances=DISTANCES, maps=through) for ids, ends, states in texts
            ]
            found[places.name, reading] = {
                "reciprocal_rank": np.stack([(1 / one.rank).nanmean(1).numpy() for one in lenses]),
                "log_probability": np.stack([one.log_probability.nanmean(1).numpy() for one in lenses]),
                "divergence": np.stack([one.divergence.mean(1).numpy() for one in lenses]),
            }
    return found


@measure(
    "output",
    "1",
    axes=("state", "read", "layer", "distance"),
    plot=Lines("layer", by="distance", panels="state"),
)
def reciprocal_rank(inputs: Inputs) -> Rows:
    """Reciprocal rank, in what the model's head makes of a state, of the text token a distance before it.

    From the state as it is and through an affine map to the final state.
    """
    yield from _lens_rows(inputs, "reciprocal_rank")


@measure(
    "output",
    "nats",
    axes=("state", "read", "layer", "distance"),
    plot=Lines("layer", by="distance", panels="state"),
)
def log_probability(inputs: Inputs) -> Rows:
    """Log-probability, in what the model's head makes of a state, of the text token a distance before it."""
    yield from _lens_rows(inputs, "log_probability")


@measure("output", "nats", axes=("state", "read", "layer"), plot=Lines("layer", by="state", panels="read"))
def divergence(inputs: Inputs) -> Rows:
    """KL of the final distribution from the one that the head makes of a layer's state."""
    for (state, reading), curves in curves_of(inputs).items():
        for row in over_layers(curves["divergence"]):
            yield row._replace(at={"state": state, "read": reading, **row.at})


def _lens_rows(inputs: Inputs, name: str) -> Iterator[Row]:
    for (state, reading), curves in curves_of(inputs).items():
        values = curves[name]
        for row in rows_over(values, range(values.shape[1]), DISTANCES, names=("layer", "distance")):
            yield row._replace(at={"state": state, "read": reading, **row.at})


@shared
def output_changes_of(inputs: Inputs) -> dict[tuple[str, str], FloatArray]:
    """Return what the meta-tokens' embedding changes in the output, (documents,) by (statistic, place)."""
    changes: dict[tuple[str, str], list[float]] = {}
    for document in inputs.subject.documents:
        at = document.is_meta.long().cumsum(1) > 0
        if not at.any():
            continue
        full = measure_outputs(inputs.lens, document.input_ids, at=at)
        with intervene(inputs.lens.model, [ZeroEmbedding()]):
            without = measure_outputs(inputs.lens, document.input_ids, at=at)
        is_meta = document.is_meta[at]
        for place, chosen in (("meta-tokens", is_meta), ("text behind", ~is_meta)):
            for name, values in full.items():
                changes.setdefault((name, place), []).append(float((values - without[name])[chosen].nanmean()))
    return {key: np.array(values) for key, values in changes.items()}


@measure(
    "output", "logits", axes=("place",), test=True, plot=Dots("place"), positive="the embedding makes the model surer"
)
def max_logit_boost(inputs: Inputs) -> Rows:
    """Largest logit of the output over the mean one, with the meta-tokens' embedding minus with it zeroed."""
    yield from _change_rows(inputs, "max_over_mean", 1)


@measure(
    "output", "nats", axes=("place",), test=True, plot=Dots("place"), positive="the embedding makes the model surer"
)
def max_log_probability_boost(inputs: Inputs) -> Rows:
    """Largest log-probability of the output, with the meta-tokens' embedding minus with it zeroed."""
    yield from _change_rows(inputs, "max_log_probability", 1)


@measure(
    "output", "nats", axes=("place",), test=True, plot=Dots("place"), positive="the embedding makes the model surer"
)
def output_sharpening(inputs: Inputs) -> Rows:
    """Entropy of the output, with the meta-tokens' embedding zeroed minus with it."""
    yield from _change_rows(inputs, "entropy", -1)


@measure("output", "nats", axes=("place",), test=True, plot=Dots("place"), positive="the embedding helps")
def loss_saved(inputs: Inputs) -> Rows:
    """Loss with the meta-tokens' embedding zeroed minus with it."""
    yield from _change_rows(inputs, "cross_entropy", -1)


def _change_rows(inputs: Inputs, statistic: str, sign: int) -> Iterator[Row]:
    for (name, place), means in output_changes_of(inputs).items():
        if name == statistic and np.isfinite(means).any():  # nothing may be asked of meta-tokens
            yield Row({"place": place}, sign * means)
