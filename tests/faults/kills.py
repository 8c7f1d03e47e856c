"""Kills of training, in steps and in saves: the resumed run must end with the bits of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from campaign import Case, fault
from small_corpus import prepare_corpus
from training_runs import STEPS, losses, run, small_config, start, wait, weights

from metatokens.config.loading import to_yaml
from metatokens.config.schema import PretrainConfig
from metatokens.training.checkpoint import find_checkpoint, step_folders

WAYS = {"single": (1, ()), "ddp": (2, ()), "fsdp2": (2, ("--training.parallel.kind", "fsdp2"))}
MICRO_BATCH = ("--training.micro_batch_blocks", "3")
SECONDS = 600


def config_of(case: Case, way: str, *overrides: str) -> PretrainConfig:
    tokens = case.shared / "corpus" / "tokens"
    if not tokens.exists():
        tokens.parent.mkdir()
        prepare_corpus(tokens.parent, num_documents=40, vocab_size=300)
    return small_config(case.folder / "small.yaml", tokens, *MICRO_BATCH, *WAYS[way][1], *overrides)


def whole(case: Case, way: str) -> Path:
    """Return the folder of a run that was left alone."""
    out = case.shared / way
    if not out.exists():
        world_size = WAYS[way][0]
        assert run(config_of(case, way), out, world_size=world_size) == [0] * world_size
    return out


def steps_done(out: Path) -> int:
    """Return the last step that metrics.jsonl tells of; its last line may be cut."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def wait_until(condition: Callable[[], bool], is_running: Callable[[], bool]) -> bool:
    """Wait for the condition; False if the run has ended before."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if not is_running():
            return False
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.001)
    return True


def kill(started: Sequence[Any]) -> None:
    for process in started:
        os.kill(process.pid, signal.SIGKILL)
    wait(started)


def assert_nothing_lost(out: Path, committed: Sequence[Path]) -> None:
    """Require a checkpoint that verifies and is no older than the newest that was committed before the kill."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one that is passed over was damaged
        newest = find_checkpoint(out / "checkpoints")
    assert not committed or (newest is not None and newest.name >= committed[0].name), "lost a checkpoint"


def assert_same_bits(case: Case, way: str, out: Path) -> None:
    reference = whole(case, way)
    assert losses(out) == losses(reference), "other losses"
    assert losses(out, "validation_loss_hex") == losses(reference, "validation_loss_hex"), "other validation losses"
    assert weights(out) == weights(reference), "other weights"


def kill_and_resume(case: Case, way: str, config: PretrainConfig, moment: Callable[[Path, int], bool]) -> int:
    """Kill a run at a moment after each of some random steps, then let it end; return the number of kills."""
    out, world_size, kills, step = case.folder / "run", WAYS[way][0], 0, 0
    whole(case, way)
    for _ in range(3):
        step += case.random.randint(1, 10)
        target = step
        started = start(config, out, world_size=world_size)
        is_met = wait_until(lambda: moment(out, target), lambda: all(process.is_alive() for process in started))  # noqa: B023
        time.sleep(case.random.uniform(0, 0.02))
        committed = step_folders(out / "checkpoints")
        kill(started)
        assert_nothing_lost(out, committed)
        kills += is_met
        case.tally[kind_of_run(way, config)] += is_met
        step = max(step, steps_done(out))
    assert run(config, out, world_size=world_size) == [0] * world_size, out.with_name("run.error").read_text()
    assert not list(out.glob("**/.*.tmp-*")), "left something behind"
    assert_same_bits(case, way, out)
    return kills


def is_past(out: Path, step: int) -> bool:
    return steps_done(out) >= step


def saves_after(out: Path, step: int) -> bool:
    return any(path.name > f".step-{step:08d}" for path in (out / "checkpoints").glob(".step-*.tmp-*"))


def kind_of_run(way: str, config: PretrainConfig) -> str:
    return f"{way}, saving in the background" if config.checkpoint.background else way


def background(random: random.Random) -> tuple[str, str]:
    return "--checkpoint.background", random.choice(["true", "false"])


@fault(counts="kills of one process survived", times=6)
def kill_one_process(case: Case) -> int:
    return kill_and_resume(case, "single", config_of(case, "single", *background(case.random)), is_past)


@fault(counts="kills of two processes survived", times=6)
def kill_two_processes(case: Case) -> int:
    way = case.random.choice(["ddp", "fsdp2"])
    return kill_and_resume(case, way, config_of(case, way, *background(case.random)), is_past)


@fault(counts="saves interrupted", times=9)
def kill_while_saving(case: Case) -> int:
    way = case.random.choice(list(WAYS))
    every = ("--checkpoint.interval_steps", "1", *background(case.random))
    return kill_and_resume(case, way, config_of(case, way, *every), saves_after)


@fault(counts="kills under torchrun survived", times=2)
def kill_a_worker_of_torchrun(case: Case) -> int:
    """Kill one worker after another; torchrun starts all of them again each time."""
    way, out, kills = case.random.choice(["ddp", "fsdp2"]), case.folder / "run", 0
    whole(case, way)
    preset = case.folder / "config.yaml"
    config = config_of(case, way, *background(case.random))
    preset.write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "10", "-m", "metatokens.cli", "pretrain", str(preset), "--out", str(out)]
    with (case.folder / "errors").open("w") as errors:
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
    try:
        step = 0
        while kills < 10:
            step = max(step, steps_done(out)) + case.random.randint(1, 12)
            if step >= STEPS or not wait_until(lambda: is_past(out, step), lambda: job.poll() is None):  # noqa: B023
                break
            main = int((out / "lock").read_text().split()[1])
            os.kill(case.random.choice([main, *siblings(main)]), signal.SIGKILL)
            kills += 1
            case.tally[kind_of_run(way, config)] += 1
        assert job.wait(SECONDS) == 0, (case.folder / "errors").read_text()[-2000:]
    except AssertionError as error:  # it has waited too long
        error.add_note((case.folder / "errors").read_text()[-4000:])
        raise
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert_same_bits(case, way, out)
    return kills


def siblings(worker: int) -> list[int]:
    """Return the other workers of the same torchrun."""
    parent = Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[1]
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if int(child) != worker]
