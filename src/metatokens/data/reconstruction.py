"""Blocks that end with an earlier span of their text once more: what left the window must come back from the anchors.

The repetition follows the text without a mark. Its first tokens cannot be foreseen and tell which span it is; the rest
can be had only by remembering it (auto-encoding, as in work on gist tokens).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from metatokens.config.schema import ReconstructConfig
from metatokens.data.keyed_random import Purpose, hash_key

IntArray = npt.NDArray[np.int64]


def repeat_spans(
    text: IntArray, config: ReconstructConfig, *, sample_ids: IntArray, seed: int, epochs: IntArray | int
) -> IntArray:
    """Return blocks (B, N + 1), a share of them ending with a repetition; a pure function of the arguments.

    Args:
        text: (B, N + 1) int64, not changed.
        config: how many blocks, how long a span, and how far before its repetition.
        sample_ids: (B,) int64: the blocks.
        seed: of the run.
        epochs: in which the blocks are read.
    """
    key = hash_key(seed, epochs, sample_ids, Purpose.RECONSTRUCTION)
    is_chosen = (key >> np.uint64(11)) * 2.0**-53 < config.share
    num_starts = text.shape[1] - 2 * config.tokens - config.distance + 1
    starts = hash_key(seed, epochs, sample_ids, Purpose.RECONSTRUCTED_SPAN) % np.uint64(num_starts)
    span = np.take_along_axis(text, starts.astype(np.int64)[:, None] + np.arange(config.tokens), axis=1)
    repeated = text.copy()
    repeated[:, -config.tokens :] = np.where(is_chosen[:, None], span, text[:, -config.tokens :])
    return repeated
