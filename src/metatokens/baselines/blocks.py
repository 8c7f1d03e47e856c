"""Sparse attention in blocks of queries, each over the keys that it may see: no tensor of all pairs is ever made.

A plan is made once per forward pass and pattern. The dense mask of `metatokens.model.masks.make_causal_mask` is the
slow and obvious form; a test holds the two equal.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metatokens.model.masks import MaskFunction
from metatokens.model.position_bias import PositionBias, add_bias

QUERIES_PER_BLOCK = 128
SHORTEST = 512
"""Below it the dense mask is small, and one call of the kernel is faster than several."""

Span = slice | Tensor
"""Columns: a range, or their numbers (n,) int64."""


class PlacedBias(NamedTuple):
    """A bias, and the positions of its queries and keys."""

    query_positions: Tensor
    """(B or 1, T) int64."""
    key_positions: Tensor
    """(B or 1, K) int64."""
    bias: PositionBias


class BlockPlan(NamedTuple):
    """Blocks of queries, which together are all T queries, and the keys among K columns that each may see."""

    queries: list[Span]
    """Of each block, n of them."""
    keys: list[Span]
    """Of each block, m of them."""
    masks: list[Tensor]
    """(B or 1, H or 1, n, m) of each block, bool with True = keep, or additive."""
    num_columns: int
    """K."""

    def dense(self, num_queries: int) -> Tensor:
        """Return the mask over all pairs, (B or 1, H or 1, T, K)."""
        first = self.masks[0]
        hidden = False if first.dtype == torch.bool else torch.finfo(first.dtype).min
        whole = first.new_full((*first.shape[:2], num_queries, self.num_columns), hidden)
        columns = torch.arange(max(num_queries, self.num_columns), device=first.device)
        for queries, keys, mask in self.blocks():
            whole[:, :, columns[queries][:, None], columns[keys]] = mask
        return whole

    def blocks(self) -> Iterator[tuple[Span, Span, Tensor]]:
        """Yield queries, keys and mask of each block."""
        yield from zip(self.queries, self.keys, self.masks, strict=True)


def plan_blocks(
    sees: MaskFunction,
    keys_of: Callable[[Tensor], Tensor],
    is_real: Tensor,
    num_queries: int,
    *,
    sees_everything: Tensor,
    placed: PlacedBias | None,
    device: torch.device,
) -> BlockPlan:
    """Cut the last T of K columns into blocks of queries.

    Args:
        sees: the pattern, of columns.
        keys_of: takes columns of queries (n,) and tells of each column whether one of them may see it, (K,) bool; it
            may say so of a column that none sees.
        is_real: (B or 1, K) bool, False at padding.
        num_queries: T.
        sees_everything: (K,) bool, queries that are kept out of the others' blocks, since they see all that is past.
        placed: what positions add to the scores, or None.
        device: where the plan is used; the other tensors are on the CPU, because their values decide its shapes.
    """
    num_columns = is_real.shape[1]
    columns = torch.arange(num_columns)
    latest = columns[num_columns - num_queries :]
    everywhere = sees_everything[latest]
    rows = torch.arange(len(is_real))[:, None, None]
    head = torch.zeros((), dtype=torch.int64)
    plan = BlockPlan([], [], [], num_columns)
    for kind, is_kept in ((latest[~everywhere], False), (latest[everywhere], True)):
        for block in kind.split(QUERIES_PER_BLOCK) if len(kind) else ():
            candidates = columns <= block[-1] if is_kept else keys_of(block) & (columns <= block[-1])
            candidates[block] = True
            keys = candidates.nonzero()[:, 0]
            query, key = block[:, None], keys[None]
            mask = sees(rows, head, query, key) & (key <= query) & is_real[:, None, keys]
            mask = (mask | (query == key))[:, None]  # a row of padding must not be empty
            if placed is not None:
                positions = placed.query_positions[:, block - latest[0]], placed.key_positions[:, keys]
                mask = add_bias(mask, *positions, placed.bias)
            plan.queries.append(_as_span(block - latest[0], device))
            plan.keys.append(_as_span(keys, device))
            plan.masks.append(mask.to(device))
    return plan


def _as_span(columns: Tensor, device: torch.device) -> Span:
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns.to(device)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scaling: float) -> Tensor:
    """Return the attention's output (B, T, H, D), for queries (B, H, T, D) and keys and values (B, H, K, D).

    It keeps its inputs alone for the backward pass, which computes one block after another anew. There are no second
    derivatives.
    """
    output: Tensor = _InBlocks.apply(  # type: ignore[no-untyped-call]
        query.to(value.dtype), key.to(value.dtype), value, plan, scaling, *plan.masks
    )
    return output.transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, scaling: float, *masks: Tensor
    ) -> Tensor:
        del masks  # those of the plan: they get gradients where a bias in them is learned
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scaling = plan, scaling
        batch, heads, length, _ = query.shape
        # laid out as the caller reshapes it
        output = value.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        for queries, keys, mask in plan.blocks():
            output[:, :, queries] = _attend(query[:, :, queries], key[:, :, keys], value[:, :, keys], mask, scaling)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        of_masks: list[Tensor | None] = []
        for queries, keys, mask in ctx.plan.blocks():
            spans = queries, keys, keys
            wholes = zip((query, key, value), spans, strict=True)
            given = [whole[:, :, span].detach().requires_grad_() for whole, span in wholes]
            mask = mask.detach().requires_grad_(mask.requires_grad)  # noqa: PLW2901
            with torch.enable_grad():
                output = _attend(given[0], given[1], given[2], mask, ctx.scaling)
            wanted = [*given, mask] if mask.requires_grad else given
            parts = torch.autograd.grad(output, wanted, grad_output[:, :, queries])
            of_masks.append(parts[-1] if mask.requires_grad else None)
            for grad, span, part in zip(grads, spans, parts[:3], strict=True):
                if isinstance(span, slice):
                    grad[:, :, span] += part
                else:
                    grad.index_add_(2, span, part)
        return *grads, None, None, *of_masks
