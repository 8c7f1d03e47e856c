"""Meta-attention taken away from a trained model, layer by layer: what it costs the answer, and text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metatokens.analysis.inputs.pairs import pairs_of
from metatokens.analysis.inputs.scores import FloatArray, Scores, batches_of, join_scores, meta_layers
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Dots, Row, Rows, measure
from metatokens.errors import UsageError
from metatokens.lens import edits
from metatokens.model.loss import targets_of_labels

if TYPE_CHECKING:
    from metatokens.analysis.inputs.pairs import MinimalPair
    from metatokens.data.injection import IntArray
    from metatokens.lens.edits import EdgeCut, Edit
    from metatokens.lens.lens import Lens

BATCH_SIZE = 16


class KnockOut(NamedTuple):
    """What meta-attention loses."""

    kind: Literal["zero", "mean", "older"]
    """zero: its output. mean: all of its output but the mean over the meta-tokens of all prompts. older: what a
    meta-token reads from more than `num_kept` meta-tokens back."""
    layers: tuple[int, ...]
    num_kept: int | None = None


@dataclass(frozen=True)
class KnockOuts:
    """Scores of both prompts of each pair, each towards its own answer, and their mean."""

    full: Scores
    knocked_out: dict[KnockOut, Scores]

    def loss(self, knock_out: KnockOut) -> FloatArray:
        """Return the rise of the answer's cross-entropy, nats a pair, (pairs,)."""
        return self.knocked_out[knock_out].cross_entropy - self.full.cross_entropy


def list_knock_outs(lens: Lens, *, num_kept: Sequence[int] = (1, 4)) -> list[KnockOut]:
    """Return every kind for each layer with meta-attention alone, and for all of them together."""
    layers = meta_layers(lens)
    sets = [(layer,) for layer in layers] + ([tuple(layers)] if len(layers) > 1 else [])
    return [
        knock_out
        for chosen in sets
        for knock_out in (
            KnockOut("zero", chosen),
            KnockOut("mean", chosen),
            *(KnockOut("older", chosen, number) for number in num_kept),
        )
    ]


def knock_out_meta_attention(
    lens: Lens,
    pairs: Sequence[MinimalPair],
    *,
    knock_outs: Sequence[KnockOut] | None = None,
    batch_size: int = BATCH_SIZE,
) -> KnockOuts:
    """Take meta-attention away from a trained model, in the layers and in the way that each knock-out says.

    Args:
        lens: around the model.
        pairs: minimal pairs in its tokens; their meta-tokens give the means.
        knock_outs: by default those of `list_knock_outs`.
        batch_size: pairs of one forward pass.

    Raises:
        UsageError: A model without meta-attention among meta-tokens, or see `batches_of`.
    """
    knock_outs = _check_knock_outs(lens, knock_outs)
    means: dict[int, Tensor] = {}
    if any(knock_out.kind == "mean" for knock_out in knock_outs):
        batches = (batch for batch, _ in batches_of(lens, pairs, batch_size))
        means = _mean_outputs(lens, ((ids, b.is_meta) for b in batches for ids in (b.clean, b.corrupt)))
    parts: list[dict[KnockOut | None, Scores]] = []
    for batch, _ in batches_of(lens, pairs, batch_size):
        scores: dict[KnockOut | None, Scores] = {None: batch.score_both(lens)}
        for knock_out in knock_outs:
            with lens.edit(*_knock_out_edits(knock_out, batch.is_meta, means)):
                scores[knock_out] = batch.score_both(lens)
        parts.append(scores)
    joined = join_scores(parts)
    return KnockOuts(joined.pop(None), {key: value for key, value in joined.items() if key is not None})


@dataclass(frozen=True)
class TextKnockOuts:
    """Loss of documents; arrays of shape (documents,)."""

    full: FloatArray
    """Nats per text token."""
    rises: dict[KnockOut, FloatArray]
    """Nats per text token more than `full`."""


def knock_out_on_text(
    lens: Lens, documents: Sequence[IntArray], *, knock_outs: Sequence[KnockOut] | None = None
) -> TextKnockOuts:
    """Return what each knock-out costs on documents (T,), text and meta-tokens; those give the means.

    Raises:
        UsageError: A model without meta-attention among meta-tokens, or means without a meta-token.
    """
    knock_outs = _check_knock_outs(lens, knock_outs)
    config = lens.model.config
    rows = [torch.from_numpy(np.asarray(document)[None]).to(lens.model.device) for document in documents]
    prompts = [(ids, ids == config.meta_token_id) for ids in rows]
    means = _mean_outputs(lens, prompts) if any(knock_out.kind == "mean" for knock_out in knock_outs) else {}
    losses: dict[KnockOut | None, list[float]] = {key: [] for key in (None, *knock_outs)}
    for ids, is_meta in prompts:
        targets = targets_of_labels(ids, is_meta, config.loss_policy)
        for key, values in losses.items():
            with lens.edit(*([] if key is None else _knock_out_edits(key, is_meta, means))):
                values.append(float(lens(ids, shift_labels=targets, use_cache=False, logits_to_keep=1).loss))
    full = np.array(losses.pop(None))
    return TextKnockOuts(full, {key: np.array(values) - full for key, values in losses.items() if key is not None})


def _check_knock_outs(lens: Lens, knock_outs: Sequence[KnockOut] | None) -> Sequence[KnockOut]:
    if not meta_layers(lens) or lens.model.config.meta_attention_over != "meta":
        raise UsageError(
            "knock-out of meta-attention",
            expected="a model with meta-attention over its meta-tokens",
            found="one without",
            remedy="leave it out",
        )
    return list_knock_outs(lens) if knock_outs is None else knock_outs


def _knock_out_edits(knock_out: KnockOut, is_meta: Tensor, means: dict[int, Tensor]) -> list[Edit | EdgeCut]:
    if knock_out.kind == "older":
        assert knock_out.num_kept is not None, "older needs the number of meta-tokens that stay in sight"
        return [edits.cut_older_edges(knock_out.layers, is_meta=is_meta, num_kept=knock_out.num_kept)]
    if knock_out.kind == "zero":
        return [edits.scale(f"blocks.{layer}.hook_meta_out", 0.0) for layer in knock_out.layers]
    return [edits.replace(f"blocks.{layer}.hook_meta_out", means[layer], at=is_meta) for layer in knock_out.layers]


def _mean_outputs(lens: Lens, prompts: Iterable[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Return the mean output (C,) of meta-attention over the meta-tokens of prompts (ids, is_meta), by layer."""
    sums: dict[int, Tensor] = {}
    count = 0
    for ids, is_meta in prompts:
        if not is_meta.any():
            continue
        with lens.capture(["blocks.*.hook_meta_out"], at=is_meta, dtype=torch.float64) as captured:
            lens(ids, use_cache=False, logits_to_keep=1)
        for layer in meta_layers(lens):
            total = captured[f"blocks.{layer}.hook_meta_out"].sum(0)
            sums[layer] = sums[layer] + total if layer in sums else total
        count += int(is_meta.sum())
    if not count:
        raise UsageError(
            "mean output of meta-attention",
            expected="some meta-token",
            found="none",
            remedy="inject meta-tokens, or leave the kind mean out",
        )
    return {layer: total / count for layer, total in sums.items()}


@measure("causal", "nats", axes=("layer", "mode"), subject="task", plot=Dots("layer", by="mode"))
def knockout(inputs: Inputs) -> Rows:
    """Rise of the answer's loss with meta-attention removed, its mean in its place, or what is farther back cut."""
    if not meta_layers(inputs.lens):
        return
    chosen = list_knock_outs(inputs.lens)
    knocked = knock_out_meta_attention(inputs.lens, pairs_of(inputs), knock_outs=chosen)
    for one in chosen:
        mode = one.kind if one.num_kept is None else f"older than {one.num_kept}"
        yield Row({"mode": mode, **_layer_of(one)}, knocked.loss(one))


@measure("knockout", "nats/token", axes=("layer",), test=True, subject="text", plot=Dots("layer"))
def loss_change(inputs: Inputs) -> Rows:
    """Loss on text without meta-attention minus with it, in one layer or in all together."""
    chosen = [one for one in list_knock_outs(inputs.lens) if one.kind == "zero"]
    rows = [document.input_ids[0].numpy() for document in inputs.subject.documents]
    found = knock_out_on_text(inputs.lens, rows, knock_outs=chosen)
    for one in chosen:
        yield Row(_layer_of(one), found.rises[one])


def _layer_of(knock_out: KnockOut) -> dict[str, int]:
    """Return the layer of a knock-out of one, nothing for one of all."""
    return {"layer": knock_out.layers[0]} if len(knock_out.layers) == 1 else {}
