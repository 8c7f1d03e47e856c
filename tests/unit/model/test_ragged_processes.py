"""Two processes under DistributedDataParallel; the batch of one has no meta-token."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from forked import run_all
from tiny_models import gradients, tiny_model, tokens

ROWS = ("x_xx_x", "xxxxxx")  # of rank 0 and of rank 1
DEADLOCK_SECONDS = 120  # two processes that import torch on a busy machine start this far apart


def train(rank: int, store: Path, out: Path) -> None:
    """Be one of the two: leave the gradients after two steps."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=DEADLOCK_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    model = DistributedDataParallel(tiny_model().train())
    ids = tokens(ROWS[rank])
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    torch.save(gradients(model.module), out)
    # before the group: else the reducer destroys it under the interpreter lock, and waits for a thread that needs it
    del model
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_of_which_one_has_no_meta_tokens_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    each = [(rank, tmp_path / "store", out) for rank, out in enumerate(outputs)]
    run_all(train, each, seconds=4 * DEADLOCK_SECONDS)
    first, second = (torch.load(out) for out in outputs)

    alone = []
    for row in ROWS:
        model, ids = tiny_model().train(), tokens(row)
        model(ids, labels=ids).loss.backward()
        alone.append(gradients(model))
    assert first.keys() == alone[0].keys() == alone[1].keys()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, msg=name)
