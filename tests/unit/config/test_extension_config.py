"""The configuration of a longer window: what becomes of the model, and what is refused."""

import math
from pathlib import Path

import pytest

from metatokens.config.attention import BlockwiseAttention, SlidingWindowAttention
from metatokens.config.extension import extend_model, extension_config
from metatokens.config.schema import (
    DynamicScaling,
    LinearScaling,
    ModelConfig,
    NoInjection,
    UniformInjection,
    YarnScaling,
)
from metatokens.errors import UsageError

SMALL = ModelConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64)
XPOS = SMALL.model_copy(update={"position_encoding": "xpos"})


def test_yarn_takes_the_window_for_the_trained_one_and_the_papers_parameters():
    extended = extend_model(SMALL, "yarn", 4)
    assert extended.max_position_embeddings == extended.max_sequence_length == 256
    assert extended.rope_scaling == YarnScaling(
        factor=4, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, attention_factor=None
    )


def test_linear_scaling_multiplies_the_window():
    extended = extend_model(SMALL, "linear", 4)
    assert (extended.max_position_embeddings, extended.rope_scaling) == (256, LinearScaling(factor=4))


def test_dynamic_scaling_keeps_the_trained_window_and_lengthens_the_sequence():
    extended = extend_model(SMALL, "dynamic", 4)
    assert (extended.max_position_embeddings, extended.max_sequence_length) == (64, 256)
    assert extended.rope_scaling == DynamicScaling(factor=4)


def test_blockwise_attention_takes_the_window_for_two_blocks_and_keeps_them():
    extended = extend_model(XPOS, "blockwise", 4)
    assert (extended.max_position_embeddings, extended.attention) == (256, BlockwiseAttention(window=64))


@pytest.mark.parametrize("method", ["yarn", "linear", "dynamic", "blockwise"])
def test_twice_by_two_is_once_by_four(method):
    start = XPOS if method == "blockwise" else SMALL
    assert extend_model(extend_model(start, method, 2), method, 2) == extend_model(start, method, 4)


def test_a_further_extension_keeps_parameters_that_were_chosen_before():
    chosen = YarnScaling(factor=2, original_max_position_embeddings=64, beta_fast=16, attention_factor=1)
    before = SMALL.model_copy(update={"rope_scaling": chosen, "max_position_embeddings": 128})
    assert extend_model(before, "yarn", 2).rope_scaling == chosen.model_copy(update={"factor": 4.0})


def test_another_method_on_top_is_refused():
    with pytest.raises(UsageError, match=r"--method linear: expected yarn.*extend it further by yarn"):
        extend_model(extend_model(SMALL, "yarn", 2), "linear", 2)


@pytest.mark.parametrize("factor", [1, 0.5, 0, -4, math.nan, math.inf])
def test_a_factor_that_extends_nothing_is_refused(factor):
    with pytest.raises(UsageError, match="--factor: expected more than 1"):
        extend_model(SMALL, "yarn", factor)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"max_position_embeddings": 63}, "full attention and a window of 63"),
        ({"attention": SlidingWindowAttention()}, "sliding_window attention"),
    ],
)
def test_blocks_that_do_not_fit_the_window_are_refused(change, found):
    with pytest.raises(UsageError, match=f"--method blockwise: expected full attention.*two blocks, found {found}"):
        extend_model(XPOS.model_copy(update=change), "blockwise", 4)


def test_blocks_are_refused_for_rope_and_scaling_for_xpos():
    with pytest.raises(UsageError, match=r"xpos \(by blockwise\).*found rope"):
        extend_model(SMALL, "blockwise", 4)
    with pytest.raises(UsageError, match=r"expected rope .*found xpos"):
        extend_model(XPOS, "yarn", 4)


def test_a_range_of_randomised_positions_is_not_extended():
    with pytest.raises(UsageError, match=r"model\.position_range: expected off.*found 512"):
        extend_model(SMALL.model_copy(update={"position_range": 512}), "yarn", 4)


@pytest.mark.parametrize("encoding", ["learned", "alibi", "none"])
def test_a_position_encoding_without_frequencies_is_refused_with_those_that_have_some(encoding):
    with pytest.raises(UsageError, match=f"expected rope .*yarn, linear or dynamic.*found {encoding}"):
        extend_model(SMALL.model_copy(update={"position_encoding": encoding}), "yarn", 4)


def test_the_training_is_the_presets_on_blocks_of_the_new_window():
    model = extend_model(SMALL, "dynamic", 4)
    config = extension_config("tiny/extend", start_from=Path("run"), model=model, overrides=["--seed", "7"])
    assert (config.model, config.start_from, config.seed) == (model, Path("run"), 7)
    assert (config.data.block_size, config.total_steps) == (256, 200)
    assert config.injection == UniformInjection()


def test_the_injection_of_the_pre_training_goes_before_the_presets_and_an_override_before_both():
    model = extend_model(SMALL, "yarn", 4)

    def injection(*overrides):
        return extension_config(
            "tiny/extend", start_from=Path("run"), model=model, injection=NoInjection(), overrides=overrides
        ).injection

    assert injection() == NoInjection()
    assert injection("--injection.kind", "uniform", "--injection.ratio", "0.2") == UniformInjection(ratio=0.2)


def test_a_block_longer_than_the_new_window_is_refused():
    with pytest.raises(UsageError, match=r"block_size 257 exceeds model\.max_position_embeddings 256"):
        extension_config(
            "tiny/extend",
            start_from=Path("run"),
            model=extend_model(SMALL, "yarn", 4),
            overrides=["--data.block_size", "257"],
        )
