"""One source per number: the schema, the Hugging Face config and the documentation agree."""

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError

from metatokens.baselines.building import build_config
from metatokens.config.attention import LandmarkAttention, MemoryAttention
from metatokens.config.fields import describe_fields
from metatokens.config.graft import GraftConfig
from metatokens.config.grafting import GraftFields
from metatokens.config.loading import load_preset, preset_names, to_yaml, verb_of
from metatokens.config.schema import (
    DynamicScaling,
    LinearScaling,
    ModelConfig,
    NoScaling,
    PretrainConfig,
    RopeScaling,
    YarnScaling,
)
from metatokens.model import MetaTokenConfig
from metatokens.model.memory import MemoryPolicy

TEXT_VOCAB_SIZE, EOS = 50_257, 50_256
FROM_THE_TOKENIZER = {"meta_token_id", "pad_token_id", "bos_token_id", "eos_token_id"}
CHANGED = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.2,
    "position_encoding": "alibi",
    "position_layers": (0, 2),
    "position_range": 4096,
    "rope_theta": 500.0,
    "rope_scaling": LinearScaling(factor=2),
    "attention": LandmarkAttention(every=10),
    "meta_attention_layers": (0, 2),
    "meta_attention_over": "cross",
    "random_ratio": 0.25,
    "thought_length": 3,
    "loss_policy": "retarget",
}
PRETRAINING = [name for name in preset_names() if verb_of(name) not in {"finetune", "graft"}]
RENAMED = {"rope_theta": "rope_parameters", "rope_scaling": "rope_parameters", "attention": "landmark_every"}


def hf_config(model: ModelConfig) -> MetaTokenConfig:
    return build_config(model, text_vocab_size=TEXT_VOCAB_SIZE, eos_token_id=EOS)


def read_back(model: ModelConfig, folder: Path) -> ModelConfig:
    """Return what the saved config of a model is read as."""
    config = hf_config(model)
    config.save_pretrained(folder)
    return ModelConfig.from_hf(type(config).from_pretrained(folder).to_dict())


def test_every_field_of_the_schema_is_tried_here():
    assert CHANGED.keys() == ModelConfig.model_fields.keys()


@pytest.mark.parametrize("field", CHANGED)
def test_every_field_of_the_schema_reaches_the_hugging_face_config(field: str):
    # the head size must stay even, and one head goes into every width
    changed = ModelConfig(**{"num_attention_heads": 1, field: CHANGED[field]})
    name = RENAMED.get(field, field)
    value = getattr(hf_config(changed), name)
    assert value != getattr(hf_config(ModelConfig(num_attention_heads=2)), name, None)
    if name == field:
        assert value == (list(CHANGED[field]) if isinstance(CHANGED[field], tuple) else CHANGED[field])


def test_every_field_of_memory_mode_reaches_the_hugging_face_config_and_comes_back(tmp_path: Path):
    memory = MemoryAttention(
        window=8, num_sinks=1, anchors="pooled", every=3, reveal="always", memory_limit=5, positions="text", layers=(1,)
    )
    model = ModelConfig(num_attention_heads=2, attention=memory, meta_attention_layers="none")
    policy = hf_config(model).memory_policy
    assert policy is not None
    fields = {field.name for field in dataclasses.fields(policy)}
    assert fields == set(MemoryAttention.model_fields) - {"kind"}
    default = MemoryPolicy(window=256)
    for field in fields:
        value = getattr(memory, field)
        assert getattr(policy, field) == (list(value) if isinstance(value, tuple) else value), field
        assert getattr(policy, field) != getattr(default, field), field
        assert getattr(MemoryAttention(), field) == getattr(default, field), field
    assert read_back(model, tmp_path) == model


def test_a_graft_has_the_same_fields_in_a_run_and_in_python():
    changed = {"window": 8, "num_sinks": 1, "anchors": "every", "every": 3, "reveal": "always", "memory_limit": 5}
    changed |= {"positions": "compact", "lora_rank": 2, "seed": 4}
    other = {"meta_attention": True}  # does not go with compact positions
    assert {*changed, *other} == GraftFields.model_fields.keys()
    assert GraftFields().build() == GraftConfig()
    for values in (changed, other):
        assert GraftFields(**values).build() == GraftConfig(**values)
    with pytest.raises(ValueError, match="meta_attention true needs positions"):
        GraftFields(**changed, **other)
    for field, value in {**changed, **other}.items():
        assert getattr(GraftConfig(), field) != value, field


@pytest.mark.parametrize(
    ("memory", "others", "named"),
    [
        ({"positions": "compact"}, {"position_encoding": "learned"}, r"positions compact needs .*rope"),
        ({}, {"position_range": 4096}, r"memory does not take model\.position_range"),
        ({"positions": "compact"}, {"position_layers": "even"}, r"compact needs model\.position_layers all"),
        ({"positions": "compact", "layers": "odd"}, {}, r"attention\.layers all"),
        ({"memory_limit": 4, "layers": "odd"}, {}, "memory_limit with meta-attention"),
        ({}, {"meta_attention_over": "all"}, r"meta_attention_over meta, not all"),
        ({}, {"meta_attention_over": "cross"}, r"meta_attention_over meta, not cross: the others are evicted"),
        ({"layers": [12]}, {}, r"\[12\] are beyond the 12 layers"),
        ({}, {"thought_length": 4}, "thought_length off: it counts what it keeps"),
    ],
)
def test_what_memory_mode_cannot_do_is_named(memory: dict[str, object], others: dict[str, object], named: str):
    with pytest.raises(ValidationError, match=named):
        ModelConfig.model_validate({"attention": {"kind": "memory", **memory}, **others})


def test_the_defaults_of_both_configs_agree():
    default, ours = MetaTokenConfig().to_dict(), hf_config(ModelConfig()).to_dict()
    assert {key for key in default if default[key] != ours[key]} == FROM_THE_TOKENIZER


def test_special_ids_lie_beyond_the_text_and_the_rows_are_padded():
    config = hf_config(ModelConfig())
    assert (config.meta_token_id, config.pad_token_id, config.eos_token_id) == (50_257, 50_258, 50_256)
    assert config.vocab_size == 50_304


def test_a_vocabulary_that_just_fits_is_not_padded_further():
    assert ModelConfig().to_hf(62, 0)["vocab_size"] == 64
    assert ModelConfig().to_hf(63, 0)["vocab_size"] == 128


def test_yarn_reaches_transformers_with_all_its_parameters():
    scaling = YarnScaling(
        factor=4, original_max_position_embeddings=64, beta_fast=16, beta_slow=2, attention_factor=1.5
    )
    assert hf_config(ModelConfig(rope_scaling=scaling)).rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.5,
    }


def test_the_model_of_every_preset_is_read_back_from_a_valid_hugging_face_config(tmp_path: Path):
    for name in PRETRAINING:
        model = load_preset(name).model
        hf_config(model).validate()
        assert read_back(model, tmp_path) == model, name


@pytest.mark.parametrize("field", CHANGED)
def test_every_field_is_read_back_from_a_saved_config(field: str, tmp_path: Path):
    model = ModelConfig(**{"num_attention_heads": 1, field: CHANGED[field]})
    assert read_back(model, tmp_path) == model


@pytest.mark.parametrize(
    "scaling",
    [
        NoScaling(),
        LinearScaling(factor=2),
        DynamicScaling(factor=2),
        YarnScaling(factor=4, original_max_position_embeddings=64),
        YarnScaling(factor=4, beta_fast=16, beta_slow=2, attention_factor=1.5),
    ],
)
def test_every_scaling_is_read_back_from_a_saved_config(scaling: RopeScaling, tmp_path: Path):
    model = ModelConfig(rope_scaling=scaling, rope_theta=500)
    assert read_back(model, tmp_path) == model


def test_a_scaling_that_is_not_offered_is_refused():
    fields = ModelConfig().to_hf(TEXT_VOCAB_SIZE, EOS)
    with pytest.raises(ValidationError, match="llama3"):
        ModelConfig.from_hf({**fields, "rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000.0}})


@pytest.mark.parametrize("scaling", [NoScaling(), DynamicScaling(factor=4), YarnScaling(factor=4)])
def test_both_configs_know_the_same_longest_sequence(scaling: RopeScaling):
    model = ModelConfig(rope_scaling=scaling, max_position_embeddings=100)
    assert model.max_sequence_length == hf_config(model).max_sequence_length


def test_every_key_is_described_with_documentation():
    described = {field.path: field.documentation for field in describe_fields(PretrainConfig)}
    keys = {path for path in described if not path.endswith((".", ".kind"))}
    assert [path for path in sorted(keys) if len(described[path]) < 8] == []


def test_every_key_of_a_resolved_config_is_described():
    described = {field.path for field in describe_fields(PretrainConfig)}
    resolved = load_preset("tiny/meta").model_dump()
    for section, fields in resolved.items():
        for key in fields if isinstance(fields, dict) else []:
            assert {f"{section}.{key}", f"{section}.{key}."} & described, key
        assert {section, f"{section}."} & described


def test_described_defaults_are_the_schema_s():
    defaults = {field.path: field.default for field in describe_fields(PretrainConfig)}
    assert defaults["optimizer.learning_rate"] == str(PretrainConfig().optimizer.learning_rate)
    assert defaults["training.duration.tokens"] == "required"


def test_a_resolved_config_names_every_key():
    text = to_yaml(load_preset("tiny/meta"))
    for field in ModelConfig.model_fields:
        assert f"  {field}:" in text
