"""A longer window for a trained model: its weights, its positions, its training, and what is refused."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_runs import losses, numbers, run, small_config, start, wait, wait_for_step, weights
from transformers import AutoModelForCausalLM

from dense_model import dense_logits, turn_at
from metatokens.cli import main
from metatokens.config.loading import load_preset
from metatokens.config.schema import PretrainConfig, UniformInjection
from metatokens.errors import DataError, UsageError
from metatokens.model import MetaTokenConfig
from metatokens.model.positions import RotaryTables
from metatokens.training.extension import plan_extension
from metatokens.training.loading import open_model
from metatokens.training.pretraining import pretrain
from tiny_models import assert_close

WINDOW, FACTOR = 64, 4  # of the small model of training_runs
STEPS = 12
TRAINING = [
    *("--training.duration.steps", str(STEPS), "--schedule.warmup_steps", "2", "--schedule.decay_steps", "10"),
    *("--optimizer.learning_rate", "1e-3", "--training.batch_blocks", "4", "--training.micro_batch_blocks", "2"),
    *("--evaluation.interval_steps", "6", "--evaluation.blocks", "2", "--checkpoint.interval_steps", "3"),
    *("--logging.interval_steps", "1", "--training.device", "cpu"),
]


@pytest.fixture(scope="module")
def base(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    overrides = ["--injection.ratio", "0.2", "--training.duration.steps", "10"]
    pretrain(small_config(folder / "small.yaml", tokens, *overrides), folder / "run", show_progress=False)
    return folder / "run"


def extension(
    base: Path, tokens: Path, *overrides: str, method: Any = "yarn", factor: float = FACTOR
) -> PretrainConfig:
    arguments = ["--data.path", str(tokens), *TRAINING, *overrides]
    return plan_extension(base, method=method, factor=factor, preset="tiny/extend", overrides=arguments)


@pytest.fixture(scope="module")
def extended(base: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extended") / "run"
    assert run(extension(base, tokens), out) == [0]
    return out


def extend(*arguments: str | Path, code: int = 0) -> None:
    assert main(["extend", *map(str, arguments)]) == code


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    capsys.readouterr()
    extend(*arguments, code=code)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


class IndependentYarn(nn.Module):
    """YaRN as section 3 of its paper tells it (Peng et al. 2023), frequency by frequency."""

    def __init__(self, head_dim: int, *, theta: float, trained: int, scale: float) -> None:
        super().__init__()
        self.temperature = 0.1 * math.log(scale) + 1

        def dimension_of(rotations: float) -> float:
            return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(dimension_of(32)), 0), min(math.ceil(dimension_of(1)), head_dim - 1)
        self.frequencies = []
        for pair in range(head_dim // 2):
            frequency = theta ** (-2 * pair / head_dim)
            kept = 1 - min(max((pair - low) / (high - low), 0), 1)
            self.frequencies.append(frequency * kept + frequency / scale * (1 - kept))

    def forward(self, hidden: Tensor, position_ids: Tensor) -> RotaryTables:
        angles = position_ids[..., None] * torch.tensor(self.frequencies, dtype=torch.float64)
        angles = torch.cat([angles, angles], dim=-1)
        return RotaryTables(
            (angles.cos() * self.temperature).to(hidden.dtype), (angles.sin() * self.temperature).to(hidden.dtype)
        )


def draw_ids(config: MetaTokenConfig, length: int) -> Tensor:
    """Return a row of text with meta-tokens in it."""
    ids = torch.randint(0, config.meta_token_id, (1, length), generator=torch.Generator().manual_seed(length))
    ids[:, ::5] = config.meta_token_id
    return ids


def test_the_extended_model_has_the_papers_scaling_and_four_times_the_window(extended: Path, base: Path):
    before, after = (json.loads((path / "model/config.json").read_text()) for path in (base, extended))
    assert after.pop("rope_parameters") == {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": WINDOW,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    assert (before.pop("max_position_embeddings"), after.pop("max_position_embeddings")) == (64, 256)
    before.pop("rope_parameters")
    assert after == before


def test_the_training_starts_from_the_weights_and_injects_as_the_pre_training_did(extended: Path, base: Path):
    config = load_preset(extended / "config.yaml")
    assert config.start_from == base
    assert config.injection == UniformInjection(ratio=0.2)
    assert config.data.block_size == WINDOW * FACTOR
    first = numbers(extended)[0]
    assert first < numbers(base)[0] - 0.5, "a new model would be back at the first loss of the pre-training"


@pytest.mark.parametrize("length", [20, 50, 64, 65, 200, 256])
def test_the_untrained_extension_equals_an_independent_yarn_with_the_same_weights(
    base: Path, tmp_path: Path, length: int
):
    extend(base, "--factor", FACTOR, "--out", tmp_path / "model", "--no-training", "--preset", "tiny/extend", "--json")
    ours, reference = open_model(tmp_path / "model"), open_model(base)
    reference.config.max_position_embeddings = WINDOW * FACTOR
    reference.model.rotary_emb = IndependentYarn(16, theta=10_000.0, trained=WINDOW, scale=FACTOR)
    ids = draw_ids(ours.config, length)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, reference(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["yarn", "linear", "dynamic"])
def test_every_method_accepts_the_new_window_and_no_more(base: Path, tmp_path: Path, method: str):
    out = tmp_path / "model"
    extend(base, "--method", method, "--factor", FACTOR, "--out", out, "--no-training", "--preset", "tiny/extend")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.max_sequence_length == 256
    assert model.generation_config.meta_schedule["kind"] == "uniform"
    assert "| window | 256 positions" in (out / "README.md").read_text()
    with torch.no_grad():
        assert model(draw_ids(model.config, 256)).logits.isfinite().all()
        with pytest.raises(ValueError, match="longer than the model's 256"):
            model(draw_ids(model.config, 257))


def test_a_model_with_xpos_reads_four_windows_by_blocks_and_one_as_before(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    short = ["--model.position_encoding", "xpos", "--training.duration.steps", "3", "--injection.ratio", "0.2"]
    pretrain(small_config(tmp_path / "small.yaml", tokens, *short), tmp_path / "run", show_progress=False)
    out, place = tmp_path / "model", ("--method", "blockwise", "--factor", FACTOR, "--preset", "tiny/extend")
    extend(tmp_path / "run", *place, "--out", out, "--no-training")
    before, after = (open_model(path).double() for path in (tmp_path / "run", out))
    ids = draw_ids(after.config, WINDOW * FACTOR)
    block = torch.arange(ids.shape[1]) // (WINDOW // 2)
    turn = turn_at(after, torch.arange(ids.shape[1])[None])
    with torch.no_grad():
        assert_close(after(ids[:, :WINDOW]).logits, before(ids[:, :WINDOW]).logits, 1e-5)  # another middle of float32
        special = {name: getattr(after.config, name) for name in ("meta_token_id", "pad_token_id")}
        sees = block[:, None] - block <= 1
        expected = dense_logits(after, ids, turn_of=lambda _: turn, sees=sees, **special)
        assert_close(after(ids).logits, expected, 1e-8)
    (tmp_path / "long.txt").write_text("one two three four five six seven. " * 80)
    capsys.readouterr()
    assert main(["perplexity", str(out), str(tmp_path / "long.txt"), "--window", "200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["window"] == 200


@pytest.mark.parametrize("method", ["linear", "dynamic"])
def test_the_other_methods_train_on_blocks_of_the_new_window(base: Path, tokens: Path, tmp_path: Path, method: str):
    config = extension(
        base, tokens, "--training.duration.steps", "3", "--schedule.decay_steps", "1", method=method, factor=2
    )
    result = pretrain(config, tmp_path / "run", show_progress=False)
    assert result.text_tokens + result.meta_tokens == 3 * 4 * 128


def test_an_extension_that_is_killed_ends_with_the_same_bits(base: Path, tokens: Path, extended: Path, tmp_path: Path):
    out, config = tmp_path / "run", extension(base, tokens)
    started = start(config, out)
    wait_for_step(out, 7, started)
    os.kill(started[0].pid, signal.SIGKILL)
    wait(started)
    assert not (out / "model").exists()
    assert run(config, out) == [0]
    assert losses(out) == losses(extended)
    assert weights(out) == weights(extended)


def test_two_processes_train_the_same_extension(base: Path, tokens: Path, extended: Path, tmp_path: Path):
    assert run(extension(base, tokens), tmp_path / "run", world_size=2) == [0, 0]
    assert numbers(tmp_path / "run") == pytest.approx(numbers(extended), rel=1e-4)


def test_an_extension_is_never_continued_from_other_weights(base: Path, tokens: Path, extended: Path, tmp_path: Path):
    moved = shutil.copytree(base, tmp_path / "moved")
    out = shutil.copytree(extended, tmp_path / "run")
    # the same weights elsewhere are the same run
    pretrain(extension(moved, tokens), out, show_progress=False)
    shutil.copytree(extended / "model", moved / "model", dirs_exist_ok=True)
    shutil.copy(base / "model" / "config.json", moved / "model" / "config.json")
    (moved / "model" / "manifest.json").unlink()
    with pytest.raises(DataError, match="the data and weights that the run began with") as caught:
        pretrain(extension(moved, tokens), out, show_progress=False)
    assert "\n" not in str(caught.value)


def test_an_extended_model_is_extended_further_from_its_run(extended: Path, tmp_path: Path):
    extend(extended, "--factor", 2, "--out", tmp_path / "model", "--no-training", "--preset", "tiny/extend")
    rope = json.loads((tmp_path / "model" / "config.json").read_text())["rope_parameters"]
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (8, WINDOW)


def test_the_injection_is_found_from_a_run_its_model_and_its_checkpoints(base: Path, tokens: Path, tmp_path: Path):
    checkpoint = next((base / "checkpoints").glob("step-*"))
    places = (base, base / "model", checkpoint)
    assert [extension(place, tokens).injection for place in places] == [UniformInjection(ratio=0.2)] * 3
    alone = shutil.copytree(base / "model", tmp_path / "alone")
    assert extension(alone, tokens).injection == load_preset("tiny/extend").injection == UniformInjection(ratio=0.1)


def test_a_dry_run_writes_nothing_and_tells_the_window(
    base: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    arguments = ("--preset", "tiny/extend", "--data.path", tokens, "--factor", 8, "--dry-run", "--json")
    extend(base, *arguments, "--out", tmp_path / "run")
    plan = json.loads(capsys.readouterr().out)
    assert (plan["window"], plan["block_size"], plan["meta_tokens_per_step"]) == (512, 512, 8 * 102)
    assert not (tmp_path / "run").exists()


# Bad input ---------------------------------------------------------------------------------------------------


def test_learned_positions_cannot_be_extended(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    short = ["--model.position_encoding", "learned", "--training.duration.steps", "6"]
    config = small_config(tmp_path / "small.yaml", tokens, *short)
    pretrain(config, tmp_path / "run", show_progress=False)
    line = error_line(capsys, tmp_path / "run", "--data.path", tokens, "--out", tmp_path / "out")
    assert "expected rope (by yarn, linear or dynamic) or xpos" in line
    grown = ["--start_from", str(tmp_path / "run"), "--model.max_position_embeddings", "128"]
    with pytest.raises(UsageError, match=r"the 64 learned positions of .*rope \(by yarn, linear or dynamic\)"):
        pretrain(small_config(tmp_path / "small.yaml", tokens, *short, *grown), tmp_path / "out", show_progress=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--model.hidden_size", "64"), r"model\.hidden_size: expected 32"),
        (("--model.num_hidden_layers", "3"), r"model\.num_hidden_layers: expected 2"),
        (("--model.rope_theta", "500"), r"model\.rope_theta: expected 10000\.0"),
        (("--model.num_attention_heads", "4"), r"model\.num_attention_heads: expected 2"),
        (("--model.attention.kind", "sliding_window"), r"model\.attention: expected that of .* a metatokens"),
        (("--model.meta_attention_layers", "none"), r"model\.meta_attention_layers: expected 'all'"),
    ],
)
def test_a_model_of_another_shape_does_not_start_from_the_weights(
    base: Path, tokens: Path, tmp_path: Path, change: tuple[str, str], named: str
):
    config = small_config(tmp_path / "small.yaml", tokens, "--start_from", str(base), *change)
    with pytest.raises(UsageError, match=named):
        pretrain(config, tmp_path / "run", show_progress=False)


def test_a_model_of_full_attention_is_trained_on_in_memory_mode(base: Path, tokens: Path, tmp_path: Path):
    steps = ("--training.duration.steps", "2", "--optimizer.learning_rate", "1e-9")
    start = ("--start_from", str(base), "--injection.ratio", "0.2", *steps)
    memory = ("--model.attention.kind", "memory", "--model.attention.window", "3")
    for name, change in (("full", ()), ("memory", memory)):
        pretrain(small_config(tmp_path / "small.yaml", tokens, *start, *change), tmp_path / name, show_progress=False)
    assert open_model(tmp_path / "memory").config.memory_policy.window == 3
    full, narrow = (numbers(tmp_path / name)[0] for name in ("full", "memory"))
    assert full != narrow
    assert narrow == pytest.approx(full, abs=1)  # the trained weights, not new ones


def test_a_factor_of_one_and_a_block_beyond_the_window_are_refused(
    base: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place = ("--data.path", tokens, "--out", tmp_path / "out", "--preset", "tiny/extend")
    assert "--factor: expected more than 1" in error_line(capsys, base, *place, "--factor", 1)
    assert "data.block_size 257" in error_line(capsys, base, *place, "--data.block_size", 257)
    assert "did you mean 'tiny/extend'?" in error_line(
        capsys, base, "--out", tmp_path / "out", "--preset", "tny/extend"
    )


def test_another_method_on_top_of_an_extension_is_refused(
    extended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = error_line(capsys, extended, "--method", "linear", "--out", tmp_path / "out")
    assert "expected yarn, which extended the model before" in line


def test_a_tokenizer_that_is_not_that_of_the_tokens_is_a_data_error(
    base: Path, other_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = (base, "--data.path", other_tokens, "--out", tmp_path / "out", "--preset", "tiny/extend")
    assert f"tokenizer of {other_tokens}" in error_line(capsys, *arguments, code=3)
    assert f"--tokenizer {base}" in error_line(capsys, *arguments, "--dry-run", code=3)


def test_damaged_weights_are_a_checkpoint_error(
    base: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = shutil.copytree(max((base / "checkpoints").glob("step-*")), tmp_path / "step-00000010")
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    arguments = (checkpoint, "--data.path", tokens, "--out", tmp_path / "out", "--preset", "tiny/extend")
    assert "model.safetensors: expected SHA-256" in error_line(capsys, *arguments, code=4)


def test_a_model_folder_that_is_there_already_is_not_written_over(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = (base, "--out", tmp_path / "model", "--no-training", "--preset", "tiny/extend")
    extend(*arguments)
    assert "expected a new folder" in error_line(capsys, *arguments)
