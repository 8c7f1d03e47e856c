"""Several processes on the CPU train as one does, and go on to the bit after they were killed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import ROUNDING, losses, numbers, reasons, run, small_config, start, wait, wait_for_step, weights

from metatokens.config.loading import to_yaml
from metatokens.config.schema import PretrainConfig
from metatokens.training.pretraining import pretrain
from metatokens.training.run_folder import RunFolder

STEPS = 16
Config = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    steps = ["--training.duration.steps", str(STEPS), "--evaluation.interval_steps", str(STEPS)]
    return lambda *overrides: small_config(preset, tokens, *steps, *overrides)


@pytest.fixture(scope="module")
def alone(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a single process, without accumulation."""
    out = tmp_path_factory.mktemp("alone") / "run"
    pretrain(config("--training.micro_batch_blocks", "12"), out, show_progress=False)
    return out


def assert_close(out: Path, reference: Path) -> None:
    assert numbers(out) == pytest.approx(numbers(reference), rel=ROUNDING)
    assert numbers(out, "validation_loss_hex") == pytest.approx(numbers(reference, "validation_loss_hex"), rel=ROUNDING)


DRIVER = """
import hashlib, os, sys
import torch
from metatokens import MetaTokenForCausalLM, load_preset, pretrain
torch.set_num_threads(1)
models = set()
torch.nn.modules.module.register_module_forward_pre_hook(
    lambda module, inputs: models.add(module) if isinstance(module, MetaTokenForCausalLM) else None
)
pretrain(load_preset(sys.argv[1]), sys.argv[2], show_progress=False)
(model,) = models
state = model.state_dict()
digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()
open(f"{sys.argv[2]}.rank{os.environ['RANK']}", "w").write(digest)
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_under_torchrun_train_as_one_does_and_hold_equal_weights(
    config: Config, alone: Path, tmp_path: Path
):
    out = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(to_yaml(config("--training.micro_batch_blocks", "2")))
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "driver.py"), str(tmp_path / "config.yaml"), str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert_close(out, alone)
    digests = [out.with_name(f"run.rank{rank}").read_text() for rank in (0, 1)]
    assert digests[0] == digests[1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("world_size", "micro_batch_blocks"), [(2, 6), (3, 2)])
def test_processes_that_are_killed_go_on_with_the_same_bits(
    config: Config, alone: Path, tmp_path: Path, world_size: int, micro_batch_blocks: int
):
    changed = config("--training.micro_batch_blocks", str(micro_batch_blocks))
    assert run(changed, tmp_path / "whole", world_size=world_size) == [0] * world_size
    assert_close(tmp_path / "whole", alone)
    out = tmp_path / "run"
    started = start(changed, out, world_size=world_size)
    wait_for_step(out, 5, started)
    for process in started:
        os.kill(process.pid, signal.SIGKILL)
    wait(started)
    assert run(changed, out, world_size=world_size) == [0] * world_size
    assert losses(out) == losses(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")


def test_another_number_of_processes_continues_with_the_same_samples(config: Config, alone: Path, tmp_path: Path):
    out = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    assert run(config("--training.micro_batch_blocks", "6"), out, world_size=2) == [0, 0]
    assert_close(out, alone)
    assert reasons(out)[0] == "world_size 1->2"


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused_by_each(config: Config, tmp_path: Path):
    assert run(config(), tmp_path / "run", world_size=5) == [2] * 5
    assert "training.batch_blocks" in (tmp_path / "run.error").read_text()
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_main_process_alone_ends_every_process_with_it(config: Config, alone: Path, tmp_path: Path):
    changed = config("--training.micro_batch_blocks", "6", "--optimizer.learning_rate", "1e-3")
    assert run(changed, shutil.copytree(alone, tmp_path / "run"), world_size=2) == [2, 2]
    assert "optimizer.learning_rate: expected 0.002" in (tmp_path / "run.error").read_text()
    with RunFolder(tmp_path / "held").locked():
        assert run(config("--training.micro_batch_blocks", "6"), tmp_path / "held", world_size=2) == [2, 2]
    assert "another run uses this folder (process" in (tmp_path / "held.error").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_an_error_under_torchrun_is_one_line(config: Config, alone: Path, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(to_yaml(config("--optimizer.learning_rate", "1e-3")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "metatokens.cli", "pretrain", str(tmp_path / "config.yaml"), "--training.micro_batch_blocks", "6"]
    out = shutil.copytree(alone, tmp_path / "run")
    finished = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=300, check=False)
    assert finished.stderr.count("metatokens: ") == 1
    assert "optimizer.learning_rate: expected 0.002" in finished.stderr
    assert "gloo" not in finished.stderr.lower()
    assert "exitcode  : 2 " in finished.stderr


def test_a_stop_signal_to_one_process_stops_all_after_a_save(config: Config, tmp_path: Path):
    out = tmp_path / "run"
    started = start(
        config("--training.duration.steps", "100000", "--training.micro_batch_blocks", "6"), out, world_size=2
    )
    wait_for_step(out, 3, started)
    os.kill(started[1].pid, signal.SIGTERM)
    assert wait(started) == [75, 75]
    assert (out / "checkpoints" / f"step-{max(losses(out)):08d}").exists()
