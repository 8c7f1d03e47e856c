"""`MetaTokenConfig`: what it refuses, and that transformers reads it like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, StaticCache

from metatokens.config.schema import ModelConfig
from metatokens.model import MetaTokenConfig, MetaTokenForCausalLM
from metatokens.model.cache import MetaDynamicLayer, MetaStaticLayer
from tiny_models import META, tiny_config


def test_config_survives_the_base_class_that_knows_no_meta_attention(tmp_path: Path) -> None:
    # Trainer's resume loads the config so; a serialised layer type unknown to transformers would be refused
    config = tiny_config(meta_attention_layers=[1])
    config.save_pretrained(tmp_path)
    loaded = PreTrainedConfig.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert MetaTokenConfig.from_pretrained(tmp_path / "again").meta_attention_layers == [1]


@pytest.mark.parametrize("layers", ["all", "none", [1]])
def test_config_survives_save_and_load(layers: str | list[int], tmp_path: Path) -> None:
    config = tiny_config(meta_attention_layers=layers, loss_policy="retarget")
    config.save_pretrained(tmp_path)
    assert MetaTokenConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_layer_types_are_not_in_the_saved_config() -> None:
    assert "layer_types" not in tiny_config().to_dict()


def test_layer_types_name_the_blocks_with_meta_attention() -> None:
    assert tiny_config(num_hidden_layers=3, meta_attention_layers=[0, 2]).layer_types == [
        "meta_attention",
        "full_attention",
        "meta_attention",
    ]


def test_caches_of_transformers_have_a_meta_part_in_blocks_with_meta_attention() -> None:
    config = tiny_config(meta_attention_layers=[1])
    dynamic, static = DynamicCache(config=config), StaticCache(config=config, max_cache_len=8)
    assert [isinstance(layer, MetaDynamicLayer) for layer in dynamic.layers] == [False, True]
    assert [isinstance(layer, MetaStaticLayer) for layer in static.layers] == [False, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_policy": "both"}, ("loss_policy", "both", "skip", "retarget")),
        ({"position_encoding": "sinusoidal"}, ("position_encoding", "sinusoidal", "rope", "alibi")),
        ({"meta_attention_layers": "some"}, ("meta_attention_layers", "some", "all", "none")),
        ({"meta_attention_layers": [0, 2]}, ("meta_attention_layers", "[2]", "0..1")),
        ({"meta_attention_layers": [-1]}, ("meta_attention_layers", "[-1]", "0..1")),
        ({"position_layers": "odd"}, ("position_layers", "odd", "even")),
        ({"position_layers": [0, 2]}, ("position_layers", "[2]", "0..1")),
        ({"position_layers": "even", "position_encoding": "alibi"}, ("position_layers", "alibi", "rope", "xpos")),
        (
            {"position_layers": [1], "memory": {"anchors": "meta", "window": 4, "positions": "compact"}},
            ("compact", "position_layers"),
        ),
        ({"pad_token_id": META}, ("pad_token_id", "meta_token_id", str(META))),
        ({"memory": {"anchors": "meta", "window": 4, "layers": [0, 2]}}, ("memory.layers", "[2]", "0..1")),
        (
            {"memory": {"anchors": "meta", "window": 4}, "meta_token_id": None},
            ("memory.anchors", "meta_token_id", "every"),
        ),
        (
            {"memory": {"anchors": "meta", "window": 4, "positions": "compact"}, "position_encoding": "alibi"},
            ("compact", "rope"),
        ),
        ({"memory": {"anchors": "meta", "window": 4}, "position_encoding": "dape_alibi"}, ("memory", "dape_alibi")),
        (
            {
                "memory": {"anchors": "meta", "window": 4, "positions": "text", "layers": "odd"},
                "position_encoding": "alibi",
            },
            ("text", "alibi", "memory.layers"),
        ),
        ({"memory": {"anchors": "meta", "window": 4}, "meta_attention_over": "all"}, ("meta_attention_over", "all")),
        ({"memory": {"anchors": "meta", "window": 4}, "thought_length": 2}, ("thought_length", "memory")),
        ({"thought_length": 2, "meta_attention_over": "random"}, ("thought_length", "counts them")),
        ({"thought_length": 2, "meta_attention_layers": []}, ("thought_length", "counts them")),
        ({"thought_length": 0}, ("thought_length", "at least 1")),
        (
            {"memory": {"anchors": "meta", "window": 4}, "meta_attention_over": "gather"},
            ("meta_attention_over", "gather", "evicted"),
        ),
        (
            {"memory": {"anchors": "meta", "window": 4, "memory_limit": 2, "layers": "odd"}},
            ("memory_limit", "memory.layers", "all"),
        ),
    ],
)
def test_wrong_value_raises_an_error_that_names_it(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(StrictDataclassClassValidationError) as caught:
        tiny_config(**changes)
    assert isinstance(caught.value.__cause__, ValueError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({}, ("memory", "window")),
        ({"window": 0}, ("memory.window", "at least 1", "0")),
        ({"window": 2.5}, ("memory.window", "whole number", "2.5")),
        ({"window": 4, "sinks": 2}, ("sinks", "num_sinks")),
        ({"window": 4, "reveal": "never"}, ("memory.reveal", "never", "evicted", "always")),
    ],
)
def test_wrong_field_of_the_memory_is_named(memory: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="memory") as caught:
        tiny_config(memory=memory)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("encoding", ["xpos", "learned", "alibi", "none"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_rope_scaling_without_rope_is_refused(field: str, encoding: str) -> None:
    scaling = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    with pytest.raises(StrictDataclassClassValidationError, match=r'scaling .yarn. needs position_encoding "rope"'):
        tiny_config(position_encoding=encoding, **{field: scaling})


def test_wrong_type_raises() -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="num_hidden_layers"):
        tiny_config(num_hidden_layers="two")


def test_wrong_value_in_a_saved_config_raises_when_loaded(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss_policy": "both"}))
    with pytest.raises(StrictDataclassClassValidationError, match="loss_policy"):
        MetaTokenConfig.from_pretrained(tmp_path)


def test_default_rope_is_the_papers() -> None:
    assert MetaTokenConfig().rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize("encoding", ["learned", "alibi", "none"])
def test_config_without_rope_has_no_rope_parameters(encoding: str) -> None:
    assert not tiny_config(position_encoding=encoding).rope_parameters


def test_dynamic_scaling_stretches_the_longest_sequence_by_its_factor() -> None:
    rope = {"rope_theta": 10_000.0, "factor": 4.0}
    assert tiny_config(rope_parameters={**rope, "rope_type": "dynamic"}).max_sequence_length == 4 * 64
    assert tiny_config(rope_parameters={**rope, "rope_type": "linear"}).max_sequence_length == 64


def test_schema_and_config_have_the_same_fields_and_defaults() -> None:
    fields = ModelConfig().to_hf(text_vocab_size=50_257, eos_token_id=50_256)
    config = MetaTokenConfig()
    vocabulary = {"meta_token_id", "pad_token_id", "bos_token_id", "eos_token_id"}
    assert {name: getattr(config, name) for name in fields.keys() - vocabulary} == {
        name: value for name, value in fields.items() if name not in vocabulary
    }


def test_schema_puts_meta_token_and_padding_after_the_text_and_pads_the_vocabulary_to_64() -> None:
    fields = ModelConfig().to_hf(text_vocab_size=50_257, eos_token_id=50_256)
    assert (fields["meta_token_id"], fields["pad_token_id"], fields["vocab_size"]) == (50_257, 50_258, 50_304)
    assert ModelConfig().to_hf(text_vocab_size=63, eos_token_id=0)["vocab_size"] == 128


def test_tensor_parallel_plan_names_modules_of_the_model() -> None:
    config = tiny_config()
    modules = {name for name, _ in MetaTokenForCausalLM(config).model.named_modules()}
    for pattern in config.base_model_tp_plan:
        for layer in range(config.num_hidden_layers):
            assert pattern.replace("*", str(layer)) in modules


def test_fewer_key_value_heads_than_heads_are_refused_in_one_line() -> None:
    assert tiny_config(num_key_value_heads=4).num_key_value_heads == 4
    expected = "num_key_value_heads must equal num_attention_heads 4, not 2: grouped-query attention is not supported"
    with pytest.raises(ValueError, match=expected):
        tiny_config(num_key_value_heads=2)
    with pytest.raises(ValueError, match=expected):
        tiny_config().num_key_value_heads = 2
