"""From a run's config to the model: the class, the seeded weights, and what a preset promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoConfig

from metatokens.baselines.building import build_config
from metatokens.baselines.landmark import LandmarkConfig, LandmarkForCausalLM
from metatokens.baselines.masks import BigBird, Longformer, SlidingWindow, SparseAttentionForCausalLM
from metatokens.baselines.recurrent import BlockRecurrence, BlockRecurrentForCausalLM
from metatokens.config.attention import (
    BigBirdAttention,
    BlockRecurrentAttention,
    LandmarkAttention,
    LongformerAttention,
    MemoryAttention,
    SlidingWindowAttention,
)
from metatokens.config.loading import load_preset, preset_names
from metatokens.config.schema import ModelConfig
from metatokens.data.injection import sample_meta_positions
from metatokens.evaluation.speed import describe_model
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import save_model
from metatokens.training.initialization import build_model
from metatokens.training.loading import open_model
from tiny_models import tiny_model

SMALL = ModelConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32, meta_attention_layers="none"
)


def build(**changes: object) -> MetaTokenForCausalLM:
    config = SMALL.model_copy(update=changes)
    return build_model(config, text_vocab_size=60, eos_token_id=0, seed=0)


@pytest.mark.parametrize(
    ("attention", "model_class"),
    [
        (MemoryAttention(window=8), MetaTokenForCausalLM),
        (SlidingWindowAttention(window=8), SparseAttentionForCausalLM),
        (LongformerAttention(window=8), SparseAttentionForCausalLM),
        (BigBirdAttention(block_size=4), SparseAttentionForCausalLM),
        (LandmarkAttention(every=7), LandmarkForCausalLM),
    ],
)
def test_an_attention_of_its_own_changes_the_class_and_no_weight(attention: object, model_class: type) -> None:
    plain, model = build(), build(attention=attention)
    assert type(model) is model_class
    assert model.training
    assert plain.state_dict().keys() == model.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_state_is_added_to_the_weights_of_the_plain_model() -> None:
    attention = BlockRecurrentAttention(window=8, num_state_vectors=4, recurrent_layer=1)
    plain, model = build().state_dict(), build(attention=attention)
    assert type(model) is BlockRecurrentForCausalLM
    added = {name for name in model.state_dict() if name not in plain}
    assert {name.split(".recurrence.")[0] for name in added} == {"model.layers.1.self_attn"}
    for name, tensor in plain.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_every_field_of_a_pattern_reaches_the_model() -> None:
    cases = (
        (SlidingWindowAttention(window=8, layers=(1,)), SlidingWindow(window=8, layers=[1])),
        (
            LongformerAttention(window=8, num_global_tokens=3, meta_tokens_are_global=True, layers="odd"),
            Longformer(window=8, num_global_tokens=3, meta_tokens_are_global=True, layers="odd"),
        ),
        (
            BigBirdAttention(block_size=4, window_blocks=2, num_global_blocks=1, num_random_blocks=5, seed=9),
            BigBird(block_size=4, window_blocks=2, num_global_blocks=1, num_random_blocks=5, seed=9),
        ),
        (
            BlockRecurrentAttention(window=8, num_state_vectors=3, recurrent_layer=1, gates="dual", layers=(1,)),
            BlockRecurrence(window=8, num_state_vectors=3, recurrent_layer=1, gates="dual", layers=[1]),
        ),
    )
    for attention, pattern in cases:
        assert build(attention=attention).config.pattern == pattern


def test_double_attention_starts_with_the_weights_of_its_meta_twin() -> None:
    meta = build(meta_attention_layers="all").state_dict()
    double = build(meta_attention_layers="all", meta_attention_over="all").state_dict()
    assert meta.keys() == double.keys()
    for name, tensor in meta.items():
        assert torch.equal(tensor, double[name]), name


def test_defaults_of_the_window_are_those_of_gpt_neo() -> None:
    assert SlidingWindowAttention().window == GPTNeoConfig().window_size == 256


def parameters(preset: str) -> int:
    config = build_config(load_preset(preset).model, text_vocab_size=4096, eos_token_id=0)
    return int(describe_model(config)["parameters"])


def test_the_parameter_matched_model_misses_by_what_its_preset_says_and_no_depth_misses_less() -> None:
    target, matched, plain = (parameters(f"tiny/{name}") for name in ("meta", "parameter-matched", "plain"))
    per_layer = matched - plain
    assert matched - target == -65_920
    assert matched + per_layer - target == 132_352
    text = (Path(__file__).parents[3] / "src/metatokens/presets/tiny/parameter-matched.yaml").read_text()
    assert "65,920 fewer" in text
    assert "132,352 more" in text
    assert abs(matched - target) == min(abs(plain + layers * per_layer - target) for layers in range(8))


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_memory_has_its_arms_at_every_scale_and_the_matched_one_the_fitting_depth(scale: str) -> None:
    memory, pause, matched, every = (
        load_preset(f"{scale}/memory{arm}") for arm in ("", "-pause", "-parameter-matched", "-every")
    )
    assert memory.model.attention == pause.model.attention == matched.model.attention
    assert memory.text_tokens_per_block == pause.text_tokens_per_block == every.text_tokens_per_block
    assert (memory.model.meta_attention_layers, pause.model.meta_attention_layers) == ("all", "none")
    assert every.injection.kind == "none"
    num_anchors = memory.injection.num_meta(memory.data.block_size)
    assert abs(every.text_tokens_per_block // every.model.attention.every - num_anchors) <= 1
    target, least = parameters(f"{scale}/memory"), parameters(f"{scale}/memory-pause")
    per_layer = (parameters(f"{scale}/memory-parameter-matched") - least) // (
        matched.model.num_hidden_layers - pause.model.num_hidden_layers
    )
    missed = abs(parameters(f"{scale}/memory-parameter-matched") - target)
    assert missed == min(abs(least + layers * per_layer - target) for layers in range(8))


def test_info_counts_the_bytes_of_a_cache_in_memory_mode() -> None:
    preset = load_preset("tiny/memory")
    config = build_config(preset.model, text_vocab_size=4096, eos_token_id=0)
    num_meta = preset.injection.num_meta(preset.data.block_size)
    description = describe_model(config, block_size=preset.data.block_size, num_meta=num_meta)
    column = 2 * 4 * 128 * 4  # key and value in four layers of width 128, float32
    assert description["cache_of_8192_positions_text_bytes"] == (64 + 4) * column
    assert description["cache_of_8192_positions_anchors_bytes"] == 26 * 32 * column
    assert description["cache_of_8192_positions_meta_attention_bytes"] == 26 * 32 * column
    assert not any(
        "cache_of" in name
        for name in describe_model(build_config(load_preset("tiny/meta").model, text_vocab_size=9, eos_token_id=0))
    )


def test_the_second_attention_of_each_control_has_the_parameters_of_the_meta_model() -> None:
    for scale, meta in (("tiny", "tiny/meta"), ("paper", "paper/meta-rope-152m")):
        for control in ("double-attention", "random-attention", "cross-attention"):
            assert parameters(f"{scale}/{control}") == parameters(meta)


def test_the_tiny_arms_read_the_same_text_in_every_block_and_take_as_many_steps() -> None:
    meta = load_preset("tiny/meta")
    for name in preset_names():
        if name.startswith("tiny/") and name != "tiny/extend" and "recall" not in name:
            arm = load_preset(name)
            assert arm.text_tokens_per_block == meta.text_tokens_per_block, name
            assert arm.total_steps == meta.total_steps, name


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_every_arm_has_a_preset_at_both_scales(scale: str) -> None:
    arms = "alibi bigbird double-attention fourier landmark landmark-dense longformer nope random-attention t5 xpos"
    arms += " block-recurrent cross-attention random-positions rnope sliding-window thoughts"
    arms += " kerple dape-alibi dape-kerple transformer-xl"
    assert {f"{scale}/{arm}" for arm in arms.split()} <= set(preset_names())


def test_landmarks_of_the_presets_end_blocks_of_the_length_they_name() -> None:
    for name in ("tiny/landmark", "tiny/landmark-dense"):
        preset = load_preset(name)
        assert isinstance(preset.model.attention, LandmarkAttention)
        every = preset.model.attention.every
        positions = sample_meta_positions(
            preset.injection, sample_ids=np.zeros(1, int), block_size=preset.data.block_size, seed=0, epoch=0
        )
        assert positions[0].tolist() == list(range(every, preset.data.block_size, every + 1))


def test_a_model_is_opened_in_its_own_class(tmp_path: Path) -> None:
    save_model(build(attention=LandmarkAttention(every=7)), tmp_path / "landmark")
    save_model(tiny_model(), tmp_path / "meta")
    landmark, meta = open_model(tmp_path / "landmark"), open_model(tmp_path / "meta")
    assert type(landmark) is LandmarkForCausalLM
    assert type(meta) is MetaTokenForCausalLM
    assert not landmark.training
    assert isinstance(landmark.config, LandmarkConfig)
    assert landmark.config.landmark_every == 7


def test_flops_of_double_attention_lie_between_those_of_meta_attention_and_of_a_deeper_model() -> None:
    def per_text_token(preset: str) -> float:
        config = load_preset(preset)
        hf = build_config(config.model, text_vocab_size=4096, eos_token_id=0)
        num_meta = config.injection.num_meta(config.data.block_size)
        description = describe_model(hf, block_size=config.data.block_size, num_meta=num_meta)
        return float(description["training_flops_per_text_token"])

    plain, random, double = (per_text_token(f"tiny/{arm}") for arm in ("plain", "random-attention", "double-attention"))
    assert plain < random < plain + 0.1 * (double - plain) < double
