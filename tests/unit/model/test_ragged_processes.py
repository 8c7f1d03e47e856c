"""Two processes under DistributedDataParallel, one of which has no meta-token in its batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny_models import gradients, tiny_model, tokens

ROWS = ("x_xx_x", "xxxxxx")  # of rank 0 and of rank 1
DEADLOCK_SECONDS = 25
PROGRAM = f"""
import sys
from datetime import timedelta
sys.path[:0] = {{path!r}}
import torch
import torch.distributed as dist
from tiny_models import gradients, tiny_model, tokens
from torch.nn.parallel import DistributedDataParallel

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group(
    "gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timedelta(seconds={DEADLOCK_SECONDS})
)
model = DistributedDataParallel(tiny_model().train())
ids = tokens({ROWS!r}[rank])
for _ in range(2):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
torch.save(gradients(model.module), out)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_of_which_one_has_no_meta_tokens_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    program = PROGRAM.format(path=sys.path)
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(tmp_path / "store"), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outputs)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=4 * DEADLOCK_SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
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
