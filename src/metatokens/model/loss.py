"""Next-token loss: the targets of both policies, and cross-entropy without a full matrix of logits.

No loss is paid for predicting a meta-token (paper, section 3). `skip` drops the term whose target is a meta-token, so
the text token after it is predicted from the meta-token; `retarget` predicts it from the last text token instead and
uses no output at a meta-token (Mohtashami and Jaggi 2023). Either way each text token is predicted once.
"""

from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
LOGITS_CHUNK_ELEMENTS = 2**23  # 32 MiB of float32 logits at a time


def targets_of_labels(labels: Tensor, meta_token_mask: Tensor, loss_policy: str) -> Tensor:
    """Turn labels aligned with the inputs into the targets of each position.

    Args:
        labels: (B, T) int64, `labels[:, t]` the token at t or -100.
        meta_token_mask: (B, T) bool, True at meta-tokens; their labels are dropped.
        loss_policy: "skip" or "retarget".

    Returns:
        (B, T) int64: what position t must predict, -100 where it predicts nothing.
    """
    labels = labels.masked_fill(meta_token_mask, IGNORE_INDEX)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if loss_policy == "skip":
        return shifted
    # for each position the index of the next text token: a running minimum from the right
    num_tokens = labels.shape[1]
    positions = torch.arange(num_tokens, device=labels.device)
    text_positions = torch.where(meta_token_mask, num_tokens, positions)
    next_text = text_positions.flip(-1).cummin(-1).values.flip(-1)
    following = nn.functional.pad(next_text[:, 1:], (0, 1), value=num_tokens)
    targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX).gather(1, following)
    return targets.masked_fill(meta_token_mask, IGNORE_INDEX)


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of a linear head over the valid targets, in chunks of rows.

    Equal to `cross_entropy(hidden @ weight.T, targets, reduction="sum")`, but at most 2^23 logits exist at a time: the
    gradients are computed with the loss, chunk by chunk, and no logits are kept for the backward pass.

    Args:
        hidden: (..., C) final hidden states.
        weight: (V, C) output embedding.
        targets: (...) int64; -100 is ignored.

    Returns:
        Scalar float32 (float64 for float64 input) in nats; 0 without a valid target.
    """
    targets = targets.flatten()
    hidden = hidden.flatten(0, -2)
    valid = targets != IGNORE_INDEX
    keep: Tensor | None = None
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        # rows without a target cost nothing; elsewhere the changing shape would cost a host synchronisation
        hidden, targets = hidden[valid], targets[valid]
    else:
        targets, keep = torch.where(valid, targets, 0), valid
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        # a function of our own is asked for the gradient of a parameter even then
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, keep)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, keep: Tensor | None) -> Tensor:
        """Sum the loss over the rows that `keep` (all if None) selects."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        precision = torch.promote_types(hidden.dtype, torch.float32)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=precision) if needs_weight else None
        total = torch.zeros((), dtype=precision, device=hidden.device)
        num_rows = max(1, LOGITS_CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            log_probabilities = torch.log_softmax(hidden[rows] @ weight.T, dim=-1, dtype=precision)
            picked = log_probabilities.gather(1, targets[rows, None])
            total -= picked.sum() if keep is None else (picked[:, 0] * keep[rows]).sum()
            if not needs_hidden and not needs_weight:
                continue
            # softmax minus one-hot, in place
            grad = log_probabilities.exp_().scatter_(1, targets[rows, None], picked.exp() - 1)
            if keep is not None:
                grad = grad.mul_(keep[rows, None])
            grad = grad.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = grad @ weight
            if weight_grad is not None and weight_grad.dtype == grad.dtype:
                weight_grad.addmm_(grad.T, hidden[rows])
            elif weight_grad is not None:
                weight_grad += grad.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad_loss.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * grad_loss.to(weight_grad.dtype),
            None,
            None,
        )
