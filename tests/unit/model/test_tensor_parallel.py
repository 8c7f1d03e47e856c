"""Two processes that hold a half of every projection and of the output head each."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from forked import run_all
from metatokens.model import MetaTokenForCausalLM
from metatokens.model.export import save_model
from tiny_models import assert_close, gradients, tiny_model, tokens

IDS = tokens("x_xx_x_x", "xx_xxx_x")
DEADLOCK_SECONDS = 25


def train(rank: int, checkpoint: Path, store: Path, out: Path) -> None:
    """Be one of the two: leave the loss and the gradients."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    patience = timedelta(seconds=DEADLOCK_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=patience)
    model = MetaTokenForCausalLM.from_pretrained(checkpoint, tp_plan="auto").train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    found = gradients(model)
    whole = {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in found.items()}
    torch.save((loss.detach(), whole), out)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_halves_of_a_model_have_the_loss_and_the_gradients_of_the_whole(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=tied).train()
    save_model(model, tmp_path / "checkpoint")
    outputs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    each = [(rank, tmp_path / "checkpoint", tmp_path / "store", out) for rank, out in enumerate(outputs)]
    run_all(train, each, seconds=4 * DEADLOCK_SECONDS)
    expected_loss = model(IDS, labels=IDS).loss
    expected_loss.backward()
    expected = gradients(model)
    for out in outputs:
        loss, found = torch.load(out)
        assert_close(loss, expected_loss.detach(), 1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert_close(gradient, expected[name], 1e-4)
