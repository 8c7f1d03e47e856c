"""Training runs of a few seconds in processes of their own, for tests that kill them."""

import faulthandler
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from forked import processes
from metatokens import load_preset, pretrain
from metatokens.config.finetuning import FinetuneConfig
from metatokens.config.grafting import GraftRunConfig
from metatokens.config.schema import PretrainConfig, RunConfig
from metatokens.errors import MetaTokensError, Preempted
from metatokens.training.finetuning import finetune
from metatokens.training.grafting import train_graft
from tolerances import tolerance

STEPS = 40
SMALL = f"""
extends: tiny/meta
model: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, max_position_embeddings: 64}}
data: {{block_size: 64}}
schedule: {{warmup_steps: 5}}
training: {{duration: {{kind: steps, steps: {STEPS}}}, batch_blocks: 12, micro_batch_blocks: 4, device: cpu}}
evaluation: {{interval_steps: 10, blocks: 12}}
checkpoint: {{interval_steps: 4}}
logging: {{interval_steps: 1}}
"""
ROUNDING = tolerance(torch.float32, 12 * 58)  # a loss adds over the targets of a batch, in parts or at once
DEADLINE_SECONDS = 300  # seconds suffice, but not on a machine that is busy with something else


def small_config(preset: Path, tokens: Path, *overrides: str) -> PretrainConfig:
    preset.parent.mkdir(parents=True, exist_ok=True)
    preset.write_text(SMALL)
    return load_preset(preset, ["--data.path", str(tokens), *overrides])


def start(
    config: RunConfig | Sequence[RunConfig], out: Path, *, world_size: int = 1, folders: Sequence[Path] = ()
) -> list[Any]:
    """Start the processes of a run, with the environment that torchrun would give them.

    Each has its own config and starts in its own folder, if there are several.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(world_size):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own = config[rank] if isinstance(config, Sequence) else config
        folder = folders[rank] if folders else None
        process = processes.Process(target=_run, args=(own, out, {k: str(v) for k, v in environment.items()}, folder))
        process.start()
        started.append(process)
    return started


def wait(started: Sequence[Any]) -> list[int]:
    """Return the exit codes."""
    for process in started:
        process.join(DEADLINE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def run(
    config: RunConfig | Sequence[RunConfig], out: Path, *, world_size: int = 1, folders: Sequence[Path] = ()
) -> list[int]:
    return wait(start(config, out, world_size=world_size, folders=folders))


def _run(config: RunConfig, out: Path, environment: dict[str, str], folder: Path | None) -> None:
    if folder is not None:
        os.chdir(folder)
    faulthandler.dump_traceback_later(DEADLINE_SECONDS - 5)  # says where it hangs, should it do so
    warnings.filterwarnings("ignore", "bit_exact=false")  # events.jsonl has it too
    os.environ.update(environment)  # with as many threads as the tests: their bits are compared
    train = {FinetuneConfig: finetune, GraftRunConfig: train_graft}.get(type(config), pretrain)
    try:
        train(config, out, show_progress=False)
    except (MetaTokensError, Preempted) as error:
        if not error.is_repeated:
            out.with_name(f"{out.name}.error").write_text(str(error))
        sys.exit(error.exit_code)


def wait_for_step(out: Path, step: int, started: Sequence[Any]) -> None:
    """Wait until a run has done a step."""

    def reached() -> bool:
        text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
        return any(json.loads(line)["step"] >= step for line in text.splitlines(keepends=True) if line.endswith("\n"))

    wait_until(reached, started)


def wait_until(condition: Callable[[], bool], started: Sequence[Any]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert all(process.is_alive() for process in started), "a process ended too early"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def losses(out: Path, name: str = "loss_hex") -> dict[int, str]:
    """Return the last value that metrics.jsonl has for each step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def numbers(out: Path, name: str = "loss_hex") -> list[float]:
    return [float.fromhex(value) for value in losses(out, name).values()]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def reasons(out: Path) -> list[str]:
    """Return why the bits of a run may differ from those of one that was never interrupted, as its record says."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [reason for event in events if event["event"] == "continued" for reason in event["reasons"]]
