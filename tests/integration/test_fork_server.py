"""Commands as forks of a server: their ends, their signals, and the end of the server, in real processes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from training_runs import DEADLINE_SECONDS

from metatokens.errors import ResourceError
from metatokens.sweep.forking import ForkedCommand, ForkServer

TRAINING = """
extends: tiny/recall
start:
  kind: fresh
  model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}
task: {kind: parity, questions: 1}
curriculum: [{steps: 100000, size: [1, 1], prompt_tokens: [8, 16]}]
training: {batch_blocks: 4, micro_batch_blocks: 4, device: cpu}
evaluation: {interval_steps: null}
logging: {interval_steps: 1}
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(os.environ) as server:
        yield server


def start(
    server: ForkServer, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> ForkedCommand:
    """Start a command that writes `output` and `log` in a folder."""
    with (folder / "output").open("wb") as output, (folder / "log").open("wb") as log:
        return server.start(arguments, environment or {}, output.fileno(), log.fileno())


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end_of(command: ForkedCommand) -> int | None:
    """Wait for the end of a command and return its exit code; one that takes too long is killed."""
    try:
        wait_until(lambda: command.poll() is not None)
    finally:
        command.send_signal(signal.SIGKILL)
    return command.returncode


@pytest.mark.slow
@pytest.mark.long
def test_commands_have_their_own_output_exit_code_and_environment(server: ForkServer, tmp_path: Path) -> None:
    widths = ("60", "120")
    good = [tmp_path / width for width in widths]
    bad = tmp_path / "bad"
    for folder in (*good, bad):
        folder.mkdir()
    commands = [start(server, ["--help"], *given) for given in zip(good, ({"COLUMNS": w} for w in widths), strict=True)]
    wrong = start(server, ["info", "nowhere"], bad)
    assert [end_of(command) for command in commands] == [0, 0]
    assert end_of(wrong) == 2
    assert all(command.cpu_seconds > 0 for command in (*commands, wrong))
    longest = [max(map(len, (folder / "output").read_text().splitlines())) for folder in good]
    assert longest[0] <= 60 < longest[1] <= 120
    assert not (bad / "output").read_text()
    (line,) = (bad / "log").read_text().splitlines()
    assert line.startswith("metatokens: preset 'nowhere'")
    wrong.send_signal(signal.SIGTERM)  # it has ended, and nothing happens
    assert wrong.poll() == 2


@pytest.mark.slow
@pytest.mark.long
def test_a_signal_right_after_the_start_is_not_lost(server: ForkServer, tmp_path: Path) -> None:
    for _ in range(20):
        command = start(server, ["info", "--presets"], tmp_path)
        command.send_signal(signal.SIGTERM)
        assert end_of(command) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.long
def test_signals_to_all_processes_of_a_job_do_not_end_the_server(tmp_path: Path) -> None:
    def send_all(process: subprocess.Popen[bytes]) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            process.send_signal(number)

    with ForkServer(os.environ) as server:
        assert server.process is None  # a sweep that has nothing to do starts none
        with ThreadPoolExecutor() as threads:
            first = threads.submit(start, server, ["--version"], tmp_path)
            wait_until(lambda: server.process is not None)
            assert server.process is not None
            send_all(server.process)
            assert not first.done()  # it makes its imports
            assert end_of(first.result(DEADLINE_SECONDS)) == 0
        send_all(server.process)
        assert end_of(start(server, ["--version"], tmp_path)) == 0


@pytest.mark.slow
@pytest.mark.long
def test_a_training_saves_and_ends_when_the_server_is_killed(tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(TRAINING)
    run = tmp_path / "run"
    with ForkServer(os.environ) as server:
        command = start(server, ["finetune", str(tmp_path / "preset.yaml"), "--out", str(run)], tmp_path)
        wait_until(lambda: (run / "metrics.jsonl").exists() and "loss" in (run / "metrics.jsonl").read_text())
        assert server.process is not None
        server.process.kill()
        assert end_of(command) == -signal.SIGTERM
        assert list(run.glob("checkpoints/*"))  # it was waited for
        with pytest.raises(ResourceError, match="ended with code -9; the same command continues"):
            start(server, ["--version"], tmp_path)
