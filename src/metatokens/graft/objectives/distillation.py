"""Distillation: the grafted model is to predict what the same model under full attention predicts."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metatokens.graft.objectives.objective import Pass, objective
from metatokens.model.loss import LOGITS_CHUNK_ELEMENTS


@objective(needs_teacher=True)
def distillation(state: Pass) -> Tensor:
    """Return KL(full attention || grafted) summed over the drawn positions, times positions over drawn ones.

    Logits of both exist for a chunk of positions at a time; the backward pass computes them again.
    """
    assert state.teacher_states is not None
    own = torch.take_along_dim(state.states, state.sampled[..., None], dim=1).flatten(0, 1)
    full = state.teacher_states.flatten(0, 1)
    rows = max(1, LOGITS_CHUNK_ELEMENTS // state.vocab_size)
    parts = [
        checkpoint(divergence, state.head, own[start : start + rows], full[start : start + rows], use_reentrant=False)
        for start in range(0, len(own), rows)
    ]
    return torch.stack(parts).sum() * (state.states.shape[1] / state.sampled.shape[1])


def divergence(head: nn.Module, own: Tensor, full: Tensor) -> Tensor:
    """Return the summed divergence of the predictions at states (N, C) from those at others, at least in float32."""
    own_logits, full_logits = head(own), head(full)
    precision = torch.promote_types(own_logits.dtype, torch.float32)
    log_own, log_full = (torch.log_softmax(logits, -1, dtype=precision) for logits in (own_logits, full_logits))
    return nn.functional.kl_div(log_own, log_full, reduction="sum", log_target=True)
