"""Landmark attention as its paper defines it, query by query, kept as the oracle of the one-softmax form.

Mohtashami and Jaggi 2023, section 3.1 ("grouped softmax"). A block is a run of tokens and the landmark that ends it.
For a query of block `own`, group 0 holds the tokens of its own block up to itself and the landmarks of earlier blocks,
and group b the tokens of the earlier block b. With p_g the softmax inside group g,

    w_j = p_0(j)            for a token j of the own block,
    w_j = p_0(l_b) p_b(j)   for a token j of an earlier block b with landmark l_b,

and no landmark has a weight of its own. The landmark of the own block is masked, even for itself. A landmark whose
block holds no token takes no part: its block could not receive the mass.
"""

import torch
from torch import Tensor


def grouped_softmax_weights(scores: Tensor, *, is_landmark: Tensor, is_real: Tensor) -> Tensor:
    """Return the attention weights of the definition.

    Args:
        scores: (B, H, T, K) scaled scores; the queries are the last T of the K tokens.
        is_landmark: (B, K) bool.
        is_real: (B, K) bool, False at padding.

    Returns:
        (B, H, T, K) in the dtype of `scores`; rows sum to 1, or are 0 where a query has nothing to see.
    """
    num_rows, num_heads, num_queries, num_keys = scores.shape
    weights = []
    for row in range(num_rows):
        for head in range(num_heads):
            for query in range(num_queries):
                last = num_keys - num_queries + query
                blocks = _split_into_blocks(is_landmark[row].tolist(), is_real[row].tolist(), last)
                weights.append(_weights_of_query(scores[row, head, query], *blocks))
    return torch.stack(weights).view(scores.shape)


def _split_into_blocks(
    is_landmark: list[bool], is_real: list[bool], last: int
) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """Return (landmark, tokens) of each earlier block that has tokens, and the tokens of the own block."""
    earlier: list[tuple[int, list[int]]] = []
    tokens: list[int] = []
    for column in range(last + 1):
        if not is_landmark[column]:
            if is_real[column]:
                tokens.append(column)
        elif column < last:
            if tokens:
                earlier.append((column, tokens))
            tokens = []
    return earlier, tokens


def _weights_of_query(scores: Tensor, earlier: list[tuple[int, list[int]]], own: list[int]) -> Tensor:
    weights = torch.zeros_like(scores)
    group = [*own, *(landmark for landmark, _ in earlier)]
    if not group:
        return weights
    shares = scores[group].softmax(0)
    weights = weights.index_put((torch.tensor(own, dtype=torch.long),), shares[: len(own)])
    for number, (_, tokens) in enumerate(earlier):
        inside = shares[len(own) + number] * scores[tokens].softmax(0)
        weights = weights.index_put((torch.tensor(tokens),), inside)
    return weights
