"""Landmark attention's block inference: a query reads the best k earlier blocks by landmark score, and its own block.

Mohtashami and Jaggi 2023, section 3.2, with the blocks chosen for each token and head. The cache is the ordinary one:
every key stays where it is, rotated at its true position. A query touches k blocks, its own, and one key of each other
block.
Deviation: the "stingy" positions of Landmark's official code are not implemented. They squeeze the chosen blocks next
to the query, so that positions stay below the trained length. Here a block keeps its true positions, so a model with
RoPE meets distances it was not trained on unless its RoPE is scaled.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metatokens.model.position_bias import PositionBias

QUERY_CHUNK = 128  # queries at a time: the gathered blocks take H x 128 x (k + 1) x block x D elements


class BlockTable(NamedTuple):
    """The columns of each block; blocks with fewer tokens than the longest are filled up with -1."""

    columns: Tensor
    """(B, blocks, L) int64: the columns of each block's text tokens."""
    landmarks: Tensor
    """(B, blocks) int64: the column of the landmark that ends the block; -1 if there is none, or no token."""


def tabulate_blocks(is_text: Tensor, is_landmark: Tensor, block_of_key: Tensor, num_blocks: int) -> BlockTable:
    """Tabulate the blocks of (B, K) columns; the tensors are (B, K), and `block_of_key` is the block of each column."""
    num_rows, num_keys = is_text.shape
    columns = torch.arange(num_keys, device=is_text.device).expand(num_rows, -1)
    sizes = is_text.new_zeros((num_rows, num_blocks), dtype=torch.long).scatter_add(1, block_of_key, is_text.long())
    longest = max(1, int(sizes.max()))
    before = (sizes.cumsum(-1) - sizes).gather(1, block_of_key)
    place = block_of_key * longest + is_text.long().cumsum(-1) - 1 - before
    spare = num_blocks * longest  # for the columns that are not text tokens
    table = torch.full((num_rows, spare + 1), -1, device=is_text.device)
    table = table.scatter(1, torch.where(is_text, place, spare), columns)[:, :spare]
    ends = torch.full((num_rows, num_blocks + 1), -1, device=is_text.device)
    ends = ends.scatter(1, torch.where(is_landmark, block_of_key, num_blocks), columns)[:, :num_blocks]
    return BlockTable(table.view(num_rows, num_blocks, longest), torch.where(sizes > 0, ends, -1))


def attend_to_best_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    blocks: BlockTable,
    block_of_query: Tensor,
    query_columns: Tensor,
    num_best: int,
    scaling: float,
    positions: Tensor,
    bias: PositionBias | None = None,
) -> Tensor:
    """Let each query and head attend to its own block and the `num_best` earlier blocks of highest landmark score.

    Equal to the full form when `num_best` reaches the number of blocks.

    Args:
        query: (B, H, T, D).
        key: (B, H, K, D), rotated.
        value: (B, H, K, D).
        blocks: the table of all K columns.
        block_of_query: (B, T) int64.
        query_columns: (T,) int64, ascending.
        num_best: k.
        scaling: factor on the scores.
        positions: (B, K) int64, for the distances of a bias.
        bias: what positions add to the scores, or None.

    Returns:
        (B, H, T, D) in the dtype of `value`; scores are made in float32, or float64 for float64 input.
    """
    pieces = []
    for start in range(0, query.shape[2], QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        pieces.append(
            _attend_chunk(
                query[:, :, chunk],
                key,
                value,
                blocks,
                block_of_query[:, chunk],
                query_columns[chunk],
                min(num_best, blocks.landmarks.shape[1]),
                scaling,
                positions,
                bias,
            )
        )
    return torch.cat(pieces, dim=2)


def _attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockTable,
    block_of_query: Tensor,
    query_columns: Tensor,
    num_best: int,
    scaling: float,
    positions: Tensor,
    bias: PositionBias | None,
) -> Tensor:
    num_rows, num_heads, num_queries, _ = query.shape
    precision = torch.promote_types(query.dtype, torch.float32)
    query = query.to(precision) * scaling
    block_numbers = torch.arange(blocks.landmarks.shape[1], device=query.device)
    usable = (block_numbers < block_of_query[..., None]) & (blocks.landmarks[:, None] >= 0)
    landmark_keys = _take(key, blocks.landmarks[:, None].expand(-1, num_heads, -1)).to(precision)
    landmark_scores = query @ landmark_keys.transpose(-1, -2)
    if bias is not None:
        query_positions = positions[:, query_columns]
        of_landmarks = positions.gather(1, blocks.landmarks.clamp(min=0))
        landmark_scores = landmark_scores + bias((query_positions[:, :, None] - of_landmarks[:, None])[:, None])
    best = landmark_scores.masked_fill(~usable[:, None], -math.inf).topk(num_best, dim=-1)

    own = block_of_query[:, None, :, None].expand(-1, num_heads, -1, -1)
    chosen = torch.cat([best.indices, own], dim=-1)  # (B, H, T, k + 1)
    columns = blocks.columns[torch.arange(num_rows, device=query.device)[:, None, None, None], chosen]
    shape = columns.shape  # (B, H, T, k + 1, L)
    flat = columns.flatten(2)
    keys = _take(key, flat).view(*shape, -1).to(precision)
    scores = (keys @ query[:, :, :, None, :, None])[..., 0]
    if bias is not None:
        of_keys = positions[:, None].expand(-1, num_heads, -1).gather(2, flat.clamp(min=0)).view(shape)
        scores = scores + bias(query_positions[:, None, :, None, None] - of_keys)
    seen = (columns >= 0) & (columns <= query_columns[:, None, None])
    scores = scores.masked_fill(~seen, -math.inf)
    inside = scores[..., :-1, :].logsumexp(-1)
    # where fewer than k blocks are usable, the others were chosen with a score of -inf, which closes their gate
    gates = torch.where(inside > -math.inf, best.values - inside, 0)
    scores = torch.cat([scores[..., :-1, :] + gates[..., None], scores[..., -1:, :]], dim=-2).flatten(3)
    sees_any = seen.flatten(3).any(-1, keepdim=True)
    weights = torch.where(sees_any, scores, 0).softmax(-1) * sees_any
    values = _take(value, flat).view(num_rows, num_heads, num_queries, weights.shape[-1], -1)
    return (weights.to(value.dtype)[..., None, :] @ values)[..., 0, :]


def _take(table: Tensor, columns: Tensor) -> Tensor:
    """Gather rows of (B, H, K, D) at (B, H, N); a column -1 gives row 0, to be masked."""
    return table.gather(2, columns.clamp(min=0)[..., None].expand(-1, -1, -1, table.shape[-1]))
