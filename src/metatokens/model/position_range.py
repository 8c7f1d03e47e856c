"""Randomised positions (Ruoss et al. 2023): tokens stand at ordered positions out of more than a text has tokens.

In training mode each forward pass draws them anew, uniformly and without replacement, from the global generator, as
dropout does: n positions for a row of n tokens. So a short text has seen the positions of a long one. Otherwise they
are fixed: of N positions for texts of at most L tokens, the token behind i others has (i + 1) (N + 1) / (L + 1) - 1,
rounded down, which is where draws of L positions have it on average.

Deviation: randomised positions are drawn in training alone; their paper draws at evaluation too. Here a token's
position must not depend on how the text goes on, or the keys in a cache would be wrong, and two evaluations of a model
must give the same numbers. L is the window, and a text much shorter than L stands closer together than in training: set
`max_position_embeddings` to about the length of what is read. Recall and perplexity do so for each batch.
"""

from typing import Any

import torch
from torch import Tensor

from .masks import is_traced


def table_of_positions(config: Any, counts: Tensor, num_rows: int, *, seen: int | Tensor, draws: bool) -> Tensor | None:
    """Return the position of the token behind i others, (B or 1, L) int64, for each i that a text can have.

    Args:
        config: the model's configuration.
        counts: (B or 1, T) int64, how many tokens of its text stand before each token.
        num_rows: B.
        seen: tokens in the cache.
        draws: whether the model is in training mode.

    Returns:
        None if tokens stand at their counts. A drawn row holds N where it has no token.

    Raises:
        ValueError: for counts beyond the longest text, or a cache in training.
    """
    if config.position_range is None:
        return None
    if draws and isinstance(seen, int) and seen:
        raise ValueError("position_range draws the positions of a whole text in training: call model.eval() first")
    if counts.device.type == "cpu" and not is_traced():  # elsewhere the look would wait for the device
        config.check_length(int(counts.max()) + 1)
    if draws:
        lengths = counts.amax(-1, keepdim=True).expand(num_rows, 1) + 1
        return draw_positions(lengths, config.position_range)[:, : config.max_position_embeddings]
    numbers = torch.arange(config.max_position_embeddings, device=counts.device)
    table: Tensor = (numbers + 1) * (config.position_range + 1) // (config.max_position_embeddings + 1) - 1
    return table[None]


def draw_positions(lengths: Tensor, num_positions: int) -> Tensor:
    """Draw as many of N positions as each row has tokens; uses the global generator of the device of `lengths`.

    Args:
        lengths: (B, 1) int64, at most N.
        num_positions: N.

    Returns:
        (B, N) int64: those of a row in rising order, then N.
    """
    shape = len(lengths), num_positions
    ranks = torch.rand(shape, device=lengths.device).argsort(-1).argsort(-1)
    places = torch.arange(num_positions, device=lengths.device)
    return torch.where(ranks < lengths, places, num_positions).sort(-1).values
