"""A run that is killed, stopped or damaged ends with the bits of one that was left alone."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from training_runs import STEPS, losses, run, small_config, start, wait, wait_for_step, wait_until, weights

from metatokens.config.schema import OptimizerConfig, PretrainConfig
from metatokens.data.shards import TokenDataset
from metatokens.errors import CheckpointError, DataError, ResourceError, UsageError
from metatokens.training.checkpoint import find_checkpoint, read_state
from metatokens.training.pretraining import pretrain
from metatokens.training.run_folder import RunFolder

Config = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    return lambda *overrides: small_config(preset, tokens, *overrides)


@pytest.fixture(scope="module")
def uninterrupted(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run(config("--checkpoint.keep", "100"), out) == [0]
    return out


def assert_identical(out: Path, reference: Path) -> None:
    assert losses(out) == losses(reference)
    assert losses(out, "validation_loss_hex") == losses(reference, "validation_loss_hex")
    assert weights(out) == weights(reference)


def cut_off_after(reference: Path, step: int, out: Path) -> Path:
    """Make the folder of a run that was killed some time after its checkpoint of this step."""
    shutil.copytree(reference, out)
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return out


def test_a_run_that_is_killed_at_random_steps_ends_with_the_same_bits(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out, draw = tmp_path / "run", random.Random(5)
    done = 0
    for _ in range(3):
        done = draw.randint(done + 1, done + 8)
        started = start(config(), out)
        wait_for_step(out, done, started)
        os.kill(started[0].pid, signal.SIGKILL)
        assert wait(started) == [-signal.SIGKILL]
        done = max(losses(out))
    assert not (out / "model").exists()
    assert run(config(), out) == [0]
    assert_identical(out, uninterrupted)


def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bits(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out = tmp_path / "run"
    started = start(config("--checkpoint.interval_steps", "1"), out)
    wait_until(lambda: any((out / "checkpoints").glob(".step-*3.tmp-*")), started)
    os.kill(started[0].pid, signal.SIGKILL)
    wait(started)
    assert run(config(), out) == [0]
    assert not list(out.glob("**/.*.tmp-*"))
    assert_identical(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_ends_with_75_and_goes_on_with_the_same_bits(
    config: Config, uninterrupted: Path, tmp_path: Path, number: int
):
    out = tmp_path / "run"
    started = start(config("--checkpoint.interval_steps", "off"), out)
    wait_for_step(out, 6, started)
    os.kill(started[0].pid, number)
    assert wait(started) == [75]
    stopped_after = max(losses(out))
    assert f"after step {stopped_after}" in out.with_name("run.error").read_text()
    checkpoint = find_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert read_state(checkpoint).step == stopped_after < STEPS
    assert run(config(), out) == [0]
    assert_identical(out, uninterrupted)


def test_resuming_a_finished_run_does_nothing_and_ends_well(config: Config, uninterrupted: Path, tmp_path: Path):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and "checkpoints" in path.parts}
    result = pretrain(config(), out, show_progress=False)
    measured = RunFolder(uninterrupted).read_result()
    assert asdict(result) == {**measured, "run": str(out), "model": str(out / "model")}
    assert all(path.read_bytes() == content for path, content in before.items())
    assert_identical(out, uninterrupted)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out = cut_off_after(uninterrupted, 0, tmp_path / "run")
    log = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    # it had logged the step after which it would have saved, and lost power within the next line
    (out / "metrics.jsonl").write_text("".join([*log[:4], log[4][:10], "\n"]))
    (out / "result.json").unlink()
    pretrain(config(), out, show_progress=False)
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text().replace(log[4][:10] + "\n", ""))
    assert_identical(out, uninterrupted)


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(config: Config, uninterrupted: Path, tmp_path: Path):
    out = cut_off_after(uninterrupted, 0, tmp_path / "run")
    (out / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected the checkpoints of a run that has logged step 40 and saves"):
        pretrain(config("--checkpoint.interval_steps", "off"), out, show_progress=False)
    assert not list((out / "checkpoints").iterdir())


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    result = pretrain(config(), out, show_progress=False)
    assert asdict(result) == {
        **RunFolder(uninterrupted).read_result(),
        "run": str(out),
        "model": str(out / "model"),
    }
    assert not list((out / "checkpoints").iterdir())


def test_a_run_that_dies_between_its_last_checkpoint_and_its_result_loses_no_figure(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out = cut_off_after(uninterrupted, STEPS, tmp_path / "run")
    (out / "result.json").unlink()
    pretrain(config(), out, show_progress=False)
    found, expected = (RunFolder(path).read_result() for path in (out, uninterrupted))
    assert found == {**expected, "run": str(out), "model": str(out / "model")}
    assert expected["validation"].keys() == {"validation_loss"}
    assert expected["text_tokens_per_second"] > 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_or_the_warning_of_a_scheduler_ends_a_run_with_a_checkpoint(
    config: Config, uninterrupted: Path, tmp_path: Path, number: signal.Signals
):
    started = start(config(), tmp_path / "run")
    wait_for_step(tmp_path / "run", 6, started)
    os.kill(started[0].pid, number)
    assert wait(started) == [75]
    assert run(config(), tmp_path / "run") == [0]
    assert_identical(tmp_path / "run", uninterrupted)


def test_a_run_goes_on_from_the_previous_checkpoint_if_the_newest_is_damaged(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out = cut_off_after(uninterrupted, 24, tmp_path / "run")
    os.truncate(out / "checkpoints" / "step-00000024" / "optimizer.safetensors", 1000)
    with pytest.warns(UserWarning, match=r"passed over: .*step-00000024/optimizer\.safetensors"):
        pretrain(config("--checkpoint.keep", "1"), out, show_progress=False)
    assert_identical(out, uninterrupted)
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out = cut_off_after(uninterrupted, 4, tmp_path / "run")
    os.truncate(out / "checkpoints" / "step-00000004" / "model.safetensors", 1000)
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError, match="step-00000004"):
        pretrain(config(), out, show_progress=False)


def test_a_resume_at_the_very_end_of_an_epoch_ends_with_the_same_bits(tokens: Path, config: Config, tmp_path: Path):
    with TokenDataset.open(tokens) as dataset:
        num_blocks = (dataset.num_tokens("train") - 1) // config().text_tokens_per_block
    overrides = ["--training.batch_blocks", str(num_blocks), "--training.micro_batch_blocks", str(num_blocks)]
    overrides += ["--training.duration.steps", "3", "--checkpoint.interval_steps", "1", "--checkpoint.keep", "3"]
    pretrain(config(*overrides), tmp_path / "whole", show_progress=False)
    out = cut_off_after(tmp_path / "whole", 1, tmp_path / "run")
    pretrain(config(*overrides), out, show_progress=False)
    assert_identical(out, tmp_path / "whole")


@pytest.mark.parametrize(
    "overrides",
    [["--model.hidden_dropout", "0.2", "--model.attention_dropout", "0.2"], ["--model.position_range", "200"]],
)
def test_a_run_that_draws_in_its_steps_goes_on_with_the_same_bits(config: Config, tmp_path: Path, overrides: list[str]):
    overrides = [*overrides, "--training.duration.steps", "6", "--checkpoint.interval_steps", "2"]
    overrides += ["--checkpoint.keep", "9"]
    pretrain(config(*overrides), tmp_path / "whole", show_progress=False)
    out = cut_off_after(tmp_path / "whole", 4, tmp_path / "run")
    pretrain(config(*overrides), out, show_progress=False)
    assert_identical(out, tmp_path / "whole")


def test_a_resume_with_a_changed_key_is_refused(config: Config, uninterrupted: Path):
    with pytest.raises(UsageError, match=r"optimizer\.learning_rate: expected 0\.002"):
        pretrain(config("--optimizer.learning_rate", "1e-3"), uninterrupted, show_progress=False)


def test_a_checkpoint_of_another_config_in_a_new_run_folder_is_refused(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted / "checkpoints" / "step-00000004", out / "checkpoints" / "step-00000004")
    with pytest.raises(
        CheckpointError,
        match=r"step-00000004: expected a checkpoint of this config, optimizer\.learning_rate 0\.001, found 0\.002",
    ) as caught:
        pretrain(config("--optimizer.learning_rate", "1e-3"), out, show_progress=False)
    assert caught.value.exit_code == 4
    pretrain(config("--training.micro_batch_blocks", "4", "--evaluation.blocks", "6"), out, show_progress=False)
    assert weights(out) == weights(uninterrupted)


def checkpoint_alone(reference: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Make a folder with nothing but the checkpoint of step 4, its state changed, as of an older version."""
    checkpoint = out / "checkpoints" / "step-00000004"
    shutil.copytree(reference / "checkpoints" / checkpoint.name, checkpoint)
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "manifest.json"))
    change(state)
    content = json.dumps(state).encode()
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "state.json").write_bytes(content)
    del manifest["sha256"]  # the seal
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_a_checkpoint_from_before_a_key_was_there_goes_on_with_its_default(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    def forget(state: dict[str, Any]) -> None:
        assert state["config"]["model"].pop("random_ratio") == 0.1
        del state["config"]["optimizer"]["eps"]
        del state["config"]["schedule"]["horizon_steps"]

    other = config("--model.meta_attention_over", "random", "--model.random_ratio", "0.2")
    out = checkpoint_alone(uninterrupted, tmp_path / "run", forget)
    with pytest.raises(CheckpointError, match=r"model\.(meta_attention_over|random_ratio)"):
        pretrain(other, out, show_progress=False)
    with pytest.raises(CheckpointError, match=r"of this config, optimizer\.eps 1e-06, found 1e-08"):
        pretrain(config("--optimizer.eps", "1e-6"), out, show_progress=False)
    pretrain(config(), out, show_progress=False)
    assert weights(out) == weights(uninterrupted)
    last = find_checkpoint(out / "checkpoints")
    assert last is not None
    assert read_state(last).config == config().model_dump(mode="json")


def test_a_checkpoint_from_before_a_default_was_changed_is_refused_by_name(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    def had_another_default(state: dict[str, Any]) -> None:
        assert config().optimizer.eps == OptimizerConfig().eps
        state["config"]["optimizer"]["eps"] = 1e-6

    out = checkpoint_alone(uninterrupted, tmp_path / "run", had_another_default)
    with pytest.raises(CheckpointError, match=r"of this config, optimizer\.eps 1e-08, found 1e-06"):
        pretrain(config(), out, show_progress=False)
    pretrain(config("--optimizer.eps", "1e-6"), out, show_progress=False)


def test_a_checkpoint_with_a_key_that_is_no_more_is_refused_by_name(
    config: Config, uninterrupted: Path, tmp_path: Path
):
    out = checkpoint_alone(uninterrupted, tmp_path / "run", lambda state: state["config"]["model"].update(swirl=2))
    with pytest.raises(UsageError, match=r"step-00000004: unknown key model\.swirl"):
        pretrain(config(), out, show_progress=False)


@pytest.mark.parametrize("older", [{}, {"run_sha256": "0" * 64}])
def test_a_checkpoint_from_before_configs_were_kept_is_refused(
    config: Config, uninterrupted: Path, tmp_path: Path, older: dict[str, str]
):
    def forget(state: dict[str, Any]) -> None:
        del state["config"], state["run_sha256"]
        state.update(older)

    out = checkpoint_alone(uninterrupted, tmp_path / "run", forget)
    with pytest.raises(CheckpointError, match="made by an older version, which kept no config"):
        pretrain(config(), out, show_progress=False)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [('"steps"', '"stepz"', "steps: "), (": 40,", ': "40",', "steps: Input should be a valid integer")],
)
def test_a_result_with_another_key_or_type_is_refused(
    config: Config, uninterrupted: Path, tmp_path: Path, old: str, new: str, reason: str
):
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    document = json.loads((out / "result.json").read_text())
    del document["sha256"]  # as an older version wrote it
    (out / "result.json").write_text(json.dumps(document).replace(old, new))
    for _ in range(2):
        with pytest.raises(DataError, match=f"expected the measurements of a run, found {reason}"):
            pretrain(config(), out, show_progress=False)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)


def test_a_resume_with_other_tokens_is_refused(config: Config, uninterrupted: Path, other_tokens: Path):
    with pytest.raises(DataError) as caught:
        pretrain(config("--data.path", str(other_tokens)), uninterrupted, show_progress=False)
    with TokenDataset.open(other_tokens) as dataset:
        assert dataset.content_id in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_run_folder_in_use_is_refused(config: Config, tmp_path: Path):
    started = start(config("--training.duration.steps", "5000"), tmp_path / "run")
    try:
        wait_for_step(tmp_path / "run", 1, started)
        with pytest.raises(UsageError, match=f"process {started[0].pid}"):
            pretrain(config("--training.duration.steps", "5000"), tmp_path / "run", show_progress=False)
    finally:
        started[0].kill()
        wait(started)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_a_disk_without_room_for_two_checkpoints_is_refused_before_training(config: Config, small_disk: Path):
    with pytest.raises(ResourceError, match="for two checkpoints"):
        pretrain(config(), small_disk / "run", show_progress=False)
    assert {path.name for path in (small_disk / "run").iterdir()} == {"lock", "checkpoints"}


def test_a_disk_that_is_full_to_the_last_byte_is_refused_as_such(config: Config, small_disk: Path):
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(ResourceError) as caught:
        pretrain(config(), small_disk / "run", show_progress=False)
    assert caught.value.exit_code == 6
