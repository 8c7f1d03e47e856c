"""What others put into a model's folder stays data: it runs no code and changes no number unseen."""

import io
import json
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from commands import error_line
from metatokens.cli import main
from metatokens.config.loading import load_preset
from metatokens.config.schema import ModelConfig
from metatokens.data.tokenizer import build_hf_tokenizer, load_text_tokenizer
from metatokens.errors import CheckpointError, redact
from metatokens.generation.serving import serve
from metatokens.model.export import save_model
from metatokens.model.schedule import NoSchedule
from metatokens.report.console import show_table
from metatokens.training.checkpoint import write_manifest
from metatokens.training.initialization import build_model
from metatokens.training.loading import ModelFolder, open_model
from metatokens.training.run_folder import RunFolder

VERBS = (
    ("generate", "{model}", "one", "--max-text-tokens", "20"),
    ("info", "{model}"),
    ("perplexity", "{model}", "{text}"),
    ("analyze", "{model}", "--text", "{text}", "--dry-run", "--out", "{out}"),
    ("evaluate", "{model}", "--task.kind", "copying", "--dry-run"),
    ("extend", "{model}", "--factor", "2", "--no-training", "--out", "{out}"),
    ("pretrain", "tiny/meta", "--start_from", "{model}", "--data.path", "{tokens}", "--dry-run", "--out", "{out}"),
    ("finetune", "tiny/recall", "--start.kind", "checkpoint", "--start.path", "{model}", "--dry-run", "--out", "{out}"),
    ("prepare", "{text}", "--tokenizer", "{model}", "--out", "{out}"),
)
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")


@pytest.fixture(scope="module")
def saved(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders, of this package and of another, without a manifest."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = build_hf_tokenizer(load_text_tokenizer(str(tokens)))
    num_text = tokenizer.meta_token_id
    shape = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256)
    model = build_model(shape, text_vocab_size=num_text, eos_token_id=tokenizer.eos_token_id, seed=0)
    save_model(model, folder / "metatokens", tokenizer)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=num_text, n_embd=16, n_layer=1, n_head=2, n_positions=256))
    save_model(other, folder / "gpt2", tokenizer)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "metatokens", tmp_path / "model"))


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer every question of a command with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))


def with_code(folder: Path, model_type: str, marker: Path) -> Path:
    """Let every part of a folder ask for code that writes the marker."""
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    shutil.copy(folder / "evil.py", folder / "configuration.py")
    (folder / "custom_generate").mkdir(exist_ok=True)
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")
    entries = dict.fromkeys(AUTO_CLASSES, "evil.Evil")
    change_json(folder / "config.json", model_type=model_type, auto_map=entries)
    change_json(
        folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    )
    return folder


@pytest.mark.parametrize(
    ("model_type", "verb"),
    [*product(["metatokens_evil", "metatokens"], VERBS), ("gpt2", VERBS[1])],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
@pytest.mark.usefixtures("yes")
def test_no_verb_runs_the_code_of_a_folder(
    saved: Path, tokens: Path, tmp_path: Path, verb: Sequence[str], model_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved / ("gpt2" if model_type == "gpt2" else "metatokens")
    folder = with_code(Path(shutil.copytree(source, tmp_path / "model")), model_type, tmp_path / "marker")
    (tmp_path / "text.txt").write_text("one two three four. five six")
    places = {"model": folder, "tokens": tokens, "text": tmp_path / "text.txt", "out": tmp_path / "out"}
    code = main([word.format(**places) for word in verb])
    assert not (tmp_path / "marker").exists()
    shown = capsys.readouterr()
    assert "Do you wish to run" not in shown.out
    if model_type != "metatokens_evil" and verb[0] not in ("pretrain", "finetune"):  # which want longer texts
        assert code == 0, shown.err


@pytest.mark.usefixtures("yes")
def test_serving_runs_no_code_of_a_folder(model: Path, tmp_path: Path) -> None:
    folder = with_code(model, "metatokens_evil", tmp_path / "marker")
    with pytest.raises(ValueError, match="contains custom code"):
        serve(folder, NoSchedule(), host="localhost", port=8000, device="cpu", seed=0)
    assert not (tmp_path / "marker").exists()


def test_weights_in_a_pickle_are_not_opened(model: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "marker"), "w")

    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, model / "pytorch_model.bin")
    error_line("generate", model, "one", code=4)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_is_refused(model: Path, key: str) -> None:
    change_json(model / "config.json", **{key: "someone/kernel"})
    assert f"expected an {key} of transformers" in error_line("generate", model, "one", code=4)


def with_adapter(folder: Path) -> None:
    """Put a valid adapter for PEFT beside a model."""
    adapter = {"peft_type": "LORA", "r": 1, "lora_alpha": 100, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    weights = {"A.weight": torch.ones(1, 16), "B.weight": torch.ones(64, 1)}
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file({name + key: tensor for key, tensor in weights.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("has_manifest", [False, True])
def test_an_adapter_beside_a_model_is_refused(model: Path, has_manifest: bool) -> None:
    if has_manifest:
        write_manifest(model)
    with_adapter(model)
    assert "adapter_config.json: expected a model without an adapter" in error_line("generate", model, "one", code=4)


@pytest.mark.parametrize(
    "name", ["generation_config.4.0.0.json", "model-00002-of-00002.safetensors", "chat_template.jinja", "merges.txt"]
)
def test_what_a_manifest_does_not_list_does_not_act(model: Path, name: str) -> None:
    write_manifest(model)
    assert not open_model(model).training
    (model / "notes.txt").write_text("of its owner")
    assert not open_model(model).training
    (model / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name}: expected only files that manifest.json lists"):
        ModelFolder(model).check_path()


@pytest.mark.parametrize("name", ["lock", "config.yaml", "versions.json", "metrics.jsonl", "result.json"])
def test_a_run_changes_nothing_outside_its_folder_through_a_link(tokens: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    size = ("--model.hidden_size", "16", "--model.num_hidden_layers", "1", "--model.num_attention_heads", "2")
    budget = ("--steps", "1", "--batch", "2", "--training.micro_batch_blocks", "1", "--data.block_size", "64")
    budget += ("--schedule.warmup_steps", "0", "--evaluation.interval_steps", "off")
    words = ["pretrain", "tiny/meta", "--data.path", tokens, "--out", tmp_path / "run", *size, *budget]
    # the log and the lock are opened in place, which refuses a link; what it leads to is no config
    assert main([str(word) for word in words]) == (2 if name in {"lock", "metrics.jsonl", "config.yaml"} else 0)
    assert (tmp_path / "precious").read_text() == "content"


def test_an_event_is_not_noted_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    (tmp_path / "events.jsonl").symlink_to(tmp_path / "precious")
    with pytest.warns(UserWarning, match="events.jsonl is not written"):
        RunFolder(tmp_path).note(1, "continued")
    assert (tmp_path / "precious").read_text() == "content"


def test_prepared_shards_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four. " * 50)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "train-00000.ds").write_text("content")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    words = ["prepare", tmp_path / "text.txt", "--vocab-size", "260", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 2
    assert (tmp_path / "precious" / "train-00000.ds").read_text() == "content"


def test_a_model_is_not_saved_through_links(model: Path, tmp_path: Path) -> None:
    opened = open_model(model)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is a link"):
        save_model(opened, tmp_path / "snapshot")
    assert list((tmp_path / "snapshot").iterdir()) == [tmp_path / "snapshot" / "model.safetensors"]


ESCAPE = "\x1b]0;owned\x07\x9b31m\x7f"


def held_by(text: str) -> set[str]:
    """Return the control characters of a text except those that lay out lines."""
    return {character for character in text if unicodedata.category(character) == "Cc" and character not in "\t\n"}


def test_a_file_name_or_key_with_terminal_escapes_is_shown_with_pictures(tmp_path: Path) -> None:
    shown = error_line("generate", tmp_path / ESCAPE, "Once", code=4)
    assert "\u241b]0;owned\u2407" in shown
    assert held_by(shown) == set()
    (tmp_path / "preset.yaml").write_text(json.dumps({"model": {ESCAPE: 1}}))
    assert held_by(error_line("pretrain", tmp_path / "preset.yaml", "--out", tmp_path / "run", code=2)) == set()


def test_tables_hold_no_terminal_escape_and_take_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(f"[b]{ESCAPE}", {f"{ESCAPE}[/]": f":smile:{ESCAPE}"})
    shown = capsys.readouterr().out
    assert held_by(shown) == set()
    assert "[b]\u241b]0;" in shown
    assert "[/]" in shown
    assert ":smile:" in shown


def test_generated_text_commands_no_terminal_but_is_whole_in_a_pipe(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(model), f"one{ESCAPE}", "--max-text-tokens", "12", "--temperature", "0"]
    assert main(words) == 0
    assert ESCAPE in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "one\u241b]0;owned" in shown
    assert held_by(shown) == set()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 1_000_000}, "expected layers for the"),
        ({"hidden_size": 10**12}, "expected a hidden_size of at most"),
        ({"vocab_size": 2**30}, "expected a model for the"),
        ({"head_dim": 10**15}, "expected a head_dim of at most"),
    ],
)
@pytest.mark.parametrize("verb", VERBS[:3], ids=lambda verb: verb[0])
def test_a_config_out_of_all_proportion_is_refused_at_once(
    model: Path, tmp_path: Path, verb: Sequence[str], changes: dict[str, Any], named: str
) -> None:
    (tmp_path / "text.txt").write_text("one two three four")
    change_json(model / "config.json", **changes)
    line = error_line(*(word.format(model=model, text=tmp_path / "text.txt") for word in verb), code=4)
    assert f"config.json: {named}" in line


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("model.safetensors", (2**60).to_bytes(8, "little"), "a header of 1152921504606846976 bytes"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]", "another header"),
        ("config.json", b"[" * 100_000, "maximum recursion depth"),
        ("config.json", b" " * (17 << 20), "more than 16777216 bytes"),
    ],
)
def test_a_huge_or_deep_header_is_refused_in_one_line(model: Path, name: str, content: bytes, found: str) -> None:
    (model / name).write_bytes(content)
    line = error_line("generate", model, "one", code=4)
    assert name in line
    assert found in line


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "deeper/outside.safetensors", 3])
def test_an_index_of_weights_names_no_file_outside_its_folder(model: Path, name: object) -> None:
    shutil.move(model / "model.safetensors", model.parent / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "expected names of files in the same folder" in error_line("generate", model, "one", code=4)


SECRETS = ("https://me:pa55word@host/run", "s3://bucket/run?token=pa55word&x=1", "hf_pa55wordpa55wordpa55word")


@pytest.mark.parametrize("secret", SECRETS)
def test_no_error_and_no_config_of_a_run_holds_a_secret(tokens: Path, tmp_path: Path, secret: str) -> None:
    line = error_line("info", secret, code=2)
    assert "pa55word" not in line
    assert "REDACTED" in line
    config = load_preset("tiny/meta", ["--start_from", secret, "--data.path", str(tokens)])
    RunFolder(tmp_path).write_config(config)
    assert "pa55word" not in (tmp_path / "config.yaml").read_text()
    assert load_preset(tmp_path / "config.yaml").model == config.model


@pytest.mark.parametrize("text", ["meta_token: expected 3, found 4", "git@host:path", "a@b.c: key=3", "max_tokens=5"])
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert redact(text) == text
