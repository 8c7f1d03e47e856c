"""The loss of answers about what has left the window."""

import torch
from torch import Tensor, nn

from metatokens.graft.objectives.objective import Pass, objective
from metatokens.model.loss import IGNORE_INDEX


@objective(needs_answers=True)
def needles(state: Pass) -> Tensor:
    """Return the mean loss of each block's answer, times its positions; a block without an answer adds nothing."""
    assert state.answers is not None
    is_answer = state.answers != IGNORE_INDEX
    share = (is_answer / is_answer.sum(-1, keepdim=True))[is_answer]
    logits = state.head(state.states[is_answer])  # of few positions
    precision = torch.promote_types(logits.dtype, torch.float32)
    losses = nn.functional.cross_entropy(logits.to(precision), state.answers[is_answer], reduction="none")
    return (losses * share).sum() * state.states.shape[1]
