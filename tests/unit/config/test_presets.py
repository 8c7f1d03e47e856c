"""Presets: they load, extend each other, and a resolved config is one itself."""

import re
from pathlib import Path

import pytest
import yaml

from metatokens.config.extension import extend_model
from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.grafting import GraftRunConfig
from metatokens.config.loading import digest, load_preset, preset_names, to_yaml, verb_of
from metatokens.config.schema import (
    CosineSchedule,
    NoInjection,
    PeriodicInjection,
    PretrainConfig,
    UniformInjection,
    WsdSchedule,
)

SCHEMAS = {"finetune": FinetuneConfig, "graft": GraftRunConfig}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_package_has_the_presets_of_the_paper_and_tiny_twins():
    assert {
        "paper/gpt2-124m",
        "paper/gpt2-16-layers",
        "paper/meta-learned-152m",
        "paper/meta-rope-152m",
        "paper/pause-124m",
        "tiny/meta",
        "tiny/plain",
    } <= set(preset_names())


def test_every_preset_that_the_method_names_is_there():
    text = (Path(__file__).parents[3] / "docs" / "method.md").read_text()
    named = re.findall(r"`(tiny|small|paper|\*)/([a-z0-9-]+)`", text)
    assert len(named) > 30
    for scale, name in named:
        for one in ("tiny", "paper") if scale == "*" else (scale,):
            assert f"{one}/{name}" in preset_names(), f"{one}/{name}"


def test_a_resolved_preset_written_as_yaml_loads_to_an_equal_config(tmp_path: Path):
    for name in preset_names():
        schema = SCHEMAS.get(verb_of(name), PretrainConfig)
        config = load_preset(name, schema=schema)
        assert load_preset(write(tmp_path, "config.yaml", to_yaml(config)), schema=schema) == config, name


WINDOWS = {"tiny/recall-256": 256, "small/recall": 1024, "paper/recall-512": 1024, "paper/recall-gpt-neo": 2048}


def test_a_stage_leaves_room_for_meta_tokens_and_answers_in_the_window_that_its_file_names():
    names = [name for name in preset_names() if "recall" in name and name != "tiny/recall"]
    assert names
    for name in names:
        config = load_preset(name, schema=FinetuneConfig)
        # the window of runs/extended-4k is 4,096 positions
        window = WINDOWS.get(name) or 1024 * int(config.start.path.rpartition("extended-")[2].removesuffix("k"))
        longest = config.curriculum[-1].prompt_tokens[1]
        assert longest + 1 + 2 * config.task.questions < window, name


def test_the_rows_of_a_table_of_lengths_are_asked_the_same():
    for scale in ("paper", "small", "tiny"):
        configs = [load_preset(name, schema=FinetuneConfig) for name in preset_names() if f"{scale}/recall" in name]
        configs = [config for config in configs if config.test.extrapolate]
        assert len(configs) == 3
        assert len({(config.task, config.test, config.curriculum[-1].size, config.seed) for config in configs}) == 1


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
def test_an_extension_preset_is_four_times_its_model(scale: str):
    config = load_preset(f"{scale}/extend")
    window = load_preset({"tiny": "tiny/meta", "small": "small/meta", "paper": "paper/meta-rope-152m"}[scale]).model
    assert config.model == extend_model(window, "yarn", 4)
    assert config.data.block_size == config.model.max_position_embeddings


def test_a_config_with_every_variant_changed_survives_the_round_trip(tmp_path: Path):
    changes = f"""
extends: tiny/meta
model: {{rope_scaling: {{kind: yarn, factor: 4}}, meta_attention_layers: [0, 2]}}
data: {{path: {tmp_path}}}
injection: {{kind: explicit, positions: [1, 5]}}
optimizer: {{eps: 1e-9, gradient_clip: null, betas: [0.8, 0.9]}}
schedule: {{kind: wsd, warmup_steps: 1, decay_steps: 10}}
logging: {{trackers: [tensorboard]}}
"""
    config = load_preset(write(tmp_path, "own.yaml", changes))
    loaded = load_preset(write(tmp_path, "config.yaml", to_yaml(config)))
    assert loaded == config
    assert digest(loaded) == digest(config)


def test_the_digest_of_another_config_differs():
    assert digest(load_preset("tiny/meta")) != digest(load_preset("tiny/meta", ["--seed", "1"]))


def test_an_empty_preset_is_the_paper_s_defaults(tmp_path: Path):
    assert load_preset(write(tmp_path, "empty.yaml", "")) == PretrainConfig()


def test_a_preset_changes_only_what_it_names(tmp_path: Path):
    path = write(tmp_path, "own.yaml", "extends: tiny/meta\nmodel: {hidden_size: 64}\n")
    changed = yaml.safe_load(to_yaml(load_preset("tiny/meta")))
    changed["model"]["hidden_size"] = 64
    assert yaml.safe_load(to_yaml(load_preset(path))) == changed


def test_a_relative_extends_is_looked_up_beside_its_file(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder", "base.yaml", "extends: tiny/meta\nseed: 7\n")
    assert load_preset(write(tmp_path / "folder", "own.yaml", "extends: base.yaml\n")).seed == 7


def test_a_later_override_beats_an_earlier_one_and_the_preset():
    assert load_preset("tiny/meta", ["--seed", "1", "--seed=2"]).seed == 2


def test_an_override_may_be_spelt_with_dashes():
    assert (
        load_preset("tiny/meta", ["--training.precision", "bfloat16", "--model.hidden-size", "64"]).model.hidden_size
        == 64
    )


def test_a_changed_kind_starts_from_that_variant_s_defaults(tmp_path: Path):
    path = write(tmp_path, "own.yaml", "extends: tiny/meta\nschedule: {kind: wsd, warmup_steps: 1, decay_steps: 9}\n")
    assert load_preset(path).schedule == WsdSchedule(warmup_steps=1, decay_steps=9)


def test_the_same_kind_keeps_what_was_set_before():
    config = load_preset("tiny/meta", ["--schedule", "{kind: cosine, floor: 0.5}"])
    assert config.schedule == CosineSchedule(warmup_steps=50, floor=0.5)


def test_a_key_of_a_variant_counts_even_before_the_kind_that_has_it():
    config = load_preset(
        "tiny/meta", ["--schedule.decay_steps", "9", "--schedule.warmup_steps", "1", "--schedule.kind", "wsd"]
    )
    assert config.schedule == WsdSchedule(warmup_steps=1, decay_steps=9)


def test_an_override_beside_a_new_kind_belongs_to_the_new_kind():
    config = load_preset("tiny/meta", ["--injection.ratio", "0.2", "--injection.kind", "periodic"])
    assert config.injection == PeriodicInjection(ratio=0.2)
    assert load_preset("tiny/meta", ["--injection.kind", "none"]).injection == NoInjection()


def test_the_tiny_twins_read_the_same_text_in_every_block():
    meta, plain = load_preset("tiny/meta"), load_preset("tiny/plain")
    assert meta.text_tokens_per_block == plain.text_tokens_per_block == plain.data.block_size
    assert meta.total_steps == plain.total_steps
    assert isinstance(meta.injection, UniformInjection)


def test_the_tiny_twins_differ_in_meta_tokens_alone():
    meta, plain = load_preset("tiny/meta"), load_preset("tiny/plain")
    alike = plain.model_copy(update={"data": meta.data, "injection": meta.injection, "model": meta.model})
    assert alike == meta
    assert plain.model.model_copy(update={"meta_attention_layers": "all"}) == meta.model


def test_a_duration_in_text_tokens_is_rounded_up_to_whole_steps():
    config = load_preset("tiny/meta", ["--training.duration.tokens", str(230 * 32 * 5 + 1)])
    assert config.total_steps == 6
