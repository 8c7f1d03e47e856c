"""One process at a time, and one run per folder."""

import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metatokens.config.loading import load_preset
from metatokens.config.schema import PretrainConfig
from metatokens.errors import MetaTokensError, ResourceError, UsageError
from metatokens.storage import write_atomically
from metatokens.training.run_folder import RunFolder

NOBODY = 65534
PROCESSES = multiprocessing.get_context("fork")


def hold_the_lock(path: Path, ready: Path) -> None:
    with RunFolder(path).locked():
        ready.write_text("")
        time.sleep(600)


@contextmanager
def holder(path: Path, tmp_path: Path) -> Iterator[int]:
    """Another process that holds the lock of a run folder, killed at the end."""
    process = PROCESSES.Process(target=hold_the_lock, args=(path, tmp_path / "ready"))
    process.start()
    assert process.pid is not None
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "ready").exists():
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process.pid
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_a_folder_that_another_process_holds_is_refused_with_its_id(tmp_path: Path):
    with holder(tmp_path / "run", tmp_path) as pid:
        with pytest.raises(UsageError) as caught, RunFolder(tmp_path / "run").locked():
            pass
        assert caught.value.exit_code == 2
        assert f"another run uses this folder (process {pid} on " in str(caught.value)


def test_a_killed_holder_frees_the_folder(tmp_path: Path):
    with holder(tmp_path / "run", tmp_path):
        pass
    with RunFolder(tmp_path / "run").locked():
        pass


def test_the_lock_is_free_again_after_an_error(tmp_path: Path):
    with pytest.raises(KeyError), RunFolder(tmp_path / "run").locked():
        raise KeyError
    with RunFolder(tmp_path / "run").locked():
        pass


def as_nobody(function: Callable[[], object]) -> tuple[int, str]:
    """Return exit code and message of the error of a function, called in a process that is not root."""
    reader, writer = PROCESSES.Pipe(duplex=False)

    def call() -> None:
        if os.getuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            function()
            writer.send((0, ""))
        except MetaTokensError as error:
            writer.send((error.exit_code, str(error)))

    process = PROCESSES.Process(target=call)
    process.start()
    process.join(120)
    return reader.recv() if reader.poll() else (-1, f"died with {process.exitcode}")


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that everyone can read and only its owner could write; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        yield path
        for folder in (path, *path.rglob("*/")):
            folder.chmod(0o755)


def lock_and_settle(path: Path) -> None:
    folder = RunFolder(path)
    with folder.locked():
        folder.check_config(load_preset("tiny/meta"))
        folder.write_config(load_preset("tiny/meta"))


def test_a_folder_that_cannot_be_made_is_refused(read_only: Path):
    read_only.chmod(0o555)
    exit_code, message = as_nobody(lambda: lock_and_settle(read_only / "run"))
    assert exit_code == 2, message
    assert f"{read_only / 'run'}: expected a folder that can be written, found Permission denied" in message


def test_a_run_folder_that_became_read_only_is_refused(read_only: Path):
    lock_and_settle(read_only / "run")
    (read_only / "run" / "lock").chmod(0o666)
    for folder in (read_only / "run" / "checkpoints", read_only / "run", read_only):
        folder.chmod(0o555)
    exit_code, message = as_nobody(lambda: lock_and_settle(read_only / "run"))
    assert exit_code == 2, message
    assert "expected a folder that can be written" in message


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="a folder that can be written"), RunFolder(tmp_path / "run").locked():
        pass


def settle(path: Path, *overrides: str) -> PretrainConfig:
    config = load_preset("tiny/meta", overrides)
    folder = RunFolder(path)
    with folder.locked():
        folder.check_config(config)
        folder.write_config(config)
    return config


def test_the_written_config_is_a_preset_and_versions_are_beside_it(tmp_path: Path):
    config = settle(tmp_path)
    assert load_preset(tmp_path / "config.yaml") == config
    assert {"python", "torch", "transformers", "metatokens"} <= json.loads(
        (tmp_path / "versions.json").read_text()
    ).keys()
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("seed", "0", "1"),
        ("model.hidden_size", "128", "64"),
        ("injection.ratio", "0.1", "0.2"),
        ("data.block_size", "256", "128"),
        ("optimizer.learning_rate", "0.002", "0.001"),
        ("schedule.warmup_steps", "50", "10"),
        ("training.batch_blocks", "32", "64"),
        ("training.precision", "'float32'", "bfloat16"),
    ],
)
def test_a_changed_key_that_makes_it_another_run_is_named_with_both_values(
    tmp_path: Path, key: str, old: str, new: str
):
    settle(tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(UsageError) as caught:
        settle(tmp_path, f"--{key}", new)
    assert caught.value.exit_code == 2
    for word in (f"{tmp_path}: {key}: ", old, new):
        assert word in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == before


def test_another_variant_is_named_by_its_kind(tmp_path: Path):
    settle(tmp_path)
    with pytest.raises(UsageError, match=r"injection\.kind: expected 'uniform' .* found 'periodic'"):
        settle(tmp_path, "--injection.kind", "periodic")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.micro_batch_blocks", "4"),
        ("training.compile", "true"),
        ("data.path", "elsewhere"),
        ("logging.interval_steps", "3"),
        ("checkpoint.keep", "5"),
        ("evaluation.interval_steps", "off"),
    ],
)
def test_a_key_that_does_not_change_the_run_may_change_and_is_written_down(tmp_path: Path, key: str, value: str):
    settle(tmp_path)
    config = settle(tmp_path, f"--{key}", value)
    assert load_preset(tmp_path / "config.yaml") == config != load_preset("tiny/meta")


def test_a_small_file_that_does_not_fit_is_a_resource_error_and_the_old_one_stays(tmp_path: Path):
    (tmp_path / "result.json").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # a limit on file sizes fails writes as a full disk does, and can be lifted again
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        with pytest.raises(ResourceError, match="bytes free") as caught:
            write_atomically(tmp_path / "result.json", "new and longer")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 6
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_damaged_config_of_a_run_is_one_line(tmp_path: Path):
    settle(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: [")
    with pytest.raises(UsageError, match=r"config\.yaml: expected YAML"):
        settle(tmp_path)
