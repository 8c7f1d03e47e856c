"""The whole past: nothing is dropped, and a model whose own cache forgets does so."""

import torch
from torch import Tensor

from metatokens.evaluation.eviction.policies import Budget, Columns, policy


@policy("full")
def full(columns: Columns, queries: Tensor, budget: Budget) -> Tensor:
    """See everything; `Reader` then leaves the model its own cache, whatever that forgets."""
    del budget
    return torch.ones((*queries.shape, columns.positions.shape[1]), dtype=torch.bool, device=queries.device)
