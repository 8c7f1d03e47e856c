"""Landmark attention (Mohtashami and Jaggi 2023), with the model's meta-tokens as landmarks.

A landmark ends a block of text tokens, and its key stands for the block. The landmark decides how much attention an
earlier block gets; the tokens of the block decide how that attention is shared among them. `landmark_reference.py` has
the definition as a softmax of groups; here it is one softmax over scores with a gate,

    a_ij = s_ij + [b(j) < own(i)] (s_i,l_b - logsumexp_{j' in B_b} s_ij'),    -inf at landmarks and at the future,

with b(j) the block of j, B_b its text tokens and l_b its landmark; tests hold the two equal, with gradients. Blocks end
wherever meta-tokens stand, at even distances or not. The model has the parameters of a plain one. Scores are float32.
The whole (B, H, T, K) matrix exists, as in eager attention; no attention backend is used.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Cache

from metatokens.baselines.cache import MARKED_LAYER, mark_meta_tokens, real_tokens
from metatokens.baselines.landmark_retrieval import BlockTable, attend_to_best_blocks, tabulate_blocks
from metatokens.model.attention import SelfAttention
from metatokens.model.block import MetaTokenBlock
from metatokens.model.configuration import ADAPTIVE, MetaTokenConfig
from metatokens.model.masks import TokenLayout
from metatokens.model.modeling import MetaTokenForCausalLM, MetaTokenModel
from metatokens.model.position_bias import PositionBias


@strict
class LandmarkConfig(MetaTokenConfig):
    """Configuration of `LandmarkModel`."""

    model_type = "metatokens_landmark"

    meta_attention_layers: str | list[int] = "none"
    landmark_every: int = 50
    """Text tokens before each landmark in training. It is recorded for injection; the model takes any layout."""
    num_best_blocks: int | None = None
    """k: earlier blocks that each token and head reads outside training; None means all."""

    @property
    def layer_types(self) -> list[str]:
        """Return the cache layer types; the first layer remembers the landmarks."""
        return [MARKED_LAYER, *super().layer_types[1:]]

    def validate_landmarks(self) -> None:
        """Check the numbers."""
        if self.position_encoding in ADAPTIVE:
            raise ValueError(f"landmark attention does not take position_encoding {self.position_encoding!r}")
        if self.landmark_every < 1:
            raise ValueError(f"landmark_every must be at least 1, not {self.landmark_every}")
        if self.num_best_blocks is not None and self.num_best_blocks < 1:
            raise ValueError(f"num_best_blocks must be at least 1 or None, not {self.num_best_blocks}")


class Landmarks(NamedTuple):
    """Blocks of a batch, made once per forward pass for all layers; it takes the place of the attention mask.

    A tuple, so that whatever moves a layer's inputs to its device finds the tensors in it.
    """

    visible: Tensor
    """(B, 1, T, K) bool: keys that are text and neither padding nor in the query's future."""
    is_landmark: Tensor
    """(B, K) bool."""
    block_of_key: Tensor
    """(B, K) int64: number of the block that a column lies in, or ends."""
    query_columns: Tensor
    """(T,) int64."""
    positions: Tensor
    """(B, K) int64, of all columns; for the distances of a bias."""
    num_blocks: int
    bias: PositionBias | None
    """What positions add to the scores."""
    table: BlockTable | None
    """Set if only the best blocks are read."""

    @property
    def block_of_query(self) -> Tensor:
        """Return the block of each query, (B, T)."""
        return self.block_of_key[:, -len(self.query_columns) :]


def landmark_weights(scores: Tensor, landmarks: Landmarks) -> Tensor:
    """Return attention weights by the one softmax.

    Args:
        scores: (B, H, T, K) scaled scores of all keys, float32 or float64.
        landmarks: the blocks.

    Returns:
        (B, H, T, K); rows sum to 1, or are 0 where a query has nothing to see.
    """
    block_of_key = landmarks.block_of_key[:, None, None].expand(scores.shape)
    text_scores = scores.masked_fill(~landmarks.visible, -math.inf)
    # products with this matrix have a deterministic backward pass on every device, unlike gather and scatter
    is_in_block = nn.functional.one_hot(landmarks.block_of_key, landmarks.num_blocks)[:, None].to(scores.dtype)
    inside = _logsumexp_by_block(text_scores, block_of_key, is_in_block)
    # a block without a landmark gathers column 0, which has no effect: it is not an earlier block of any query
    columns = torch.arange(scores.shape[-1], device=scores.device).expand_as(landmarks.is_landmark)
    spare = torch.where(landmarks.is_landmark, landmarks.block_of_key, landmarks.num_blocks)
    ends = spare.new_zeros((len(spare), landmarks.num_blocks + 1))
    ends = ends.scatter(1, spare, columns)[:, : landmarks.num_blocks]
    landmark_scores = scores.gather(-1, ends[:, None, None].expand(*scores.shape[:3], -1))
    numbers = torch.arange(landmarks.num_blocks, device=scores.device)
    is_earlier = (numbers < landmarks.block_of_query[..., None])[:, None]
    is_open = is_earlier & (inside > -math.inf)
    gates = torch.where(is_open, landmark_scores - torch.where(is_open, inside, 0), 0)
    gated = text_scores + gates @ is_in_block.transpose(-1, -2)
    sees_any = landmarks.visible.any(-1, keepdim=True)
    return torch.where(sees_any, gated, 0).softmax(-1) * sees_any


def _logsumexp_by_block(scores: Tensor, block_of_key: Tensor, is_in_block: Tensor) -> Tensor:
    """Return (..., blocks): the logsumexp over the keys of each block, -inf for a block without any."""
    shape = (*scores.shape[:-1], is_in_block.shape[-1])
    fixed = scores.detach()
    largest = fixed.new_full(shape, -math.inf).scatter_reduce(-1, block_of_key, fixed, "amax")
    largest = torch.where(largest > -math.inf, largest, 0)
    total = (scores - largest.gather(-1, block_of_key)).exp() @ is_in_block
    is_empty = total == 0
    return torch.where(is_empty, -math.inf, torch.where(is_empty, 1, total).log() + largest)


class LandmarkAttention(SelfAttention):
    """Causal self-attention by blocks; the mask that it takes is a `Landmarks`."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the projected output (B, T, C) and, if all blocks are read, the weights (B, H, T, K)."""
        del kwargs
        landmarks: Landmarks = mask
        weights = None
        # autocast would cast the scores back to half precision
        with torch.autocast(query.device.type, enabled=False):
            if landmarks.table is not None:
                output = attend_to_best_blocks(
                    query,
                    key,
                    value,
                    blocks=landmarks.table,
                    block_of_query=landmarks.block_of_query,
                    query_columns=landmarks.query_columns,
                    num_best=self.config.num_best_blocks,
                    scaling=self.scaling,
                    positions=landmarks.positions,
                    bias=landmarks.bias,
                )
            else:
                weights = landmark_weights(self._scores(query, key, landmarks), landmarks).to(value.dtype)
                dropped = nn.functional.dropout(weights, self.config.attention_dropout, training=self.training)
                output = dropped @ value
        return self.o_proj(output.transpose(1, 2).flatten(2)), weights

    def _scores(self, query: Tensor, key: Tensor, landmarks: Landmarks) -> Tensor:
        precision = torch.promote_types(query.dtype, torch.float32)
        scores: Tensor = query.to(precision) @ key.to(precision).transpose(-1, -2) * self.scaling
        if landmarks.bias is None:
            return scores
        positions = landmarks.positions[:, None]
        return scores + landmarks.bias(positions[..., -query.shape[2] :, None] - positions[..., None, :])


class LandmarkBlock(MetaTokenBlock):
    """A block with landmark attention in place of self-attention."""

    attention_class: ClassVar[type[SelfAttention]] = LandmarkAttention


class LandmarkModel(MetaTokenModel):
    """The decoder with landmark attention."""

    config_class = LandmarkConfig
    block_class: ClassVar[type[MetaTokenBlock]] = LandmarkBlock
    _no_split_modules: ClassVar[list[str]] = ["LandmarkBlock"]
    _supports_flash_attn = False
    _supports_flex_attn = False

    def _masks_of_layers(
        self,
        mask: Any,
        hidden: Tensor,
        layout: TokenLayout,
        past_key_values: Cache | None,
        meta_token_mask: Tensor,
    ) -> Sequence[Any]:
        del mask
        is_landmark = mark_meta_tokens(meta_token_mask, past_key_values)
        is_real = real_tokens(layout, is_landmark)
        landmarks = self._find_blocks(is_landmark & is_real, is_real, hidden.shape[1], layout)
        return [landmarks] * len(self.layers)

    def _find_blocks(self, is_landmark: Tensor, is_real: Tensor, num_queries: int, layout: TokenLayout) -> Landmarks:
        columns = torch.arange(is_landmark.shape[1], device=is_landmark.device)
        block_of_key = is_landmark.long().cumsum(-1) - is_landmark.long()
        num_blocks = int(block_of_key[:, -1].max()) + 1
        query_columns = columns[-num_queries:]
        is_text = is_real & ~is_landmark
        visible = (columns <= query_columns[:, None]) & is_text[:, None, None]
        reads_best = self.config.num_best_blocks is not None and not self.training
        table = tabulate_blocks(is_text, is_landmark, block_of_key, num_blocks) if reads_best else None
        positions = layout.key_positions(len(columns), len(columns) - num_queries).expand(len(is_real), -1)
        return Landmarks(visible, is_landmark, block_of_key, query_columns, positions, num_blocks, layout.bias, table)


class LandmarkForCausalLM(MetaTokenForCausalLM):
    """The language model with landmark attention."""

    config_class = LandmarkConfig
    model_class: ClassVar[type[MetaTokenModel]] = LandmarkModel
    _no_split_modules: ClassVar[list[str]] = ["LandmarkBlock"]
    _supports_flash_attn = False
    _supports_flex_attn = False


def read_best_blocks(model: LandmarkForCausalLM, num_best_blocks: int | None) -> None:
    """Let every token and head read the best k earlier blocks from now on, outside training; None means all."""
    config: LandmarkConfig = model.config
    config.num_best_blocks = num_best_blocks
    config.validate_landmarks()
