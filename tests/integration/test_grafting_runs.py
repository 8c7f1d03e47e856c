"""Training of grafts: what is learned, what a run leaves, that a kill changes no bit, and what is refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROUNDING, losses, numbers, run, start, wait, wait_for_step
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, PreTrainedTokenizerFast

from commands import error_line, metatokens
from grafted_models import EIGHT_BILLION
from metatokens import load
from metatokens.config.analysis import Part
from metatokens.config.grafting import GraftRunConfig
from metatokens.config.loading import load_preset
from metatokens.data.tokenizer import load_text_tokenizer, text_vocab_size
from metatokens.errors import UsageError
from metatokens.graft import load_graft
from metatokens.training.grafting import plan
from metatokens.training.run_folder import RunFolder
from tiny_models import randomize

STEPS = 12
PRESET = f"""
graft: {{window: 12, num_sinks: 2, every: 3, lora_rank: 4}}
data: {{block_size: 64}}
reconstruct: {{share: 0.5, tokens: 8, distance: 12}}
sampled_positions: 16
objectives: {{language_model: 0.1}}
optimizer: {{learning_rate: 0.01, weight_decay: 0}}
schedule: {{warmup_steps: 2}}
training: {{duration: {{kind: steps, steps: {STEPS}}}, batch_blocks: 4, micro_batch_blocks: 2, device: cpu}}
evaluation: {{interval_steps: 6, blocks: 6}}
checkpoint: {{interval_steps: 3}}
logging: {{interval_steps: 1}}
"""
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SLIM = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
Config = Callable[..., GraftRunConfig]


def save_tokenizer(tokens: Path, folder: Path) -> None:
    tokenizer = load_text_tokenizer(str(tokens))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    vocab_size = text_vocab_size(load_text_tokenizer(str(tokens)))
    config = LlamaConfig(vocab_size=vocab_size, intermediate_size=48, max_position_embeddings=256, **SHAPE)
    randomize(LlamaForCausalLM(config)).save_pretrained(folder)
    save_tokenizer(tokens, folder)
    return folder


@pytest.fixture(scope="module")
def config(base: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "graft.yaml"
    preset.write_text(PRESET)
    given = ["--base", str(base), "--data.path", str(tokens)]
    return lambda *overrides: load_preset(preset, [*given, *overrides], schema=GraftRunConfig)


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(config("--checkpoint.keep", "100"), out) == [0]
    return out


def same_adapter(one: Path, other: Path) -> bool:
    first, second = (load_file(out / "model" / "graft.safetensors") for out in (one, other))
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_learns_in_the_new_parts_alone_and_leaves_an_adapter(whole: Path, base: Path) -> None:
    for name in ("validation_loss", "validation_distillation"):
        first, *_, last = losses(whole, name).values()
        assert last < first, name
    files = {file.name for file in (whole / "model").iterdir()}
    assert files >= {"graft.safetensors", "config.json", "tokenizer.json", "README.md", "manifest.json"}
    assert "model.safetensors" not in files
    tensors = load_file(whole / "model" / "graft.safetensors")
    assert tensors["row"].abs().max() > 0
    assert tensors["up.layers-0-mlp-down_proj"].abs().max() > 0
    result = RunFolder(whole).read_result()
    assert result["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert result["text_tokens"] == STEPS * 4 * 64
    assert result["meta_tokens"] == STEPS * 4 * (64 // 3)
    card = (whole / "model" / "README.md").read_text()
    assert "load_graft(path)" in card
    assert "After every 3. token" in card

    model = load_graft(whole / "model")
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    text = torch.randint(0, 200, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.equal(model(text).logits, plain(text).logits)


def test_a_run_that_is_killed_ends_with_the_same_bits(config: Config, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    started = start(config(), out)
    wait_for_step(out, 7, started)
    os.kill(started[0].pid, signal.SIGKILL)
    assert wait(started) == [-signal.SIGKILL]
    assert run(config(), out) == [0]
    assert losses(out) == losses(whole)
    assert losses(out, "validation_distillation") == losses(whole, "validation_distillation")
    assert same_adapter(out, whole)


def test_two_processes_train_as_one_does_and_go_on_from_its_checkpoint(
    config: Config, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    assert run(config("--training.gradient_checkpointing", "true"), out, world_size=2) == [0, 0]
    assert numbers(out) == pytest.approx(numbers(whole), rel=ROUNDING * 100)
    continued = tmp_path / "continued"
    shutil.copytree(whole, continued)
    shutil.rmtree(continued / "model")
    (continued / "result.json").unlink()
    shutil.rmtree(continued / "checkpoints" / f"step-{STEPS:08d}")
    assert run(config(), continued, world_size=2) == [0, 0]
    assert losses(continued)[STEPS - 3] == losses(whole)[STEPS - 3]
    assert numbers(continued) == pytest.approx(numbers(whole), rel=ROUNDING * 100)


def test_a_run_learns_the_answers_to_what_it_hides(config: Config, tmp_path: Path) -> None:
    needles = ("--needles", "{share: 0.5, tasks: [passkey, copying]}", "--objectives.distillation", "0")
    shape = ("--data.block_size", "256", "--evaluation.blocks", "4", "--objectives.language_model", "0")
    assert run(config(*needles, *shape, "--graft.meta_attention", "true"), tmp_path / "run") == [0]
    assert load_file(tmp_path / "run" / "model" / "graft.safetensors")["meta_attn.0.output"].abs().max() > 0
    first, *_, last = losses(tmp_path / "run", "validation_needles").values()
    assert last < first
    # the text of this measure has no needles
    assert losses(tmp_path / "run", "validation_loss").keys() == losses(tmp_path / "run", "validation_needles").keys()


def command(base: Path, tokens: Path, folder: Path, *arguments: str | Path) -> tuple[str | Path, ...]:
    (folder / "graft.yaml").write_text(PRESET)
    return ("graft", base, "--preset", folder / "graft.yaml", "--data.path", tokens, "--json", *arguments)


def test_the_command_says_what_it_would_do_and_trains_in_bfloat16(base: Path, tokens: Path, tmp_path: Path) -> None:
    given = command(base, tokens, tmp_path, "--out", tmp_path / "run")
    plan = json.loads(metatokens(*given, "--dry-run").stdout)
    assert plan["trained_parameters"] == 32 + 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert plan["anchors_per_step"] == 4 * 21
    assert plan["text_tokens_per_step"] == 4 * 64
    assert not (tmp_path / "run").exists()
    arguments = ("--base_dtype", "bfloat16", "--training.precision", "bfloat16", "--steps", "2")
    assert json.loads(metatokens(*given, *arguments).stdout)["steps"] == 2
    shown = metatokens(*(word for word in given if word != "--json"), *arguments).stderr
    assert f"next: metatokens generate {tmp_path / 'run'}" in shown
    # the digest does not depend on the type of the base
    assert load_graft(tmp_path / "run" / "model").dtype == torch.float32


def test_a_plan_warns_of_more_steps_than_the_text_is_good_for(config: Config, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="will know them by heart"):
        plan(config("--training.duration.steps", "1000000"), tmp_path / "run")


def test_a_run_is_planned_from_the_config_of_its_base_alone(tokens: Path, tmp_path: Path) -> None:
    LlamaConfig(**EIGHT_BILLION).save_pretrained(tmp_path / "base")
    save_tokenizer(tokens, tmp_path / "base")
    arguments = ("--preset", "graft/8b", "--data.path", tokens, "--data.block_size", "2048", "--batch", "2")
    arguments += ("--training.micro_batch_blocks", "1", "--evaluation.interval_steps", "off", "--tokens", "100000")
    done = metatokens("graft", tmp_path / "base", *arguments, "--out", tmp_path / "run", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert 8e9 < plan["parameters_of_the_base"] < 8.1e9
    assert plan["steps"] == -(-100_000 // (2 * 2048))


def test_bad_input_is_one_line(base: Path, tokens: Path, other_tokens: Path, tmp_path: Path) -> None:
    preset = tmp_path / "graft.yaml"
    out = ("--out", tmp_path / "run")
    refusals: dict[tuple[str, ...], tuple[str, int]] = {
        ("--graft.window", "60"): ("no token may see an anchor", 2),
        ("--training.parallel.kind", "fsdp2"): ("training.parallel.kind ddp", 2),
        ("--objectives.distillation", "0", "--objectives.language_model", "0"): ("nothing would be learned", 2),
        ("--objectives", "{distillation: 0, language_model: 0}", "--needles.tasks", "[copying]"): (
            "data.block_size 64",
            2,
        ),
        ("--needles.tasks", "[babilong-qa1]"): ("needles.tasks", 2),
        ("--sampled_positions", "64"): ("not less than data.block_size", 2),
        ("--data.block_size", "512"): ("at most the 256 positions", 2),
        ("--data.path", str(other_tokens)): (f"prepare the text with --tokenizer {base}", 3),
    }
    for arguments, (message, code) in refusals.items():
        assert message in error_line(*command(base, tokens, tmp_path, *out, *arguments), code=code)
    mistral = MistralConfig(sliding_window=8, num_hidden_layers=1, vocab_size=300, **SLIM)
    mistral.save_pretrained(tmp_path / "mistral")
    save_tokenizer(tokens, tmp_path / "mistral")
    given = command(tmp_path / "mistral", tokens, tmp_path, *out, "--dry-run")
    assert "layers that see less than the past" in error_line(*given, code=2)
    preset = tmp_path / "graft.yaml"
    assert "metatokens graft BASE --preset" in error_line("pretrain", preset, "--data.path", tokens, code=2)
    assert "one of `metatokens pretrain`" in error_line("graft", base, "--preset", "tiny/meta", code=2)
    assert "--dry-run" in error_line("info", "graft/8b", code=2)


def test_commands_of_the_package_read_a_grafted_folder(whole: Path, base: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a dog ran to the far hill, and nobody knew why it was so.\nthe cat sat on the mat. " * 4)
    exported = tmp_path / "exported"
    metatokens("export", whole, "--out", exported)
    assert (exported / "model.safetensors").is_file()
    perplexities = []
    for folder in (whole, whole / "checkpoints" / f"step-{STEPS:08d}", exported, base):
        done = metatokens("perplexity", folder, text, "--window", "90", "--json")
        perplexities.append(json.loads(done.stdout)["sliding"]["nats"])
    assert perplexities[0] == perplexities[1] == perplexities[2] != perplexities[3]
    written = json.loads(metatokens("generate", whole, "the cat", "--max-text-tokens", "9", "--json").stdout)
    assert written["text_tokens"] == 9
    described = json.loads(metatokens("info", whole, "--json").stdout)
    assert described["parameters"] > described["parameters_of_graft"] > described["parameters_of_meta_attention"] == 0
    # two layers, keys and values, two heads of eight float32 numbers
    assert described["cache_of_1024_positions_anchors_bytes"] == (1024 // 3) * 2 * 2 * 2 * 8 * 4
    opened = load(whole)
    assert opened.generate("the cat", max_text_tokens=9, temperature=0).meta_tokens == 0
    with pytest.raises(UsageError, match="save_graft"):
        opened.save(tmp_path / "saved")
    long = ("--suite", "long-context", "--lengths", "[200]", "--tasks", "[copying]", "--instances", "8")
    metatokens("evaluate", whole, *long, "--json")
    assert "the policy full alone" in error_line("evaluate", whole, *long, "--policies", "[full, sinks]", code=2)
    for command in (
        ("evaluate", whole, "--task.kind", "parity"),
        ("finetune", "tiny/recall", "--start.kind", "checkpoint", "--start.path", whole, "--out", tmp_path / "tuned"),
        ("serve", whole),
    ):
        assert "found a graft" in error_line(*command, code=2), command
    metatokens("compress", whole, text, "--out", tmp_path / "text.safetensors")
    going_on = ("--memory", tmp_path / "text.safetensors", "--max-text-tokens", "9", "--json")
    assert json.loads(metatokens("generate", whole, " the cat", *going_on).stdout)["text_tokens"] == 9
    assert metatokens("verify", whole).stdout
    with (exported / "graft_opening.py").open("a") as code:
        code.write("# changed\n")
    assert "graft_opening.py: expected" in error_line("perplexity", exported, text, "--window", "90", code=4)


def test_a_graft_is_analysed_on_plain_text_and_has_a_page(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    words = ["a", "dog", "ran", "to", "the", "far", "hill,", "and", "nobody", "knew", "why", "it", "was", "so"]
    for number in range(8):
        text = " ".join(words[(number + 3 * place + place // 7) % len(words)] for place in range(400))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    command = ("analyze", whole, "--text", tmp_path / "texts", "--documents", "8", "--out", tmp_path / "out")
    found = json.loads(metatokens(*command, "--subject.window", "60", "--json").stdout)
    values = {
        (one["measure"], one["at"].get("intervention")): one["value"] for one in found["records"] if len(one["at"]) == 1
    }
    perplexities = [values["text_perplexity", name] for name in ("none", "path cut", "switched off")]
    assert len(set(perplexities)) == 3
    assert {one["measure"] for one in found["records"]} == {
        *("text_perplexity", "anchor_gain", "readout_loss", "anchor_attention")
    }
    assert found["verdicts"] == []
    assert found["checkpoint"]["every"] == 3
    assert {line.split(":")[0] for line in found["not_run"]} == {*get_args(Part)} - {"graft"}
    metatokens("report", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What the anchors do" in page
    assert "the loss of text (saved:" in page or "Cannot tell whether text gains" in page
    assert 'id="figure-readout-loss"' in page
    assert "sharpening theorem" not in page
    assert "expected --text" in error_line("analyze", whole, "--out", tmp_path / "other", code=2)
    assert "at most 256" in error_line(*command, "--subject.window", "300", code=2)
