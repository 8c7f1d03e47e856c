"""The processes of a run agree before they start, and one that dies or hangs is named while the others end."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import run, small_config, start, wait, wait_for_step

from metatokens.config.schema import PretrainConfig

STEPS = 8
TWO = ("--training.micro_batch_blocks", "6")
Config = Callable[..., PretrainConfig]
pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def config(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    preset = tmp_path_factory.mktemp("preset") / "small.yaml"
    steps = ["--training.duration.steps", str(STEPS), "--evaluation.interval_steps", "off"]
    return lambda *overrides: small_config(preset, tokens, *steps, *TWO, *overrides)


def error_of(out: Path) -> str:
    return out.with_name(f"{out.name}.error").read_text()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("seed", "5", "rank 1: seed: expected 0"), ("optimizer.learning_rate", "1e-3", "learning_rate: expected 0.002")],
)
def test_a_process_with_another_config_ends_all_and_is_named_with_the_key(
    config: Config, tmp_path: Path, key: str, value: str, expected: str
):
    assert run([config(), config(f"--{key}", value)], tmp_path / "run", world_size=2) == [2, 2]
    assert expected in error_of(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_process_with_other_tokens_ends_all_and_is_named(
    config: Config, other_tokens: Path, tokens: Path, tmp_path: Path
):
    folders = [tmp_path / str(rank) for rank in range(2)]
    for folder, own in zip(folders, (tokens, other_tokens), strict=True):
        folder.mkdir()
        (folder / "tokens").symlink_to(own)
    relative = config("--data.path", "tokens")
    assert run(relative, tmp_path / "run", world_size=2, folders=folders) == [3, 3]
    assert "rank 1: content_id: expected" in error_of(tmp_path / "run")


def test_a_process_whose_disk_lacks_the_run_ends_all_and_is_named(config: Config, tmp_path: Path):
    folders = [tmp_path / str(rank) for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    out = Path("run")
    assert run(config(), folders[0] / out, world_size=1) == [0]
    shutil.rmtree(folders[0] / "run" / "model")
    shutil.rmtree(folders[0] / "run" / "checkpoints" / f"step-{STEPS:08d}")
    assert run(config(), out, world_size=2, folders=folders) == [4, 4]
    error = (folders[0] / "run.error").read_text()
    assert f"rank 1: run/checkpoints/step-{STEPS // 2:08d}/manifest.json: expected" in error
    assert "put --out on a disk that all processes see" in error


def test_a_process_that_would_write_its_part_to_another_disk_ends_all_and_is_named(config: Config, tmp_path: Path):
    folders = [tmp_path / str(rank) for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    sharded = config("--training.parallel.kind", "fsdp2")
    assert run(sharded, Path("run"), world_size=2, folders=folders) == [2, 2]
    assert "rank 1: lock of run: expected 'process" in (folders[0] / "run.error").read_text()


def test_one_process_alone_is_what_single_asks_for(config: Config, tmp_path: Path):
    assert run(config("--training.parallel.kind", "single"), tmp_path / "run", world_size=2) == [2, 2]
    assert "training.parallel.kind single: expected one process, found 2" in error_of(tmp_path / "run")


def test_a_process_that_dies_is_named_and_the_others_end(config: Config, tmp_path: Path):
    out = tmp_path / "run"
    started = start(config("--training.duration.steps", "100000"), out, world_size=2)
    wait_for_step(out, 3, started)
    os.kill(started[1].pid, signal.SIGKILL)
    assert wait(started) == [6, -signal.SIGKILL]
    assert "rank 1 died or does not run" in error_of(out)


def test_a_process_that_hangs_is_named_and_the_others_end_soon(config: Config, tmp_path: Path):
    out = tmp_path / "run"
    patience = ("--training.duration.steps", "100000", "--training.step_timeout_seconds", "2")
    started = start(config(*patience), out, world_size=2)
    wait_for_step(out, 3, started)
    os.kill(started[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        started[0].join(120)
        assert started[0].exitcode == 6
        assert time.monotonic() - began < 60  # of the 600 seconds that gloo would wait
    finally:
        os.kill(started[1].pid, signal.SIGKILL)
        wait(started)
