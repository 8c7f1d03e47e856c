"""What YAML makes of innocent text, and files that are no presets at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from metatokens.config.loading import load_preset
from metatokens.config.schema import PretrainConfig
from metatokens.errors import UsageError

Preset = Callable[[str], PretrainConfig]


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    def load(text: str) -> PretrainConfig:
        path = tmp_path / "own.yaml"
        path.write_text("extends: tiny/meta\n" + text)
        return load_preset(path)

    return load


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_preset(path)
    assert caught.value.exit_code == 2
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "'1e-3'"])
def test_a_learning_rate_is_read_in_any_notation(preset: Preset, text: str):
    assert preset(f"optimizer: {{learning_rate: {text}}}").optimizer.learning_rate == 0.001


@pytest.mark.parametrize("text", ["3e6", "3.0e+6", "3_000_000", "3000000"])
def test_a_number_of_tokens_is_read_in_any_notation(preset: Preset, text: str):
    assert preset(f"training: {{duration: {{tokens: {text}}}}}").total_steps == load_preset("tiny/meta").total_steps


@pytest.mark.parametrize("text", ["off", "null", "~", "no", "false"])
def test_off_turns_off_what_may_be_off(preset: Preset, text: str):
    config = preset(f"optimizer: {{gradient_clip: {text}}}\ncheckpoint: {{interval_steps: {text}}}")
    assert config.optimizer.gradient_clip is None
    assert config.checkpoint.interval_steps is None


def test_off_turns_off_a_flag(preset: Preset):
    assert preset("training: {deterministic: off}").training.deterministic is False


def test_a_leading_zero_does_not_make_a_number_octal(preset: Preset):
    assert preset("seed: 010").seed == 10
    assert load_preset("tiny/meta", ["--seed", "010"]).seed == 10


def test_a_number_with_a_colon_is_not_read_in_base_sixty(preset: Preset):
    with pytest.raises(UsageError, match=r"seed: expected a whole number.*'1:30'"):
        preset("seed: 1:30")


@pytest.mark.parametrize("text", ["1e-3", "off", "010"])
def test_traps_are_read_the_same_in_overrides(preset: Preset, text: str):
    assert load_preset("tiny/meta", ["--optimizer.gradient_clip", text]) == preset(
        f"optimizer: {{gradient_clip: {text}}}"
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("model: {hidden_size: 1, hidden_size: 2}\n", "duplicate key hidden_size"),
        ("model: &m {hidden_size: 64}\ndata: *m\n", "aliases"),
        ("<<: {seed: 1}\n", "merge"),
        ("seed: !!python/object/apply:os.system ['true']\n", "python/object/apply"),
        ("- seed\n", "a mapping"),
        ("{[1]: 2}\n", "unhashable"),
        ("seed: 2024-99-99\n", "month"),
        ("[" * 2_000, "recursion"),
        ("extends: [tiny/meta]\n", "extends"),
        ("extends: tiny/mete\n", "tiny/meta"),
    ],
)
def test_yaml_that_is_no_preset_is_one_line_with_its_cause(tmp_path: Path, text: str, word: str):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_preset(path)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_tags_run_nothing(tmp_path: Path):
    marker = tmp_path / "ran"
    path = tmp_path / "own.yaml"
    path.write_text(f"seed: !!python/object/apply:os.system ['touch {marker}']\n")
    refused(path, "python/object/apply")
    assert not marker.exists()


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    path = tmp_path / "own.yaml"
    path.write_text("\n".join(lines))
    refused(path, "aliases")


def test_a_preset_beyond_one_mebibyte_is_not_read(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text("seed: 1\n" + "#" * 2**20)
    with pytest.raises(UsageError, match=f"at most {2**20} bytes"):
        load_preset(path)


def test_a_preset_that_is_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_bytes(b"seed: \xff\n")
    refused(path, "utf-8")


def test_presets_that_extend_each_other_are_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(UsageError, match="no circle"):
        load_preset(tmp_path / "a.yaml")
