"""Cache layers of the baselines: one that also remembers which tokens are meta-tokens, one that carries a state.

Landmark attention cuts blocks at them and Longformer's pattern may make them global, so a later token must know where
they stand. The first layer of the cache keeps the marks for all layers. They grow with the sequence; a static cache has
no place for them, nor for a state.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Cache

from metatokens.model.cache import MetaDynamicLayer
from metatokens.model.masks import TokenLayout

MARKED_LAYER = "marked_attention"
RECURRENT_LAYER = "recurrent_attention"


class MarkedDynamicLayer(MetaDynamicLayer):
    """Keys and values of both attentions, and `marks` (B, K) bool, True at meta-tokens."""

    _layer_type = MARKED_LAYER
    marks: Tensor | None = None

    def update_marks(self, is_meta_BT: Tensor) -> Tensor:
        """Append the marks of new tokens and return those of all columns, (B, K)."""
        self.marks = is_meta_BT if self.marks is None else torch.cat([self.marks, is_meta_BT], dim=-1)
        return self.marks

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.marks = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        if self.marks is not None:
            self.marks = self.marks.index_select(0, beam_idx.to(self.marks.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.marks is not None:
            self.marks = self.marks.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        if self.marks is not None:
            self.marks = self.marks[indices, ...]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens."""
        super().crop(tokens_to_remove)
        if self.marks is not None:
            self.marks = self.marks[:, : self.get_seq_length()]


class RecurrentDynamicLayer(MetaDynamicLayer):
    """Keys and values of both attentions, and what a recurrent block carries on; a state cannot be taken back."""

    _layer_type = RECURRENT_LAYER
    is_croppable = False
    carried: tuple[Tensor, ...] | None = None
    """Its rows are those of the batch: the state (B, S, C), its keys and values, those of the tokens of the last window
    in as many places as a window has, and the number of these tokens (B,)."""

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.carried = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove no token.

        Raises:
            ValueError: if one is to be removed.
        """
        if tokens_to_remove and self.carried is not None:
            raise ValueError("a recurrent state cannot forget its newest tokens: read the text again with a new cache")

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        super()._map(fn)
        if self.carried is not None:
            self.carried = tuple(map(fn, self.carried))


def mark_meta_tokens(is_meta_BT: Tensor, past_key_values: Cache | None) -> Tensor:
    """Tell which of all columns, those in the cache first, are meta-tokens: (B, K) bool.

    Raises:
        ValueError: for a cache without a place for the marks, such as a static one.
    """
    if past_key_values is None:
        return is_meta_BT
    layer = next(iter(past_key_values.layers), None)
    if not isinstance(layer, MarkedDynamicLayer):
        raise ValueError(
            f"the cache, a {type(past_key_values).__name__}, was not made from this model's config or is static, and "
            "has no place to mark the meta-tokens: use DynamicCache(config=model.config)"
        )
    return layer.update_marks(is_meta_BT)


def real_tokens(layout: TokenLayout, is_meta_BK: Tensor) -> Tensor:
    """Tell which of all columns are not padding: (B, K) bool.

    Raises:
        ValueError: for packed documents, or a mask that is not (B, K).
    """
    if layout.documents is not None:
        raise ValueError("this attention takes one document a row: leave out position_ids that start anew")
    if layout.attention_mask is None:
        return torch.ones_like(is_meta_BK)
    if layout.attention_mask.ndim != 2:
        raise ValueError("this attention makes its own mask: give attention_mask as (batch, tokens), 0 at padding")
    is_real: Tensor = layout.attention_mask.bool().to(is_meta_BK.device)
    return nn.functional.pad(is_real, (0, is_meta_BK.shape[1] - is_real.shape[1]))  # a static cache's empty columns
