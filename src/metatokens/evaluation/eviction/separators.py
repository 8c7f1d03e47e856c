"""Ends of clauses (SepLLM: Chen et al. 2025, without training), the newest ones where there are too many."""

from torch import Tensor

from metatokens.evaluation.eviction.policies import Budget, Columns, in_window, is_sink, newest, policy


@policy("separators", check=Budget.require_anchors)
def separators(columns: Columns, queries: Tensor, budget: Budget) -> Tensor:
    """See the first tokens, the newest, and the newest separators in between."""
    always = is_sink(columns, budget) | in_window(columns, queries, budget.newest)
    return always | newest(columns.is_separator[:, None] & ~always, budget.anchors)
