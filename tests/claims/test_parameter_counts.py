"""The sizes of the paper's models (section 4.1: 124M, 152M with meta-attention), with GPT-2's 50,257 rows."""

import pytest
import torch

from metatokens.config.loading import load_preset
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.accounting import count_parameters
from metatokens.model.configuration import POSITION_ENCODINGS
from tiny_models import tiny_config

GPT2_VOCAB_SIZE = 50_257
SIZES = {
    "paper/gpt2-124m": 124_439_808,
    "paper/meta-learned-152m": 152_788_224,
    "paper/meta-rope-152m": 152_001_792,
    "paper/gpt2-16-layers": 152_791_296,
    "paper/pause-124m": 124_439_808,
}


def unpadded_config(preset: str) -> MetaTokenConfig:
    """Return the preset's config without the rows for the meta-token, padding and rounding."""
    fields = load_preset(preset).model.to_hf(GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - 1)
    return MetaTokenConfig(
        **{**fields, "vocab_size": GPT2_VOCAB_SIZE, "meta_token_id": None, "pad_token_id": None},
    )


@pytest.mark.parametrize(("preset", "size"), SIZES.items())
def test_preset_has_the_papers_number_of_parameters(preset: str, size: int) -> None:
    with torch.device("meta"):
        model = MetaTokenForCausalLM(unpadded_config(preset))
    assert model.num_parameters() == size


@pytest.mark.parametrize(("preset", "size"), SIZES.items())
def test_parameters_counted_from_the_config_equal_those_of_the_model(preset: str, size: int) -> None:
    assert count_parameters(unpadded_config(preset)).total == size


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_parameters_of_every_position_encoding_are_counted(encoding: str) -> None:
    config = tiny_config(position_encoding=encoding, meta_attention_layers=[1])
    assert count_parameters(config).total == MetaTokenForCausalLM(config).num_parameters()
