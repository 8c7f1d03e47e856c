"""Work that is asked to stop ends in time with exit code 75, wherever it is, and the same command goes on."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import fsspec
import pytest
import torch
from training_runs import losses, small_config, wait_until, weights

from commands import metatokens
from forked import start_command
from metatokens.config.loading import to_yaml
from metatokens.config.schema import PretrainConfig
from metatokens.errors import Preempted
from metatokens.training.checkpoint import find_checkpoint, read_state
from metatokens.training.pretraining import pretrain, train_on_tokens

STEPS = 12
Config = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    # an evaluation of this many single blocks takes long enough to be met by a signal
    steps = ["--training.duration.steps", str(STEPS), "--training.micro_batch_blocks", "1", "--evaluation.blocks", "99"]
    return lambda *overrides: small_config(preset, tokens, *steps, "--evaluation.interval_steps", "6", *overrides)


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config(), out, show_progress=False)
    return out


def assert_identical(out: Path, whole: Path) -> None:
    assert losses(out) == losses(whole)
    assert losses(out, "validation_loss_hex") == losses(whole, "validation_loss_hex")
    assert weights(out) == weights(whole)
    assert not (out / "preempted.json").exists()


def send_when(condition: Callable[[], bool]) -> threading.Thread:
    """Send this process SIGTERM as soon as the condition holds."""

    def watch() -> None:
        while not condition():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_signal_during_an_evaluation_cuts_it_short_and_a_resume_begins_with_it(
    config: Config, whole: Path, tmp_path: Path
):
    out = tmp_path / "run"
    sender = send_when(lambda: (out / "metrics.jsonl").exists() and '"step": 6,' in (out / "metrics.jsonl").read_text())
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 6"):
        pretrain(config(), out, show_progress=False)
    sender.join()
    checkpoint = find_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert read_state(checkpoint).evaluation_due
    assert losses(out, "validation_loss_hex") == {}
    assert json.loads((out / "preempted.json").read_text())["cause"] == "SIGTERM"
    pretrain(config(), out, show_progress=False)
    assert_identical(out, whole)


def test_a_request_before_the_first_step_ends_the_run_at_once_and_leaves_the_marker(
    config: Config, whole: Path, tmp_path: Path
):
    out = tmp_path / "run"
    with pytest.raises(Preempted, match="--stop-after"):
        pretrain(config(), out, show_progress=False, stop_after=1e-3)
    assert json.loads((out / "preempted.json").read_text())["cause"] == "--stop-after"
    assert not list((out / "checkpoints").iterdir())
    pretrain(config(), out, show_progress=False)
    assert_identical(out, whole)


def test_a_stop_that_meets_the_entry_of_a_no_grad_does_no_harm_to_the_next_run(
    config: Config, whole: Path, tmp_path: Path
):
    def make_job(*_: object) -> NoReturn:
        torch.set_grad_enabled(False)  # as `no_grad` does before a with statement knows of it
        raise Preempted("stopped")

    options = {"show_progress": False, "label": "", "stop_after": None, "resume": None, "allow_change": ()}
    with pytest.raises(Preempted):
        train_on_tokens(config(), tmp_path / "stopped", make_job, **options)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        pretrain(config(), tmp_path / "run", show_progress=False)
    assert_identical(tmp_path / "run", whole)


def test_a_run_ends_by_itself_after_the_time_that_it_was_given(config: Config, tmp_path: Path):
    (tmp_path / "long.yaml").write_text(to_yaml(config("--training.duration.steps", "100000")))
    out, command = tmp_path / "run", ("pretrain", tmp_path / "long.yaml", "--stop-after", "3s")
    done = metatokens(*command, "--out", out, code=75)
    assert f"stopped by --stop-after after step {max(losses(out))}; the same command continues" in done.stderr
    checkpoint = find_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert read_state(checkpoint).step == max(losses(out))


def test_a_run_on_a_new_machine_goes_on_from_the_newest_copy(config: Config, whole: Path, tmp_path: Path):
    copied = config("--checkpoint.copy_to", f"memory://{tmp_path}")
    pretrain(copied, tmp_path / "first", show_progress=False)
    files, root = fsspec.core.url_to_fs(f"memory://{tmp_path}")
    files.rm(f"{root}/step-{STEPS:08d}", recursive=True)
    pretrain(copied, tmp_path / "second", show_progress=False)
    assert set(losses(tmp_path / "second")) == set(range(9, STEPS + 1))
    assert losses(tmp_path / "second").items() <= losses(whole).items()
    assert weights(tmp_path / "second") == weights(whole)


@pytest.mark.parametrize("text", ["", "5", "h", "3m2h", "-1s"])
def test_a_time_that_is_none_is_refused(text: str):
    assert "such as 3h50m" in metatokens("pretrain", "tiny/meta", f"--stop-after={text}", code=2).stderr


def test_a_preparation_that_is_asked_to_stop_ends_with_75_and_goes_on(tmp_path: Path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"story {number} of words {number % 7} " * 2_000)
    arguments = [
        "prepare",
        str(tmp_path / "text"),
        "--vocab-size",
        "400",
        "--validation-fraction",
        "0.3",
        "--out",
        str(tmp_path / "tokens"),
    ]
    process = start_command(arguments, tmp_path / "errors")
    wait_until((tmp_path / ".tokens.partial").exists, [process])
    os.kill(process.pid, signal.SIGTERM)
    process.join(120)
    assert process.exitcode == 75
    assert "stopped by SIGTERM; the same command continues" in (tmp_path / "errors").read_text()
    assert not (tmp_path / "tokens").exists()
    metatokens(*arguments)
    assert (tmp_path / "tokens" / "manifest.json").exists()
