"""What each part of the model adds to a logit, and how large a branch's addition is beside the residual stream.

Direct attribution writes the logit of a token as a sum over what each component added to the residual stream, with the
scale of the final norm held fixed.

Shapes: n positions, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metatokens.analysis.inputs.pairs import pairs_of
from metatokens.analysis.inputs.scores import batches_of
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Lines, Row, Rows, measure
from metatokens.analysis.representations.logits import OutputHead, predicting_positions
from metatokens.config.analysis import TaskSubject
from metatokens.errors import UsageError
from metatokens.lens.lens import Lens
from metatokens.lens.residuals import residual_names

COMPLETE_TO = 1e-3  # of the residual's largest entry; float32 sums of some fifty components stay far below
_BATCH = 16
_BRANCHES = {"attn_out": "attention", "meta_out": "meta-attention", "mlp_out": "feed-forward"}
_TAPS = tuple(f"hook_{branch}" for branch in _BRANCHES)


class Attribution(NamedTuple):
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


def relative_length(addition_NC: Tensor, stream_NC: Tensor) -> Tensor:
    """Return |addition| / |stream| of (n, C) each, (n,) float64; NaN where the stream is zero."""
    stream = stream_NC.double().norm(dim=-1)
    return torch.where(stream > 0, addition_NC.double().norm(dim=-1) / stream, torch.nan)


def attribute_logits(
    lens: Lens,
    input_ids: Tensor,
    *,
    at: Tensor,
    token_ids: Tensor,
    foil_ids: Tensor | None = None,
    head: OutputHead | None = None,
) -> Attribution:
    """Share logits in one forward pass among embedding, both attentions and feed-forward of each layer, and biases.

    Args:
        lens: on the model.
        input_ids: (B, T).
        at: (B, T) bool, n positions.
        token_ids: (n,) int64, in the order of the positions, row by row.
        foil_ids: (n,) int64; with it, the difference of the two logits.
        head: by default the model's; its `centred` form gives logits over their mean.
    """
    wanted = [name for name in lens.names if name.endswith(_TAPS)]
    names = residual_names(lens)
    with lens.capture([names[0], names[-1], *wanted], at=at, dtype=torch.float32) as captured:
        lens.run(input_ids)
    components = {"embed": captured[names[0]]}
    fired = set(captured)  # meta-attention is silent where there is no meta-token
    for name in wanted:
        if name in fired:
            components[name.replace("hook_", "")] = captured[name]
    head = OutputHead.of(lens) if head is None else head
    return direct_logit_attribution(components, captured[names[-1]], head, token_ids, foil_ids)


def measure_branch_strengths(lens: Lens, input_ids: Tensor, *, at: Tensor) -> dict[str, npt.NDArray[np.float64]]:
    """Measure how large what each branch adds at some positions is beside `hook_resid_mid`, in one forward pass.

    Args:
        lens: on the model.
        input_ids: (B, T).
        at: (B, T) bool, such as the meta-tokens.

    Returns:
        Means over the positions by branch, (L,) each, NaN where a layer lacks the branch.
    """
    names = [name for name in lens.names if name.endswith((*_TAPS, "hook_resid_mid"))]
    with lens.capture(names, at=at, dtype=torch.float32) as captured:
        lens.run(input_ids)
    fired = set(captured)

    def strength(layer: int, tap: str) -> float:
        name = f"blocks.{layer}.hook_{tap}"
        if name not in fired:
            return np.nan
        return float(relative_length(captured[name], captured[f"blocks.{layer}.hook_resid_mid"]).nanmean())

    layers = range(len(lens.layout.blocks))
    return {branch: np.array([strength(layer, tap) for layer in layers]) for tap, branch in _BRANCHES.items()}


def attribute_tokens(lens: Lens, input_ids: Tensor) -> dict[str, npt.NDArray[np.float32]]:
    """Share the logit of each token, over the mean logit of the vocabulary, among what made it.

    Args:
        lens: on the model.
        input_ids: (T,) with meta-tokens.

    Returns:
        (T,) float32 each: "embed", "blocks.l.attn_out", "blocks.l.meta_out" where that ran, "blocks.l.mlp_out",
        "norm_bias" and, where the head has one, "head_bias"; and "logit", their sum. At the token itself and not where
        it is predicted; NaN at meta-tokens and at a token that nothing predicts. "logit" alone where nothing is.
    """
    is_meta = lens.is_meta(input_ids)
    before = predicting_positions(is_meta, lens.loss_policy)
    is_predicted = before >= 0
    if not is_predicted.any():
        return {"logit": np.full(len(input_ids), np.nan, dtype=np.float32)}
    at = torch.zeros_like(is_meta)
    at[before[is_predicted]] = True
    # each position predicts one text token at most, and later ones later tokens, so both are in the same order
    found = attribute_logits(
        lens, input_ids[None], at=at[None], token_ids=input_ids[is_predicted], head=OutputHead.of(lens).centred()
    )
    columns = np.full((len(found.names) + 1, len(input_ids)), np.nan, dtype=np.float32)
    columns[:, is_predicted.numpy(force=True)] = torch.cat([found.values.T, found.logits[None]]).numpy(force=True)
    return dict(zip((*found.names, "logit"), columns, strict=True))


# Measures --------------------------------------------------------------------------------------------------------


@measure(
    "output",
    "logits",
    axes=("component", "layer"),
    plot=Lines("layer", by="component"),
    positive="towards the answer, or the token",
)
def attribution(inputs: Inputs) -> Rows:
    """What a component adds to the answer's logit over its foil's or, of a text, to a token's logit over the mean."""
    is_task = isinstance(inputs.config.subject, TaskSubject)
    shares = _shares_in_answers(inputs) if is_task else _shares_in_text(inputs)
    for name in shares[0] if shares else ():
        layer, component = _component(name)
        at: dict[str, str | int] = {"component": component} | ({} if layer is None else {"layer": layer})
        yield Row(at, np.concatenate([part[name] for part in shares]))


@measure("output", "ratio", axes=("branch", "layer"), plot=Lines("layer", by="branch"))
def branch_strength(inputs: Inputs) -> Rows:
    """Length of what a branch adds at meta-tokens over that of the residual stream there."""
    parts = [
        measure_branch_strengths(inputs.lens, document.input_ids, at=document.is_meta)
        for document in inputs.subject.documents
        if document.is_meta.any()
    ]
    if not parts:
        raise UsageError(
            "documents", expected="a meta-token in one", found="none", remedy="choose documents that have meta-tokens"
        )
    for branch in _BRANCHES.values():
        means = np.stack([part[branch] for part in parts])
        for layer in range(means.shape[1]):
            if np.isfinite(means[:, layer]).any():
                yield Row({"branch": branch, "layer": layer}, means[:, layer])


def _shares_in_answers(inputs: Inputs) -> Sequence[Mapping[str, npt.NDArray[Any]]]:
    """Return the shares in the answer's logit minus the foil's at the end of clean prompts, by component."""
    shares = []
    pairs = pairs_of(inputs)
    for batch in batches_of(inputs.lens, pairs, _BATCH):
        last = batch.mask(batch.last)
        found = attribute_logits(inputs.lens, batch.clean, at=last, token_ids=batch.answer, foil_ids=batch.foil)
        shares.append(dict(zip(found.names, found.values.T.numpy(force=True), strict=True)))
    return shares


def _shares_in_text(inputs: Inputs) -> Sequence[Mapping[str, npt.NDArray[Any]]]:
    """Return the mean shares in the logits of the text behind the first meta-token, by component."""
    shares = []
    for document in inputs.subject.documents:
        behind = (document.is_meta.long().cumsum(1) > 0)[0].numpy(force=True)
        columns = attribute_tokens(inputs.lens, document.input_ids[0])
        predicted = behind & np.isfinite(columns.pop("logit"))
        if predicted.any():
            shares.append({name: column[predicted].mean(keepdims=True) for name, column in columns.items()})
    return shares


def _component(name: str) -> tuple[int | None, str]:
    """Return layer and component of a name of `Attribution`; the layer is None for what belongs to none."""
    if not name.startswith("blocks."):
        return None, {"embed": "embedding", "norm_bias": "biases", "head_bias": "head's bias"}[name]
    _, layer, part = name.split(".")
    return int(layer), _BRANCHES[part]
