"""Next-token loss: the targets of both policies, and cross-entropy without a full matrix of logits.

A meta-token is never a target (paper, section 3). `skip` drops the term whose target is a meta-token, so the text token
after it is predicted from the meta-token; `retarget` predicts it from the last text token instead and uses no output at
a meta-token (Mohtashami and Jaggi 2023). Either way each text token is predicted once.

The loss is always that of the logits that a call of the head returns. For a plain linear layer, loss and gradients are
computed from its weight without a call. A head with anything else on it (LoRA, hooks, offloading, quantisation, tensor
parallelism) is called.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# 64 MiB of float32 logits at a time: each chunk reads the head's weight and changes its whole gradient
LOGITS_CHUNK_ELEMENTS = 2**24


def targets_of_labels(
    labels: Tensor, meta_token_mask: Tensor, loss_policy: str, documents: Tensor | None = None
) -> Tensor:
    """Turn labels aligned with the inputs into the targets of each position.

    Args:
        labels: (B, T) int64, `labels[:, t]` the token at t or -100.
        meta_token_mask: (B, T) bool, True at meta-tokens; their labels are dropped.
        loss_policy: "skip" or "retarget".
        documents: (B or 1, T) int64, the document of each token where rows hold several: none predicts into the next.

    Returns:
        (B, T) int64: what position t must predict, -100 where it predicts nothing.
    """
    labels = labels.masked_fill(meta_token_mask, IGNORE_INDEX)
    num_tokens = labels.shape[1]
    positions = torch.arange(num_tokens, device=labels.device)
    if loss_policy == "skip":
        following = (positions + 1).expand(labels.shape)
        return _labels_at(following, labels, documents)
    # for each position the index of the next text token: a running minimum from the right
    text_positions = torch.where(meta_token_mask, num_tokens, positions)
    next_text = text_positions.flip(-1).cummin(-1).values.flip(-1)
    following = nn.functional.pad(next_text[:, 1:], (0, 1), value=num_tokens)
    return _labels_at(following, labels, documents).masked_fill(meta_token_mask, IGNORE_INDEX)


def _labels_at(following: Tensor, labels: Tensor, documents: Tensor | None) -> Tensor:
    """Return the label at the index that follows each position, (B, T); -100 past the end and in another document."""
    targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX).gather(1, following)
    if documents is None:
        return targets
    documents = documents.expand(labels.shape)
    its_document = nn.functional.pad(documents, (0, 1), value=-1).gather(1, following)
    return targets.masked_fill(its_document != documents, IGNORE_INDEX)


def loss_and_logits(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor | None,
    *,
    vocab_size: int,
    wants_logits: bool,
    logits_to_keep: int | Tensor = 0,
    num_items_in_batch: int | Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the loss of a head's predictions and its logits.

    Args:
        head: maps (..., C) to logits (..., V).
        hidden: (B, T, C) final hidden states.
        targets: (B, T) int64, what each position must predict, -100 where nothing; None for no loss.
        vocab_size: V, for the size of a chunk.
        wants_logits: return the logits beside the loss; without targets they are always returned.
        logits_to_keep: see `kept_positions`.
        num_items_in_batch: divisor of the summed loss; by default the number of valid targets.

    Returns:
        The loss in nats, a scalar of float32 (float64 for float64 logits), or None without targets; and the logits
        (B, T, V), or None if they are not wanted.
    """
    kept = kept_positions(logits_to_keep)
    if targets is None:
        return None, head(hidden[:, kept])
    if is_plain_linear(head):
        total = _sum_of_linear(head, hidden, targets)
        logits = head(hidden[:, kept]) if wants_logits else None
    elif wants_logits:
        logits = head(hidden)  # one call, as its hooks expect, gives both
        total, logits = _sum_over_targets(logits, targets), logits[:, kept]
    else:
        total, logits = _sum_in_chunks(head, hidden, targets, vocab_size), None
    num_targets = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(num_targets, Tensor):
        return total / num_targets.to(total.device).clamp(min=1), logits
    return total / max(num_targets, 1), logits  # copied to no device, which would wait


def kept_positions(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Return the index into T of the positions whose logits are made: the last n (0: all), or the indices given."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def is_plain_linear(head: nn.Module) -> bool:
    """Tell whether calling a head multiplies by its weight, adds its bias and does nothing else.

    False for a subclass (LoRA, a quantised or parametrised layer), with a hook on it or on every module, with a
    replaced `forward` (offloading), or with a weight that is not torch's own kind (a shard).
    """
    if type(head) is not nn.Linear or "forward" in vars(head) or _has_any_global_hook():
        return False
    if head._forward_pre_hooks or head._forward_hooks or head._backward_pre_hooks or head._backward_hooks:
        return False
    return all(type(tensor) in (nn.Parameter, Tensor) for tensor in (head.weight, head.bias) if tensor is not None)


def _sum_of_linear(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    weight: Tensor = head.weight  # type: ignore[assignment]
    if head.bias is not None:  # a column of the weight that every state multiplies by one
        hidden = nn.functional.pad(hidden, (0, 1), value=1.0)
        weight = torch.cat([weight, head.bias[:, None]], dim=1)  # type: ignore[index]
    return summed_cross_entropy(hidden, weight, targets)


def _sum_over_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of (..., V) logits, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    targets = targets.to(logits.device).flatten()
    return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def _sum_in_chunks(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Sum the cross-entropy of any head over (..., T, C) states, a chunk of logits at a time.

    If one chunk holds all logits, the head is called once. Otherwise it is called for each stretch of T, and again in
    the backward pass.
    """
    size = max(1, LOGITS_CHUNK_ELEMENTS // (vocab_size * hidden.shape[:-2].numel()))
    if hidden.shape[-2] <= size:
        return _sum_over_targets(head(hidden), targets)

    def sum_of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return _sum_over_targets(head(hidden), targets)

    chunks = zip(hidden.split(size, -2), targets.split(size, -1), strict=True)
    return torch.stack([checkpoint(sum_of_chunk, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of a linear head over the valid targets, in chunks of rows.

    Equal to `cross_entropy(hidden @ weight.T, targets, reduction="sum")`, but at most 2^23 logits exist at a time: the
    gradients are computed with the loss, chunk by chunk, and no logits are kept for the backward pass. Gradients that
    are to be differentiated themselves (`create_graph=True`) are computed anew, from logits.

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
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        # autograd would ask a custom function for the gradient of a parameter even then
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
        weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
        ctx.save_for_backward(hidden, weight, targets, keep, hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, keep, hidden_grad, weight_grad = ctx.saved_tensors
        # compiled code has first derivatives only, and raises an error of its own for others
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            targets = targets if keep is None else targets.masked_fill(~keep, IGNORE_INDEX)
            hidden_grad, weight_grad = _differentiable_gradients(
                hidden, weight, targets, grad_loss, ctx.needs_input_grad
            )
            return hidden_grad, weight_grad, None, None
        return (
            None if hidden_grad is None else hidden_grad * grad_loss.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * grad_loss.to(weight_grad.dtype),
            None,
            None,
        )


def _differentiable_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, grad_loss: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `hidden` (rows, C) and `weight` that are needed, each a function of both."""
    # aliases: a tied weight also produced the hidden states, and the gradient of that path is not computed here
    hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
    total = _sum_in_chunks(lambda rows: rows @ weight.T, hidden, targets, weight.shape[0])
    inputs = [tensor for tensor, is_needed in zip((hidden, weight), needed, strict=False) if is_needed]
    gradients = iter(torch.autograd.grad(total, inputs, grad_loss, create_graph=True))
    return next(gradients) if needed[0] else None, next(gradients) if needed[1] else None
