"""What the output head makes of a state, of a run, and of each part of the residual stream (L1, A7, D1, D2).

    logit lens          the head applied to the states of earlier layers (nostalgebraist 2020), as they are or put
                        through the affine map to the final state that a regression finds (Din et al. 2023)
    output statistics   what the distribution over the next token is like, in numbers that no shift of the logits moves
    direct attribution  the logit of a token as a sum over what each component added to the residual stream
    branch strength     how large the addition of a branch is beside the stream

All logs are natural. The softmax runs over the whole vocabulary, as in training; no loss ever asked for the meta-token,
so its own probability means nothing. No (B, T, V) tensor is made.

Shapes: n positions, C hidden size, V vocabulary, L + 1 layers as in `states`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.documents import DocumentSums
from metatokens.analysis.representations.decodability import PENALTIES, RidgePath
from metatokens.errors import UsageError
from metatokens.lens.lens import Captured, Lens
from metatokens.lens.residuals import capture_residuals, find_meta_tokens, real_tokens, residual_names
from metatokens.model.loss import IGNORE_INDEX, targets_of_labels

DISTANCES = (1, 2, 4, 8, 16, 32, 64)
COMPLETE_TO = 1e-3  # of the residual's largest entry; float32 sums of some fifty components stay far below
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


@dataclass(frozen=True)
class LogitLens:
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
        ids, there = token_ids[rows].clamp(min=0), exists[rows]
        for layer, layer_states in enumerate(states):
            predicted = head.log_probabilities(layer_states[rows])
            taken = predicted.gather(1, ids)
            ranks = torch.stack([_rank(predicted, column) for column in taken.T], dim=-1)
            rank[layer, rows] = torch.where(there, ranks, torch.nan).cpu()
            log_probability[layer, rows] = torch.where(there, taken.double(), torch.nan).cpu()
            divergence[layer, rows] = (final.exp() * (final - predicted)).sum(-1).double().cpu()
    return LogitLens(rank, log_probability, divergence)


@dataclass(frozen=True)
class AffineMap:
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
        path = RidgePath(fit_states, fitted[-1])
        errors = [float((path.predict(choose_states, p) - choosing[-1]).square().sum()) for p in PENALTIES]
        penalty = PENALTIES[int(np.argmin(errors))]
        path = RidgePath(torch.cat([fit_states, choose_states]), torch.cat([fitted[-1], choosing[-1]]))
        weight = path.weights(penalty)
        bias = path.target_mean - path.state_mean @ weight
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


@dataclass(frozen=True)
class OutputStatistics:
    """The distribution over the next token at n positions; none of these depends on a shift of the logits."""

    max_over_mean: Tensor
    """(n,) float64, largest logit minus the mean logit."""
    max_log_probability: Tensor
    """(n,) float64, nats."""
    entropy: Tensor
    """(n,) float64, nats."""
    cross_entropy: Tensor
    """(n,) float64, nats; NaN at positions without a target."""

    def at(self, positions: Tensor) -> OutputStatistics:
        """Return those of some positions, (n,) bool."""
        return OutputStatistics(
            *(getattr(self, field.name)[positions.to(self.entropy.device)] for field in fields(self))
        )

    def minus(self, other: OutputStatistics, documents: npt.ArrayLike) -> dict[str, DocumentSums]:
        """Return A7 by name: the differences to another run at the same positions (n,), document by document."""
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return {name: DocumentSums.of_values(documents, a.cpu() - b.cpu()) for name, (a, b) in pairs.items()}


def output_statistics(normalized_NC: Tensor, head: OutputHead, targets_N: Tensor) -> OutputStatistics:
    """Describe the output of a run.

    Args:
        normalized_NC: (n, C) states after the final norm.
        head: of the model.
        targets_N: (n,) int64, what the position must predict, -100 for nothing.
    """
    columns: list[list[Tensor]] = [[], [], [], []]
    for rows in _row_chunks(len(targets_N), len(head.weight)):
        logits = head.project(normalized_NC[rows])
        log_p = logits.log_softmax(-1)
        targets = targets_N[rows]
        picked = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        chunk = (
            logits.max(-1).values - logits.mean(-1),
            log_p.max(-1).values,
            torch.special.entr(log_p.exp()).sum(-1),
            torch.where(targets == IGNORE_INDEX, torch.nan, -picked),
        )
        for column, values in zip(columns, chunk, strict=True):
            column.append(values.double())
    return OutputStatistics(*(torch.cat(c) if c else torch.zeros(0, dtype=torch.float64) for c in columns))


# direct logit attribution and branch strength --------------------------------------------------------------------


@dataclass(frozen=True)
class Attribution:
    """The logit of one token at each position, as a sum over components."""

    names: tuple[str, ...]
    """The components, then "norm_bias" and, where the head has one, "head_bias"."""
    values: Tensor
    """(n, num_names) float64, in logits; the sum over names is `logits`."""
    logits: Tensor
    """(n,) float64."""


def direct_logit_attribution(
    components: Mapping[str, Tensor],
    residual_NC: Tensor,
    head: OutputHead,
    token_ids: Tensor,
    foil_ids: Tensor | None = None,
) -> Attribution:
    """Share the logit of a token among what was added to the residual stream, the scale of the final norm held fixed.

    Component x gives ((x - mean x) * gain / scale) . W[token]; the norm's bias and the head's give the rest.

    Args:
        components: by name, (n, C) each; they add up to the residual.
        residual_NC: (n, C) before the final norm.
        head: of the model.
        token_ids: (n,) int64.
        foil_ids: (n,) int64; with it, everything is that of the difference of the two logits.

    Raises:
        UsageError: the components do not add up to the residual.
    """
    direction = head.weight[token_ids] - (0 if foil_ids is None else head.weight[foil_ids])
    direction = direction.double()
    total = torch.stack([component.double() for component in components.values()]).sum(0)
    gap = float((total - residual_NC).abs().max()) if len(residual_NC) else 0.0
    if gap > COMPLETE_TO * float(residual_NC.abs().max() if len(residual_NC) else 1):
        raise UsageError(
            "components",
            expected="a sum equal to the residual",
            found=f"a gap of {gap:.3g}",
            remedy="pass all of them, of a model in float32",
        )
    scaled = direction * head.gain.double() / head.scale(residual_NC.double())
    scaled = scaled - scaled.mean(-1, keepdim=True)  # the same as taking its mean from every component
    values = {name: (component.double() * scaled).sum(-1) for name, component in components.items()}
    values["norm_bias"] = direction @ head.norm_bias.double()
    if head.bias is not None:
        bias = head.bias.double()
        values["head_bias"] = bias[token_ids] - (0 if foil_ids is None else bias[foil_ids])
    stacked = torch.stack(list(values.values()), dim=-1)
    return Attribution(tuple(values), stacked, stacked.sum(-1))


def branch_strength(addition_NC: Tensor, stream_NC: Tensor) -> Tensor:
    """Return |addition| / |stream| of (n, C) each, (n,) float64; NaN where the stream is zero."""
    stream = stream_NC.double().norm(dim=-1)
    return torch.where(stream > 0, addition_NC.double().norm(dim=-1) / stream, torch.nan)


def _row_chunks(num_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, _LOGITS_AT_A_TIME // vocab_size)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


# on a model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitLensCurves:
    """L1 by layer and distance, document by document."""

    distances: tuple[int, ...]
    reciprocal_rank: DocumentSums
    """(num_documents, L + 1, num_distances), 1 / rank."""
    log_probability: DocumentSums
    """(num_documents, L + 1, num_distances), nats."""
    divergence: DocumentSums
    """(num_documents, L + 1), nats."""


def measure_logit_lens(
    lens: Lens,
    input_ids: Tensor,
    *,
    at: Tensor,
    documents: npt.ArrayLike,
    distances: Sequence[int] = DISTANCES,
    maps: Sequence[AffineMap] | None = None,
    attention_mask: Tensor | None = None,
) -> LogitLensCurves:
    """Measure how well the text before a position can be read from it through the model's own head.

    Args:
        lens: on the model.
        input_ids: (B, T).
        at: (B, T) bool, such as the meta-tokens, or ordinary tokens to compare with.
        documents: (B,) integers, the document of each row.
        distances: in text tokens; 1 is the last one before the position.
        maps: of `fit_affine_maps`, through which the states of all layers but the last go; None takes them as they are.
        attention_mask: (B, T), 0 at padding.
    """
    text = real_tokens(input_ids, attention_mask) & ~find_meta_tokens(lens, input_ids)
    states = capture_residuals(lens, input_ids, attention_mask=attention_mask, at=at)
    if maps is not None:
        states = [*(to_final(layer) for to_final, layer in zip(maps, states[:-1], strict=True)), states[-1]]
    read = logit_lens(states, OutputHead.of(lens), preceding_text(input_ids, text, distances)[at])
    rows = _documents_at(documents, at)
    return LogitLensCurves(
        tuple(distances),
        DocumentSums.of_values(rows, (1 / read.rank).movedim(0, 1)),
        DocumentSums.of_values(rows, read.log_probability.movedim(0, 1)),
        DocumentSums.of_values(rows, read.divergence.movedim(0, 1)),
    )


def measure_outputs(
    lens: Lens, input_ids: Tensor, *, at: Tensor, attention_mask: Tensor | None = None
) -> OutputStatistics:
    """Describe the output at some positions; run it once within an edit and once without, and take `minus`.

    Targets are those of the model's loss policy; a position whose target is dropped has no cross-entropy.
    """
    is_meta, keep = find_meta_tokens(lens, input_ids), real_tokens(input_ids, attention_mask)
    policy = getattr(lens.model.config, "loss_policy", "skip")
    targets = targets_of_labels(input_ids.masked_fill(~keep, IGNORE_INDEX), is_meta, policy)
    with lens.capture(["ln_final.hook_normalized"], at=at, dtype=torch.float32) as captured:
        lens(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    return output_statistics(captured["ln_final.hook_normalized"], OutputHead.of(lens), targets[at])


def attribute_logits(
    lens: Lens,
    input_ids: Tensor,
    *,
    at: Tensor,
    token_ids: Tensor,
    foil_ids: Tensor | None = None,
    head: OutputHead | None = None,
    per_head: bool = False,
    attention_mask: Tensor | None = None,
) -> Attribution:
    """Measure D1 in one forward pass: embedding, both attentions and feed-forward of each layer, and biases.

    Args:
        lens: on the model.
        input_ids: (B, T).
        at: (B, T) bool, n positions.
        token_ids: (n,) int64, in the order of the positions, row by row.
        foil_ids: (n,) int64; with it, the difference of the two logits.
        head: by default the model's; its `centred` form gives logits over their mean.
        per_head: share each attention among its heads, `blocks.l.attn.head.h`, and its output bias.
        attention_mask: (B, T), 0 at padding.
    """
    branches = ("hook_attn_out", "hook_meta_out", "hook_mlp_out")
    wanted = [name for name in lens.names if name.endswith(branches)]
    results = [name for name in lens.names if per_head and name.endswith("hook_result")]
    names = residual_names(lens)
    with lens.capture([names[0], names[-1], *wanted, *results], at=at, dtype=torch.float32) as captured:
        lens(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    components = {"embed": captured[names[0]]}
    fired = set(captured)  # meta-attention is silent where there is no meta-token
    for name in wanted:
        result_name = name.replace("hook_attn_out", "attn.hook_result").replace(
            "hook_meta_out", "meta_attn.hook_result"
        )
        if name in fired and result_name in results:
            components |= _share_among_heads(captured, name, result_name, at)
        elif name in fired:
            components[name.replace("hook_", "")] = captured[name]
    head = OutputHead.of(lens) if head is None else head
    return direct_logit_attribution(components, captured[names[-1]], head, token_ids, foil_ids)


def _share_among_heads(captured: Captured, name: str, result_name: str, at: Tensor) -> dict[str, Tensor]:
    """Return what each head of an attention added, (n, C) by name, and its output bias."""
    whole, heads_NHC = captured[name], captured[result_name]
    if "meta_attn" in result_name:
        # heads are packed to the tokens of meta-attention among the selected ones
        assert captured.meta_columns is not None
        takes_part = torch.zeros_like(at)
        rows, slots = (captured.meta_columns >= 0).nonzero(as_tuple=True)
        takes_part[rows, captured.meta_columns[rows, slots]] = True
        packed, heads_NHC = heads_NHC, heads_NHC.new_zeros(len(whole), *heads_NHC.shape[1:])
        heads_NHC[takes_part[at]] = packed
    prefix = result_name.removesuffix(".hook_result")
    shares = {f"{prefix}.head.{head}": heads_NHC[:, head] for head in range(heads_NHC.shape[1])}
    return shares | {f"{prefix}.bias": whole - heads_NHC.sum(1)}


@dataclass(frozen=True)
class BranchStrengths:
    """D2 by layer, document by document: (num_documents, L) each, NaN means where a layer lacks the branch."""

    attention: DocumentSums
    meta_attention: DocumentSums
    mlp: DocumentSums


def measure_branch_strengths(
    lens: Lens,
    input_ids: Tensor,
    *,
    at: Tensor,
    documents: npt.ArrayLike,
    attention_mask: Tensor | None = None,
) -> BranchStrengths:
    """Measure how large what each branch adds at some positions is beside `hook_resid_mid`, in one forward pass.

    Args:
        lens: on the model.
        input_ids: (B, T).
        at: (B, T) bool, such as the meta-tokens.
        documents: (B,) integers, the document of each row.
        attention_mask: (B, T), 0 at padding.
    """
    taps = ("hook_attn_out", "hook_meta_out", "hook_mlp_out")
    num_layers = len(lens.layout.blocks)
    names = [name for name in lens.names if name.endswith((*taps, "hook_resid_mid"))]
    with lens.capture(names, at=at, dtype=torch.float32) as captured:
        lens(input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    fired, rows = set(captured), _documents_at(documents, at)

    def measure(tap: str) -> DocumentSums:
        def of_layer(layer: int) -> Tensor:
            stream = captured[f"blocks.{layer}.hook_resid_mid"]
            name = f"blocks.{layer}.{tap}"
            missing = torch.full((len(rows),), torch.nan, dtype=torch.float64)
            return branch_strength(captured[name], stream).cpu() if name in fired else missing

        return DocumentSums.of_values(rows, torch.stack([of_layer(layer) for layer in range(num_layers)], dim=-1))

    return BranchStrengths(*(measure(tap) for tap in taps))


def _documents_at(documents: npt.ArrayLike, at: Tensor) -> npt.NDArray[np.int64]:
    rows: npt.NDArray[np.int64] = np.asarray(documents, dtype=np.int64)[at.nonzero()[:, 0].numpy(force=True)]
    return rows
