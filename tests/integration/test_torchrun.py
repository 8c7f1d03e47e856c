"""Under torchrun: a job that a scheduler stops can be continued, and one whose process dies is started again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import losses, run, small_config, wait_for_step, wait_until, weights

from metatokens.config.loading import to_yaml

STEPS = 120


def torchrun(config: Path, out: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    command += ["-m", "metatokens.cli", "pretrain", str(config), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def worker_of(out: Path) -> int:
    return int((out / "lock").read_text().split()[1])


@pytest.mark.slow
@pytest.mark.long
def test_a_job_that_is_stopped_as_a_whole_and_loses_a_process_later_ends_with_the_same_bits(
    tokens: Path, tmp_path: Path
):
    overrides = ["--training.micro_batch_blocks", "6", "--training.duration.steps", str(STEPS)]
    config = small_config(
        tmp_path / "small.yaml",
        tokens,
        *overrides,
        "--evaluation.interval_steps",
        "off",
        "--checkpoint.interval_steps",
        "30",
    )
    assert run(config, tmp_path / "whole", world_size=2) == [0, 0]
    preset, out = tmp_path / "config.yaml", tmp_path / "run"
    preset.write_text(to_yaml(config))

    job = torchrun(preset, out, "--shutdown-timeout", "120")
    wait_for_step(out, 3, [])
    os.killpg(job.pid, signal.SIGTERM)  # the agent and its workers at once; the agent then sends it to them again
    errors = job.communicate(timeout=300)[1]
    assert job.returncode != 0
    assert errors.count("metatokens: stopped by SIGTERM after step") == 1, errors[-3000:]
    stopped_after = max(losses(out))
    assert stopped_after < STEPS
    assert (out / "checkpoints" / f"step-{stopped_after:08d}" / "manifest.json").exists()
    assert json.loads((out / "preempted.json").read_text())["cause"] == "SIGTERM"

    job = torchrun(preset, out, "--max-restarts", "1")
    wait_until(lambda: max(losses(out)) > stopped_after + 5, [])
    assert not (out / "preempted.json").exists()
    os.kill(worker_of(out), signal.SIGKILL)
    errors = job.communicate(timeout=300)[1]
    assert job.returncode == 0, errors[-3000:]
    assert losses(out) == losses(tmp_path / "whole")
    assert weights(out) == weights(tmp_path / "whole")
