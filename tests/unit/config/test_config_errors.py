"""Wrong settings: each is one line that names the key, what was found and, where there is one, the nearest name."""

import re
from pathlib import Path

import pytest

from metatokens.config.fields import FieldOfConfig, describe_fields, value_at
from metatokens.config.loading import load_preset
from metatokens.config.schema import PretrainConfig
from metatokens.errors import UsageError


def message(*overrides: str, preset: str = "tiny/meta") -> str:
    with pytest.raises(UsageError) as caught:
        load_preset(preset, overrides)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text
    assert "expected" in text
    assert "found" in text
    return text


def test_an_unknown_preset_comes_with_the_nearest_name():
    text = message(preset="tiny/mta")
    assert "'tiny/mta'" in text
    assert "did you mean 'tiny/meta'?" in text


def test_a_preset_file_that_is_missing_is_named():
    assert "'nowhere/own.yaml'" in message(preset="nowhere/own.yaml")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.learnin_rate", "optimizer.learning_rate"),
        ("optimizr.learning_rate", "optimizer"),
        ("schedule.warm_up_steps", "schedule.warmup_steps"),
        ("training.duration.token", "training.duration.tokens"),
        ("sed", "seed"),
    ],
)
def test_a_misspelt_key_comes_with_the_nearest_one(key: str, nearest: str):
    assert f"did you mean '{nearest}'?" in message(f"--{key}", "1")


def test_a_key_in_the_wrong_section_comes_with_the_right_one():
    assert "did you mean 'optimizer.learning_rate'?" in message("--model.learning_rate", "1")


def test_a_key_of_another_variant_says_so():
    text = message("--schedule.decay_steps", "5")
    assert "unknown key schedule.decay_steps" in text
    assert "it needs --schedule.kind wsd" in text


KEYS = [field for field in describe_fields(PretrainConfig) if not field.path.endswith((".", ".kind"))]


@pytest.mark.parametrize("field", KEYS, ids=lambda field: f"{field.path} {dict(field.kinds)}")
def test_a_hint_leads_to_a_key_that_is_accepted(field: FieldOfConfig):
    name = field.path.rpartition(".")[2]
    misspelt = field.path.removesuffix(name) + name[:-1] + "_" + name[-1]
    text = message(f"--{misspelt}", "1")
    key = re.search(r"did you mean '(.*?)'\?", text).group(1)
    needed = [word for path, kind in re.findall(r"It needs --(\S+) (\S+)", text) for word in (f"--{path}", kind)]
    # the mapping is wrong for every field, so that a key that is accepted gets another error
    assert "unknown key" not in message(*needed, f"--{key}", "{a: {b: c}}")


@pytest.mark.parametrize(
    ("short", "path", "value"),
    [
        ("--steps", "training.duration", {"kind": "steps", "steps": 32}),
        ("--tokens", "training.duration", {"kind": "text_tokens", "tokens": 32}),
        ("--lr", "optimizer.learning_rate", 32),
        ("--batch", "training.batch_blocks", 32),
    ],
)
def test_a_short_name_sets_the_field_that_it_stands_for(short: str, path: str, value: object):
    assert value_at(load_preset("tiny/meta", [short, "32"]).model_dump(), path) == value


def test_a_word_that_people_try_leads_to_a_short_name():
    assert "did you mean --steps?" in message("--max_steps", "5")


def test_a_short_name_in_a_file_comes_with_the_key_it_stands_for(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("lr: 0.1")
    assert "its key is optimizer.learning_rate" in message(preset=str(file))


def test_an_unknown_kind_comes_with_the_nearest_one():
    text = message("--schedule.kind", "wds")
    assert "schedule.kind" in text
    assert "did you mean 'wsd'?" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("injection.ratio", "1"),
        ("injection.ratio", "1.5"),
        ("injection.ratio", "-0.1"),
        ("injection.ratio", ".nan"),
        ("optimizer.learning_rate", ".inf"),
        ("optimizer.learning_rate", "0"),
        ("optimizer.betas", "[0.9, 1]"),
        ("training.batch_blocks", "many"),
        ("training.batch_blocks", "2.5"),
        ("training.precision", "float16"),
        ("model.hidden_size", "0"),
        ("model.position_encoding", "rotary"),
        ("checkpoint.keep", "0"),
        ("evaluation.blocks", "off"),
        ("seed", "-1"),
        ("logging.trackers", "[tensorboad]"),
    ],
)
def test_a_value_outside_its_range_names_its_key(key: str, value: str):
    assert f"tiny/meta: {key}: expected " in message(f"--{key}", value)


def test_a_value_that_is_missing_names_its_key():
    assert "model.rope_scaling.factor: expected a value, found nothing" in message("--model.rope_scaling.kind", "yarn")


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["--injection.ratio", "0.999"], ["no text", "injection.ratio", "data.block_size 256"]),
        (["--data.block_size", "512"], ["data.block_size 512", "model.max_position_embeddings 256"]),
        (["--training.micro_batch_blocks", "5"], ["training.batch_blocks 32", "training.micro_batch_blocks 5"]),
        (["--model.num_attention_heads", "5"], ["model.hidden_size 128", "model.num_attention_heads 5"]),
        (["--model.hidden_size", "12"], ["model.position_encoding rope", "even head size"]),
        (
            ["--model.position_encoding", "dape_alibi", "--model.attention", "{kind: sliding_window, window: 8}"],
            ["model.position_encoding dape_alibi", "model.attention full", "sliding_window"],
        ),
        (
            ["--model", "{position_encoding: transformer_xl, hidden_size: 9, num_attention_heads: 3}"],
            ["model.position_encoding transformer_xl", "even model.hidden_size"],
        ),
        (
            ["--model.position_encoding", "learned", "--model.rope_scaling", "{kind: linear, factor: 2}"],
            ["model.rope_scaling", "model.position_encoding rope"],
        ),
        (["--model.meta_attention_layers", "[0, 9]"], ["model.meta_attention_layers [9]", "4 layers"]),
        (["--model.position_range", "256"], ["model.position_range 256", "model.max_position_embeddings 256"]),
        (["--model", "{position_range: 512, position_encoding: none}"], ["model.position_range", "position_encoding"]),
        (
            ["--model", "{position_range: 512, rope_scaling: {kind: linear, factor: 2}}"],
            ["model.position_range", "model.rope_scaling none"],
        ),
        (["--model.position_layers", "[0, 9]"], ["model.position_layers [9]", "4 layers"]),
        (
            ["--model", "{position_layers: even, position_encoding: learned}"],
            ["model.position_layers", "model.position_encoding rope", "learned"],
        ),
        (["--injection", "{kind: explicit, positions: [3, 2]}"], ["injection.positions"]),
        (["--injection", "{kind: explicit, positions: [3, 256]}"], ["injection.positions", "256"]),
        (["--schedule.horizon_steps", "50"], ["schedule.horizon_steps 50", "schedule.warmup_steps 50"]),
        (["--schedule.kind", "wsd"], ["schedule.warmup_steps", "schedule.decay_steps", "training.duration"]),
    ],
)
def test_settings_that_do_not_agree_name_both_keys(overrides: list[str], keys: list[str]):
    text = message(*overrides)
    for key in keys:
        assert key in text


@pytest.mark.parametrize("overrides", [["seed", "1"], ["--seed"], ["-s", "1"], ["--"]])
def test_an_override_that_is_no_key_and_value_is_refused(overrides: list[str]):
    message(*overrides)


def test_dotted_key_in_a_file_is_shown_nested(tmp_path: Path) -> None:
    file = tmp_path / "dotted.yaml"
    file.write_text("extends: tiny/meta\nmodel.rope_scaling.factor: 4\n")
    with pytest.raises(UsageError) as error:
        load_preset(file)
    assert "a file nests keys: model: {rope_scaling: {factor: ...}}" in str(error.value)
