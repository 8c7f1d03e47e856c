"""Ordinary tokens at a fixed spacing: what a kept place is worth without a meta-token."""

from torch import Tensor

from metatokens.evaluation.eviction.policies import Budget, Columns, in_window, is_sink, policy


@policy("every", check=Budget.require_anchors)
def every(columns: Columns, queries: Tensor, budget: Budget) -> Tensor:
    """See the first tokens, the newest, and every n-th in between, spread over the whole text."""
    place = columns.positions - budget.sinks
    is_kept = (place >= 0) & (place % budget.spacing == budget.spacing - 1)
    return is_sink(columns, budget) | in_window(columns, queries, budget.newest) | is_kept[:, None]
