"""The newest columns, as many as the budget has."""

from torch import Tensor

from metatokens.evaluation.eviction.policies import Budget, Columns, in_window, policy


@policy("window")
def window(columns: Columns, queries: Tensor, budget: Budget) -> Tensor:
    """See the newest tokens."""
    return in_window(columns, queries, budget.columns)
