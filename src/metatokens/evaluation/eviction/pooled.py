"""Averages in place of tokens: the mean key and the mean value of each span of the text that has left the window.

A key is averaged as it stands in the cache, rotated by its position. A span stays as tokens until all of it has left
the window; so that the cache stays within its budget, the window gives up the columns that such a rest may need. A
window that has not that many is refused.
"""

from torch import Tensor

from metatokens.evaluation.eviction.policies import Budget, Columns, in_window, is_sink, policy


@policy("pooled", check=Budget.require_spans, tokens_in_pool=lambda budget: budget.spacing)
def pooled(columns: Columns, queries: Tensor, budget: Budget) -> Tensor:
    """See the first tokens, the tokens of spans that reach into the window, and the pools of all earlier spans."""
    span = budget.spacing
    window = budget.newest - (span - 1)
    place = columns.positions - budget.sinks
    last_of_span = columns.positions - place % span + span - 1
    ends = Columns(last_of_span, columns.is_separator, columns.is_pool)
    reaches_window = in_window(ends, queries, window)
    return is_sink(columns, budget) | (reaches_window ^ columns.is_pool[:, None])
