"""Meta-attention taken away from a trained model, layer by layer: what it costs the answer, and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metatokens.analysis.inputs.pairs import pairs_of
from metatokens.analysis.inputs.scores import BATCH_SIZE, FloatArray, PairBatch, Scores, batches_of, join_scores
from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Dots, Row, Rows, measure
from metatokens.errors import UsageError
from metatokens.lens import edits
from metatokens.model.loss import targets_of_labels

if TYPE_CHECKING:
    from metatokens.analysis.inputs.pairs import MinimalPair
    from metatokens.lens.edits import EdgeCut, Edit
    from metatokens.lens.lens import Lens


class KnockOut(NamedTuple):
    """What meta-attention loses."""

    kind: Literal["zero", "mean", "older"]
    """zero: its output. mean: all of its output except the mean over the meta-tokens of all prompts. older: what a
    meta-token reads from more than `num_kept` meta-tokens back."""
    layers: tuple[int, ...]
    num_kept: int = 0


WHOLE = KnockOut("zero", ())
"""Nothing is lost."""


def list_knock_outs(lens: Lens) -> list[KnockOut]:
    """Return every knock-out of each layer with meta-attention, and of all of them together.

    Raises:
        UsageError: A model without meta-attention among its meta-tokens.
    """
    layers = tuple(lens.layout.meta_layers)
    if not layers or lens.model.config.meta_attention_over != "meta":
        raise UsageError(
            "knock-out of meta-attention",
            expected="a model with meta-attention over its meta-tokens",
            found="one without",
            remedy="analyse another checkpoint",
        )
    return [
        knock_out
        for chosen in dict.fromkeys([*((layer,) for layer in layers), layers])
        for knock_out in (
            KnockOut("zero", chosen),
            KnockOut("mean", chosen),
            KnockOut("older", chosen, 1),
            KnockOut("older", chosen, 4),
        )
    ]


def score_knock_outs(
    lens: Lens, pairs: Sequence[MinimalPair], knock_outs: Sequence[KnockOut], *, batch_size: int = BATCH_SIZE
) -> dict[KnockOut, Scores]:
    """Return the scores of each knock-out: the mean over both prompts of a pair, each towards its own answer.

    Args:
        lens: On the model.
        pairs: Minimal pairs in its tokens; their meta-tokens give the means.
        knock_outs: What is taken away.
        batch_size: Pairs of one forward pass.

    Raises:
        ValueError: See `batches_of`.
    """
    means: dict[int, Tensor] = {}
    if any(knock_out.kind == "mean" for knock_out in knock_outs):
        means = _mean_outputs(lens, batches_of(lens, pairs, batch_size))

    def score(batch: PairBatch) -> Iterator[tuple[KnockOut, Scores]]:
        for knock_out in knock_outs:
            with lens.edit(*_edits_of(knock_out, batch.is_meta, means)):
                yield knock_out, batch.score_both(lens)

    return join_scores(dict(score(batch)) for batch in batches_of(lens, pairs, batch_size))


def losses_on_text(
    lens: Lens, documents: Sequence[Tensor], layer_sets: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], FloatArray]:
    """Return the loss of each document (1, T), in nats per text token, with meta-attention zeroed in some layers."""
    losses = {}
    for layers in layer_sets:
        with lens.edit(*(edits.scale(f"blocks.{layer}.hook_meta_out", 0.0) for layer in layers)):
            losses[layers] = np.array([_loss(lens, document.to(lens.model.device)) for document in documents])
    return losses


def _loss(lens: Lens, input_ids: Tensor) -> float:
    targets = targets_of_labels(input_ids, lens.is_meta(input_ids), lens.loss_policy)
    return float(lens.run(input_ids, shift_labels=targets).loss)


def _edits_of(knock_out: KnockOut, is_meta: Tensor, means: dict[int, Tensor]) -> list[Edit | EdgeCut]:
    names = {layer: f"blocks.{layer}.hook_meta_out" for layer in knock_out.layers}
    if knock_out.kind == "zero":
        return [edits.scale(name, 0.0) for name in names.values()]
    if knock_out.kind == "older":
        return [edits.cut_older_edges(knock_out.layers, is_meta=is_meta, num_kept=knock_out.num_kept)]
    return [edits.replace(name, means[layer], at=is_meta) for layer, name in names.items()]


def _mean_outputs(lens: Lens, batches: Iterator[PairBatch]) -> dict[int, Tensor]:
    """Return the mean output (C,) of meta-attention over the meta-tokens of both prompts, by layer."""
    sums: dict[int, Tensor] = {}
    count = 0
    for batch in batches:
        if not batch.is_meta.any():
            continue
        for ids in (batch.clean, batch.corrupt):
            with lens.capture(["blocks.*.hook_meta_out"], at=batch.is_meta, dtype=torch.float64) as captured:
                lens.run(ids)
            for layer in lens.layout.meta_layers:
                total = captured[f"blocks.{layer}.hook_meta_out"].sum(0)
                sums[layer] = sums[layer] + total if layer in sums else total
            count += int(batch.is_meta.sum())
    return {layer: total / count for layer, total in sums.items()}


@measure(
    "causal",
    "nats",
    axes=("layer", "mode"),
    subject="task",
    plot=Dots("layer", by="mode"),
    positive="what is taken away helps",
)
def knockout(inputs: Inputs) -> Rows:
    """Rise of the answer's loss with meta-attention removed, its mean in its place, or its older edges cut."""
    outs = list_knock_outs(inputs.lens)
    scores = score_knock_outs(inputs.lens, pairs_of(inputs), [WHOLE, *outs])
    full = scores.pop(WHOLE).cross_entropy
    for one, left in scores.items():
        mode = one.kind if one.kind != "older" else f"older than {one.num_kept}"
        yield Row({"mode": mode, **_layer_of(one.layers)}, left.cross_entropy - full)


@measure("knockout", "nats/token", axes=("layer",), test=True, subject="text", plot=Dots("layer"), positive="it helps")
def meta_branch_gain(inputs: Inputs) -> Rows:
    """Loss on text without meta-attention minus with it, in one layer or in all together."""
    layer_sets = [one.layers for one in list_knock_outs(inputs.lens) if one.kind == "zero"]
    documents = [document.input_ids for document in inputs.subject.documents]
    losses = losses_on_text(inputs.lens, documents, [(), *layer_sets])
    for layers in layer_sets:
        yield Row(_layer_of(layers), losses[layers] - losses[()])


def _layer_of(layers: tuple[int, ...]) -> dict[str, int]:
    """Return the layer of a knock-out of one, nothing for one of all."""
    return {"layer": layers[0]} if len(layers) == 1 else {}
