"""What text costs a grafted model with something taken from its anchors.

Late tokens, here and in the other measures of a graft, are those for which some text has left the window.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from metatokens.analysis.inputs.documents import FloatArray
from metatokens.analysis.inputs.subject import Inputs, shared
from metatokens.analysis.measures import Dots, Row, Rows, measure
from metatokens.evaluation.significance import bca_interval
from metatokens.evaluation.statistics import Interval
from metatokens.graft.interventions import INTERVENTIONS
from metatokens.model.loss import IGNORE_INDEX


@shared
@torch.no_grad()
def losses_by_intervention(inputs: Inputs) -> dict[str, FloatArray]:
    """Return the mean loss of each document's late tokens, nats a token."""
    losses = {}
    for name, intervene in INTERVENTIONS.items():
        with intervene(inputs.model):
            losses[name] = np.array([_loss(inputs, document.input_ids) for document in inputs.subject.documents])
    return losses


def _loss(inputs: Inputs, input_ids: torch.Tensor) -> float:
    input_ids = input_ids.to(inputs.model.device)
    labels = input_ids.clone()
    labels[:, : inputs.first_lost + 1] = IGNORE_INDEX
    return float(inputs.model(input_ids, labels=labels, use_cache=False).loss)


@measure("graft", "1", axes=("intervention",), statistic="given", subject="graft", plot=Dots("intervention"))
def text_perplexity(inputs: Inputs) -> Rows:
    """Perplexity of late tokens, for which some text has left the window, with something taken from the anchors."""
    for name, losses in losses_by_intervention(inputs).items():
        nats = bca_interval(losses, seed=inputs.config.seed)
        low, high = (None if bound is None else math.exp(bound) for bound in (nats.low, nats.high))
        yield Row({"intervention": name}, Interval(math.exp(nats.estimate), low, high), len(losses))


@measure(
    "graft",
    "nats/token",
    axes=("intervention",),
    test=True,
    subject="graft",
    plot=Dots("intervention"),
    positive="what is taken away helps",
)
def anchor_gain(inputs: Inputs) -> Rows:
    """Loss of late tokens with something taken from the anchors minus that of the whole model."""
    losses = losses_by_intervention(inputs)
    for name in list(losses)[1:]:
        yield Row({"intervention": name}, losses[name] - losses["none"])
