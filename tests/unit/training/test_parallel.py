"""Loss and gradients are those of one process, however many share the model and however few targets one has."""

import os
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forked import run_all
from metatokens.config.schema import PretrainConfig
from metatokens.training.distributed import Processes
from metatokens.training.parallel import share_model, whole_tensor
from tiny_models import tiny_model, tokens

# one row for each of up to four processes: two of them without a meta-token, and none with as many targets as another
ROWS = ("x_xx_x__x", "xxxxxx", "xxx", "_x__x_xx")
SECONDS = 120


def step_config(kind: str, micro_batch_blocks: int = 1) -> Any:
    return PretrainConfig.model_validate(
        {"training": {"batch_blocks": 4, "micro_batch_blocks": micro_batch_blocks, "parallel": {"kind": kind}}}
    ).training


def backward(processes: Processes, kind: str, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Return the loss and the whole gradients of a step over all rows, of which this process does its share."""
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    shared = share_model(step_config(kind), processes)
    shared.place(model)
    step_model = shared.wrap(model)
    rows = ROWS[processes.rank :: processes.world_size]
    num_targets = processes.sum(float(sum(row[1:].count("x") for row in rows)))[0]
    total = 0.0
    for index, row in enumerate(rows):
        ids = tokens(row)
        with shared.accumulate(step_model, last=index + 1 == len(rows)):
            divisor = num_targets / processes.world_size
            loss = step_model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=divisor).loss
            loss.backward()
        total += float(loss.detach()) / processes.world_size
    numbers = {name: whole_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    # processes that evaluate shares of different lengths do not wait for one another
    model.eval()
    with shared.evaluating(model), torch.no_grad():
        for _ in range(processes.rank):
            model(input_ids=ids, use_cache=False)
    shared.release()
    return {**numbers, "loss": torch.tensor(processes.sum(total), dtype=torch.float64)}


def work(rank: int, world_size: int, store: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    patience = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=patience)
    processes = Processes(rank=rank, world_size=world_size)
    found = {
        f"{kind}, {checkpointing}": backward(processes, kind, checkpointing=checkpointing)
        for kind, checkpointing in product(("ddp", "fsdp2"), (False, True))
    }
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradients_are_those_of_one_process(world_size: int, tmp_path: Path) -> None:
    alone = backward(Processes(), "single", checkpointing=False)
    assert len(alone) > 1
    each = [(rank, world_size, tmp_path / "store", tmp_path / "found.pt") for rank in range(world_size)]
    run_all(work, each, seconds=2 * SECONDS)
    for how, found in torch.load(tmp_path / "found.pt").items():
        assert found.keys() == alone.keys(), how
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, alone[name], msg=f"{how}: {name}")
