"""A block that ends with an earlier span of its text: which, how often, how far, and that nothing else changes."""

import numpy as np
import pytest
from pydantic import ValidationError

from metatokens.config.loading import load_preset
from metatokens.config.schema import PretrainConfig, ReconstructConfig
from metatokens.data.reconstruction import repeat_spans


def repeated(config: ReconstructConfig, *, rows: int = 400, length: int = 41, seed: int = 0, epochs: int = 0):
    text = np.arange(rows * length, dtype=np.int64).reshape(rows, length)  # every token once
    return text, repeat_spans(text, config, sample_ids=np.arange(rows), seed=seed, epochs=epochs)


def test_the_end_of_a_share_of_the_blocks_is_a_span_from_beyond_the_distance():
    config = ReconstructConfig(share=0.25, tokens=5, distance=12)
    text, blocks = repeated(config)
    assert (blocks[:, :-5] == text[:, :-5]).all()
    changed = (blocks != text).any(1)
    assert abs(changed.mean() - 0.25) < 0.08  # about four standard errors
    starts = blocks[changed, -5] - text[changed, 0]
    assert (blocks[changed, -5:] == (text[changed, 0] + starts)[:, None] + np.arange(5)).all()
    # from the first token to the last start that leaves the distance between span and repetition
    assert (starts.min(), starts.max()) == (0, 41 - 2 * 5 - 12)
    assert len(set(starts.tolist())) > 15


def test_draws_depend_on_seed_epoch_and_block_alone():
    config = ReconstructConfig(share=0.5, tokens=5, distance=12)
    text, blocks = repeated(config)
    part = repeat_spans(text[7:9], config, sample_ids=np.array([7, 8]), seed=0, epochs=0)
    assert (part == blocks[7:9]).all()
    for other in ({"seed": 1}, {"epochs": 1}):
        assert (repeated(config, **other)[1] != blocks).any(1).mean() > 0.3


def test_a_span_that_does_not_fit_into_a_block_is_refused():
    with pytest.raises(ValidationError, match=r"reconstruct: 2 x 100 tokens and a distance of 64 .*230 text tokens"):
        PretrainConfig.model_validate(
            {**load_preset("tiny/memory").model_dump(), "reconstruct": {"tokens": 100, "distance": 64}}
        )
