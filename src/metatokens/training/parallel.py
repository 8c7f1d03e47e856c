"""How the processes of a run share its model: each has a copy (DDP), or each keeps a part of every tensor (FSDP2).

A further way is one class here and one variant of `metatokens.config.parallel.Parallel`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from metatokens.config.parallel import Fsdp2
from metatokens.config.schema import StepConfig
from metatokens.training.distributed import Processes


class Whole:
    """One process with the whole model; the base of the other ways."""

    regroups_gradients: ClassVar[bool] = False
    """Whether the first backward pass changes the order in which later ones add gradients up."""
    is_sharded: ClassVar[bool] = False
    """Whether a process holds only a part of each tensor, so that all take part in saving."""

    def __init__(self, config: StepConfig, processes: Processes) -> None:
        """Take what the model will be shared by."""
        self.config, self.processes = config, processes

    def place(self, model: nn.Module) -> None:
        """Bring the model to the devices, before anything refers to its parameters."""
        model.to(self.processes.device)

    def wrap(self, model: Any) -> Any:
        """Return what a training step calls in place of the model."""
        return model

    def accumulate(self, step_model: Any, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of a micro-batch's passes."""
        del step_model, last
        return nullcontext()

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which each process may call the model as often as it likes, without its peers."""
        del model
        return nullcontext()

    def release(self) -> None:
        """Let go of the process group; nothing can be trained after that."""


class Copies(Whole):
    """DistributedDataParallel: every process has the whole model and averages the gradients."""

    regroups_gradients: ClassVar[bool] = True

    def wrap(self, model: Any) -> Any:
        """Return the DDP wrapper."""
        device = self.processes.device
        device_ids = [device.index] if device.type == "cuda" else None
        self._copy = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        return self._copy

    def accumulate(self, step_model: Any, *, last: bool) -> AbstractContextManager[None]:
        """Average the gradients only after the last micro-batch."""
        return nullcontext() if last else step_model.no_sync()

    def release(self) -> None:
        """Release the reducer, which holds the process group.

        If a traceback keeps the wrapper alive, the group is destroyed with it. That deadlocks: it waits for its
        threads under the interpreter lock, which one of them needs.
        """
        if hasattr(self, "_copy"):
            del self._copy.reducer
            self._copy.logger = None


class Shards(Whole):
    """FSDP2: every process keeps a part of each parameter, gradient and moment, and gathers a block when it needs it.

    Gradients are averaged in float32. Under bfloat16 a block is gathered in that type, which is what autocast would
    make of its matrices anyway; embedding and norms stay float32, and so does the stream between the blocks.
    """

    is_sharded: ClassVar[bool] = True

    def place(self, model: Any) -> None:
        """Cut the parameters of each block, and then of the rest, over the processes; a block at a time moves."""
        parallel, processes = self.config.parallel, self.processes
        assert isinstance(parallel, Fsdp2)
        mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        is_bfloat16 = self.config.precision == "bfloat16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if is_bfloat16 else None,
            reduce_dtype=torch.float32 if is_bfloat16 else None,
            cast_forward_inputs=False,
        )
        reshard = parallel.reshard_after_forward
        names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
        for block in [module for module in model.modules() if type(module).__name__ in names]:
            norms: list[nn.Module] = [
                m for m in block.modules() if isinstance(m, nn.LayerNorm) and m.elementwise_affine
            ]
            if is_bfloat16 and norms:
                fully_shard(norms, mesh=mesh, reshard_after_forward=reshard)
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Gather the whole model for a while: processes then call it without waiting for one another.

        What is gathered in bfloat16 has to be called under autocast, which the block gets here.
        """
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        is_bfloat16 = self.config.precision == "bfloat16"
        try:
            with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=is_bfloat16):
                yield
        finally:
            parallel = self.config.parallel
            assert isinstance(parallel, Fsdp2)
            for part in parts:
                part.set_reshard_after_forward(part is not model and parallel.reshard_after_forward, recurse=False)
                part.reshard()


_KINDS: dict[str, type[Whole]] = {"single": Whole, "ddp": Copies, "fsdp2": Shards}


def share_model(config: StepConfig, processes: Processes) -> Whole:
    """Return how the processes share the model; alone, a process has the whole."""
    return (Whole if processes.world_size == 1 else _KINDS[config.parallel.kind])(config, processes)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, which may be all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, which all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
