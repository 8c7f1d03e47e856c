"""Processes that hold parts of the model (FSDP2) train as one does, and any run reads any checkpoint."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import ROUNDING, losses, numbers, reasons, run, small_config, start, wait, wait_for_step, weights

from commands import metatokens
from metatokens.config.schema import PretrainConfig
from metatokens.training.checkpoint import read_state
from metatokens.training.pretraining import pretrain
from metatokens.verification import verify_folder

STEPS = 12
FSDP2 = ("--training.parallel.kind", "fsdp2", "--training.micro_batch_blocks", "3")
Config = Callable[..., PretrainConfig]
pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    steps = ["--training.duration.steps", str(STEPS), "--evaluation.interval_steps", "6", "--checkpoint.keep", "9"]
    return lambda *overrides: small_config(preset, tokens, *steps, *overrides)


@pytest.fixture(scope="module")
def alone(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    pretrain(config("--training.micro_batch_blocks", "12"), out, show_progress=False)
    return out


@pytest.fixture(scope="module")
def sharded(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "run"
    assert run(config(*FSDP2), out, world_size=2) == [0, 0], out.with_name("run.error").read_text()
    return out


def assert_close(out: Path, reference: Path) -> None:
    assert numbers(out) == pytest.approx(numbers(reference), rel=ROUNDING)
    assert numbers(out, "validation_loss_hex") == pytest.approx(numbers(reference, "validation_loss_hex"), rel=ROUNDING)


def cut_off_after(reference: Path, step: int, out: Path) -> Path:
    shutil.copytree(reference, out)
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return out


def test_two_processes_with_parts_of_the_model_train_as_one_does(sharded: Path, alone: Path):
    assert_close(sharded, alone)
    names = {path.name for path in (sharded / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")}
    assert len(names) == 4
    assert not list(sharded.rglob("*.pt")) + list(sharded.rglob(".metadata"))
    assert (sharded / "model" / "model.safetensors").exists()


def test_parts_that_are_killed_go_on_with_the_same_bits(config: Config, sharded: Path, tmp_path: Path):
    out = tmp_path / "run"
    started = start(config(*FSDP2, "--checkpoint.background", "true"), out, world_size=2)
    wait_for_step(out, 6, started)
    for process in started:
        os.kill(process.pid, signal.SIGKILL)
    wait(started)
    assert run(config(*FSDP2, "--checkpoint.background", "true"), out, world_size=2) == [0, 0]
    assert losses(out) == losses(sharded)
    assert losses(out, "validation_loss_hex") == losses(sharded, "validation_loss_hex")
    assert weights(out) == weights(sharded)


def test_in_bfloat16_parts_train_as_copies_do(config: Config, tmp_path: Path):
    less = ["--training.precision", "bfloat16", "--training.gradient_checkpointing", "true"]
    less += ["--training.duration.steps", "6"]
    for kind in ("ddp", "fsdp2"):
        changed = config(*less, *FSDP2, "--training.parallel.kind", kind)
        assert run(changed, tmp_path / kind, world_size=2) == [0, 0]
    assert numbers(tmp_path / "fsdp2") == pytest.approx(numbers(tmp_path / "ddp"), rel=2**-8)  # one rounding


def test_a_checkpoint_of_parts_opens_and_exports_as_the_model_that_it_is(config: Config, sharded: Path, tmp_path: Path):
    checkpoint, out = sharded / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "exported"
    metatokens("export", checkpoint, "--out", out)
    assert (out / "model.safetensors").read_bytes() == weights(sharded)
    assert {path.name for path in out.iterdir()} == {path.name for path in (sharded / "model").iterdir()}
    for source in (checkpoint, out):
        pretrain(config("--start_from", str(source)), tmp_path / f"from {source.name}", show_progress=False)
    assert losses(tmp_path / f"from {checkpoint.name}") == losses(tmp_path / "from exported")
    assert (out / "config.json").read_text() == (sharded / "model" / "config.json").read_text()


def test_one_process_goes_on_from_the_parts_of_two(config: Config, sharded: Path, alone: Path, tmp_path: Path):
    out = cut_off_after(sharded, 8, tmp_path / "run")
    with pytest.warns(UserWarning, match="bit_exact=false reason=world_size 2->1"):
        pretrain(config("--training.micro_batch_blocks", "12"), out, show_progress=False)
    assert_close(out, alone)
    assert reasons(out) == ["world_size 2->1", "micro_batch_blocks 3->12", "parallel.kind fsdp2->ddp"]


def test_four_processes_with_parts_go_on_from_the_whole_of_one(config: Config, alone: Path, tmp_path: Path):
    out = cut_off_after(alone, 8, tmp_path / "run")
    assert run(config(*FSDP2), out, world_size=4) == [0] * 4
    assert_close(out, alone)
    assert reasons(out)[0] == "world_size 1->4"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_whose_numbers_blow_up_keep_their_state_together(config: Config, tmp_path: Path, kind: str):
    far = ["--optimizer.learning_rate", "1e30", "--optimizer.gradient_clip", "off", "--schedule.warmup_steps", "0"]
    wild = config(*FSDP2, *far, "--training.parallel.kind", kind, "--evaluation.interval_steps", "off")
    assert run(wild, tmp_path / "run", world_size=2) == [5, 5]
    found = verify_folder(tmp_path / "run")
    assert found.problems == ()
    state = read_state(tmp_path / "run" / "diagnostic")
    assert (state.step, state.consecutive_skips, state.world_size) == (5, 4, 2)
    assert len(list((tmp_path / "run" / "diagnostic").glob("*.safetensors"))) == (4 if kind == "fsdp2" else 2)
