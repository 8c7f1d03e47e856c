"""The weights that `build_model` draws: GPT-2's scales, whatever the shape of the model."""

import math

import pytest
import torch

from metatokens.config.schema import ModelConfig
from metatokens.model import MetaTokenForCausalLM
from metatokens.training.initialization import build_model


def built(seed: int = 0, **changes: object) -> MetaTokenForCausalLM:
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = ModelConfig.model_validate({**shape, **changes})
    return build_model(config, text_vocab_size=500, eos_token_id=499, seed=seed)


def test_every_matrix_is_drawn_anew_and_none_like_another() -> None:
    starts = [p.flatten()[:8].tolist() for p in (*built().parameters(), *built(seed=1).parameters()) if p.ndim == 2]
    assert len({tuple(start) for start in starts}) == len(starts)


def test_model_with_meta_attention_in_one_block_shares_the_weights_of_one_with_it_in_all() -> None:
    everywhere = dict(built().named_parameters())
    once = dict(built(meta_attention_layers=(1,)).named_parameters())
    assert {name for name in everywhere.keys() - once.keys() if ".0.meta_attn." not in name} == set()
    assert all(torch.equal(parameter, everywhere[name]) for name, parameter in once.items())


@pytest.mark.parametrize("deviation", [0.02, 0.1])
def test_matrices_start_with_the_standard_deviations_of_gpt2(deviation: float) -> None:
    scaled = deviation / math.sqrt(2 * 2)  # what adds to the residual stream: two additions in each of two blocks
    for name, parameter in built(initializer_range=deviation, position_encoding="learned").named_parameters():
        if parameter.ndim == 2:
            expected = scaled if name.endswith(("o_proj.weight", "down_proj.weight")) else deviation
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name
            assert abs(float(parameter.detach().mean())) < 0.05 * expected, name


def test_biases_start_at_zero_and_norms_at_one() -> None:
    for name, parameter in built().named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_built_model_is_in_training_mode_with_float32_weights() -> None:
    model = built()
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_loss_of_a_fresh_model_is_near_that_of_a_uniform_guess() -> None:
    model, ids = built(), torch.arange(64)[None]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss == pytest.approx(math.log(model.config.vocab_size), abs=0.1)
