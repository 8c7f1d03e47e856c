"""What the head of a grafted model reads from the states of its text, layer by layer (logit lens, nostalgebraist 2020).

The states are those of the text alone, as the model returns them; the anchors' own are not read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metatokens.analysis.inputs.subject import Inputs
from metatokens.analysis.measures import Lines, Rows, measure, rows_over
from metatokens.graft.grafting import graft_of
from metatokens.graft.interventions import INTERVENTIONS

SHOWN = ("none", "path cut", "switched off")
_LOGITS_AT_A_TIME = 2**23  # 32 MiB of float32


@measure("graft", "nats/token", axes=("layer", "intervention"), subject="graft", plot=Lines("layer", by="intervention"))
@torch.no_grad()
def readout_loss(inputs: Inputs) -> Rows:
    """Loss of late tokens, predicted by the model's own head from the state of a layer of the token before."""
    found = []
    for name in SHOWN:
        with INTERVENTIONS[name](inputs.model):
            found.append([_losses(inputs, document.input_ids) for document in inputs.subject.documents])
    by_layer = np.array(found).transpose(1, 2, 0)
    yield from rows_over(by_layer, range(by_layer.shape[1]), SHOWN, names=("layer", "intervention"))


def _losses(inputs: Inputs, input_ids: Tensor) -> list[float]:
    model: Any = inputs.model
    input_ids = input_ids.to(model.device)
    states = model.base_model(input_ids, output_hidden_states=True, use_cache=False).hidden_states
    norm, head = model.base_model.get_submodule(graft_of(model).family.norm), model.get_output_embeddings()
    places = torch.arange(inputs.first_lost, input_ids.shape[1] - 1, device=model.device)
    chunks = places.split(max(1, _LOGITS_AT_A_TIME // head.weight.shape[0]))
    losses = []
    for layer, layer_states in enumerate(states):
        # the last one has been normed
        read = layer_states[0] if layer == len(states) - 1 else norm(layer_states[0])
        sums = [cross_entropy(head(read[at]).float(), input_ids[0, at + 1], reduction="sum") for at in chunks]
        losses.append(float(torch.stack(sums).sum() / len(places)))
    return losses
