"""The processes of a run: one, or several under torchrun.

From the environment it reads only torchrun's variables: RANK, LOCAL_RANK and WORLD_SIZE.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from metatokens.config.schema import StepConfig
from metatokens.errors import MetaTokensError, UsageError


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    copies: list[nn.parallel.DistributedDataParallel] = field(default_factory=list)
    """The DDP wrappers that `wrap` has made, for `leave` to release."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Add each value over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Wait at the end of the block for all processes; if any failed, all raise the error of the lowest such rank.

        The block itself must not wait for another process.
        """
        own: MetaTokensError | None = None
        try:
            yield
        except MetaTokensError as error:
            own = error
        outcomes: list[Any] = [own and (type(own), str(own))]
        if self.world_size > 1:
            outcomes *= self.world_size
            dist.all_gather_object(outcomes, outcomes[self.rank])
        first = next((rank for rank, outcome in enumerate(outcomes) if outcome), None)
        if first is None:
            return
        if own is not None and first == self.rank:
            raise own
        kind, line = outcomes[first]
        raise kind.repeat(line)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model in a DDP wrapper, which averages gradients over the processes; alone, the model itself."""
        if self.world_size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        copy = nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        self.copies.append(copy)
        return copy

    def leave(self) -> None:
        """Leave the process group; no wrapper can be trained after that."""
        if self.world_size == 1:
            return
        # A wrapper's reducer holds the process group. If a traceback keeps the wrapper alive, the group is destroyed
        # with it. That deadlocks: it waits for its threads under the interpreter lock, which one of them needs.
        for copy in self.copies:
            del copy.reducer
            copy.logger = None
        dist.destroy_process_group()


@contextmanager
def join_processes(config: StepConfig) -> Iterator[Processes]:
    """Join the processes that torchrun started, or run as the only one."""
    rank, world_size = _rank(), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        # cuBLAS reads this when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.distributed_timeout_seconds),
        )
    processes = Processes(rank=rank, world_size=world_size, device=device)
    try:
        with processes.raise_together():
            _check_batch(config, world_size)
        yield processes
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        processes.leave()


def _check_batch(config: StepConfig, world_size: int) -> None:
    rows = min(config.micro_batch_blocks, config.batch_blocks // world_size or 1)
    if config.batch_blocks % (world_size * rows):
        raise UsageError(
            "training.batch_blocks",
            expected=f"a multiple of {world_size} processes x training.micro_batch_blocks {config.micro_batch_blocks}",
            found=str(config.batch_blocks),
            remedy="change either setting or the number of processes",
        )


def is_main_process() -> bool:
    """Tell whether this is the only process, or the first of those that torchrun started."""
    return _rank() == 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" names on this machine.

    Raises:
        UsageError: if `name` is "cuda" and there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda", expected="a GPU", found="none", remedy="choose the device cpu or auto")
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")
