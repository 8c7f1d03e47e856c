"""Recall with something taken from the meta-tokens (the paper's Table 2), and by the task's own size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Dots, Lines, Row, Rows, measure
from metatokens.errors import UsageError
from metatokens.evaluation.interventions import (
    Intervention,
    NoPositionEdges,
    ZeroEmbedding,
    ZeroPosition,
    check_interventions,
    intervene,
)
from metatokens.evaluation.recall import count_right_answers, make_test_instances
from metatokens.tasks.base import PieceEncoder

Array = npt.NDArray[np.float64]
MOST_SIZES = 8
_BATCH = 16
_INTERVENTIONS: tuple[Intervention, ...] = (ZeroEmbedding(), ZeroPosition(), NoPositionEdges())


@shared
def accuracies_of(inputs: Inputs) -> dict[str, Array]:
    """Return the share of right answers of each instance, by intervention; "none" is the whole model."""
    found = {"none": _accuracy(inputs, ())}
    for intervention in _INTERVENTIONS:
        try:
            check_interventions(inputs.lens.model, [intervention])
        except UsageError as error:
            inputs.skip(str(error))
        else:
            found[intervention.kind] = _accuracy(inputs, (intervention,))
    return found


@measure(
    "causal",
    "1",
    axes=("intervention",),
    statistic="accuracy",
    subject="task",
    plot=Dots("intervention", level="chance"),
)
def accuracy(inputs: Inputs) -> Rows:
    """Share of right answers on the task's instances, with something taken from the meta-tokens."""
    for kind, shares in accuracies_of(inputs).items():
        yield Row({"intervention": kind}, shares)


@measure("causal", "1", axes=("intervention",), test=True, subject="task", positive="what is taken away helps")
def accuracy_gain(inputs: Inputs) -> Rows:
    """Share of right answers of the whole model minus that with something taken from the meta-tokens."""
    shares = accuracies_of(inputs)
    for kind in (kind for kind in shares if kind != "none"):
        yield Row({"intervention": kind}, shares["none"] - shares[kind])


@shared
def capacities_of(inputs: Inputs) -> dict[int, tuple[Array, Array]]:
    """Return the share of right answers of each instance, and that of guessing, by the task's own size."""
    task, difficulty = inputs.task.task, inputs.task.difficulty
    low, high = difficulty.size
    found = {}
    for size in sorted({round(size) for size in np.linspace(low, 2 * high, min(MOST_SIZES, 2 * high - low + 1))}):
        try:
            instances = make_test_instances(
                task,
                difficulty.model_copy(update={"size": (size, size)}),
                encoder=PieceEncoder(inputs.encoder),
                meta_token_id=inputs.meta_token_id,
                seed=inputs.config.seed,
                instances=inputs.config.documents,
            )
        except UsageError:
            inputs.skip(f"capacity at size {size}: no prompt of these lengths")
            continue
        counts = count_right_answers(inputs.lens.model, instances, batch_size=_BATCH)
        found[size] = counts.right_answers / counts.answers, np.array([one.chance for one in instances])
    return found


@measure("causal", "1", axes=("size",), statistic="accuracy", subject="task", plot=Lines("size", level="chance"))
def capacity(inputs: Inputs) -> Rows:
    """Share of right answers by the task's own size, such as items of a list, up to twice the largest asked."""
    for size, (shares, _) in capacities_of(inputs).items():
        yield Row({"size": size}, shares)


@measure("causal", "1", axes=("size",), subject="task")
def chance(inputs: Inputs) -> Rows:
    """Share of answers that a guess gets right, over the task's instances and by the task's own size."""
    yield Row({}, np.array([one.chance for one in inputs.subject.instances]))
    for size, (_, chances) in capacities_of(inputs).items():
        yield Row({"size": size}, chances)


def _accuracy(inputs: Inputs, interventions: tuple[Intervention, ...]) -> Array:
    with intervene(inputs.lens.model, interventions):
        found = count_right_answers(inputs.lens.model, inputs.subject.instances, batch_size=_BATCH)
    shares: Array = found.right_answers / found.answers
    return shares
