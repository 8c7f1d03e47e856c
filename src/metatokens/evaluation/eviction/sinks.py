"""Attention sinks (Xiao et al. 2024, StreamingLLM), with the positions of the text."""

from torch import Tensor

from metatokens.evaluation.eviction.policies import Budget, Columns, in_window, is_sink, policy


@policy("sinks", check=Budget.require_window)
def sinks(columns: Columns, queries: Tensor, budget: Budget) -> Tensor:
    """See the first tokens and the newest."""
    return is_sink(columns, budget) | in_window(columns, queries, budget.columns - budget.sinks)
