"""Weights as a function of the seed and their name."""

import pytest
import torch

from metatokens.config.schema import ModelConfig
from metatokens.errors import UsageError
from metatokens.model import MetaTokenForCausalLM
from metatokens.training.initialization import build_model

SMALL = ModelConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)


def build(config: ModelConfig = SMALL, seed: int = 0) -> MetaTokenForCausalLM:
    return build_model(config, text_vocab_size=60, eos_token_id=0, seed=seed)


def test_equal_seeds_give_equal_bits_whatever_was_drawn_before():
    first = build()
    torch.rand(7)
    for name, tensor in build().state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name


def test_another_seed_gives_other_weights():
    assert not torch.equal(build().model.embed_tokens.weight, build(seed=1).model.embed_tokens.weight)


def test_a_plain_twin_has_the_same_weights_where_it_has_them():
    meta = build().state_dict()
    plain = build(SMALL.model_copy(update={"meta_attention_layers": "none"})).state_dict()
    assert plain.keys() < meta.keys()
    assert {name.split(".")[3] for name in meta.keys() - plain.keys()} == {"meta_attn"}
    for name, tensor in plain.items():
        assert torch.equal(tensor, meta[name]), name


def test_no_two_matrices_are_drawn_alike():
    matrices = [p.detach() for n, p in build().named_parameters() if n.endswith("proj.weight")]
    assert len({float(matrix.flatten()[0]) for matrix in matrices}) == len(matrices)


def test_projections_into_the_residual_stream_start_smaller():
    config = SMALL.model_copy(update={"hidden_size": 128})
    layer = build(config).model.layers[0]
    for attention in (layer.self_attn, layer.meta_attn):
        assert attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert attention.o_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_activation_comes_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"model\.hidden_act: .*'gelou'; did you mean 'gelu'"):
        build(SMALL.model_copy(update={"hidden_act": "gelou"}))
