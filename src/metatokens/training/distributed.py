"""The processes of a run: one, or several under torchrun.

From the environment it reads only torchrun's variables: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, and the
address at which the processes meet.
"""

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from metatokens.config.parallel import Single
from metatokens.config.schema import StepConfig
from metatokens.errors import MetaTokensError, Preempted, ResourceError, UsageError
from metatokens.training.watch import PeerWatch

_SECONDS_TO_LEAVE = 60.0
_ARRIVAL_POLL_SECONDS = 0.02
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    node_share: tuple[int, int] = (0, 1)
    """Index and number of this process among those of its machine, which divide the work of reading its files."""
    group: Any = None
    """The process group of what waits for the others; None is the default one."""
    background_group: Any = None
    """A group on the CPU for what is done beside the training, in a thread; None alone."""
    watch: PeerWatch | None = None
    """The watch over the other processes; None alone."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Add each value over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        self._arrive()
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return [float(value) for value in total]

    def gather(self, item: T) -> list[T]:
        """Return the item of every process, by rank; all of them can be pickled."""
        if self.world_size == 1:
            return [item]
        self._arrive()
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.group)
        return items

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Wait at the end of the block for all processes; if any failed, all raise the error of the lowest such rank.

        The block itself must not wait for another process.
        """
        own: MetaTokensError | Preempted | None = None
        try:
            yield
        except (MetaTokensError, Preempted) as error:
            own = error
        outcomes = self.gather(own and (type(own), str(own)))
        first = next((rank for rank, outcome in enumerate(outcomes) if outcome), None)
        if first is None:
            return
        if own is not None and first == self.rank:
            if first and isinstance(own, MetaTokensError):
                # the main process was well, so what is wrong is with this one
                own.args = (f"rank {first}: {own}",)
            raise own
        kind, line = outcomes[first]  # type: ignore[misc]
        raise kind.repeat(f"rank {first}: {line}" if first else line)

    def agree(self, facts: Mapping[str, object], *, error: type[MetaTokensError], remedy: str) -> None:
        """Compare facts with those of the main process.

        Raises:
            MetaTokensError: of the given type, on every process, if any differs; it names the rank and the fact.
        """
        first, *others = self.gather(dict(facts))
        for rank, its in enumerate(others, start=1):
            for key in (*first, *(its.keys() - first.keys())):
                if first.get(key) != its.get(key):
                    difference = error(
                        f"rank {rank}: {key}",
                        expected=f"{first.get(key)!r} as on rank 0",
                        found=repr(its.get(key)),
                        remedy=remedy,
                    )
                    difference.is_repeated = not self.is_main
                    raise difference

    def _arrive(self) -> None:
        if self.watch is not None and self.group is None:  # another group is that of another thread
            self.watch.arrive()

    def enter(self, place: str, seconds: float) -> None:
        """Say where this process is from now on; the watch ends it if it stays there for longer."""
        if self.watch is not None:
            self.watch.enter(place, seconds)


@contextmanager
def join_processes(config: StepConfig) -> Iterator[Processes]:
    """Join the processes that torchrun started, or run as the only one.

    Raises:
        UsageError: if the number of processes does not fit the config.
        ResourceError: if a peer died or hangs; it names the peer.
    """
    processes = _join(config)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        # cuBLAS reads this when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with processes.raise_together():
            _check_number(config, processes.world_size)
        yield processes
    except RuntimeError as error:
        if processes.watch is None or not is_of_transport(error):
            raise
        raise processes.watch.explain() from error
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        _leave(processes)


def _join(config: StepConfig) -> Processes:
    rank, world_size = _rank(), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(config.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return Processes(device=device)
    timeout = timedelta(seconds=config.distributed_timeout_seconds)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store = _unused_part(store, rank, world_size, config.distributed_timeout_seconds)
    watch = PeerWatch(store, rank, world_size)
    watch.start()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        background_group = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        raise watch.explain() from error
    return Processes(
        rank=rank,
        world_size=world_size,
        device=device,
        node_share=(local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))),
        background_group=background_group,
        watch=watch,
    )


def _unused_part(store: Any, rank: int, world_size: int, seconds: float) -> Any:
    """Return a part of the store that no other attempt uses, the same for all processes.

    torchrun keeps its store when it starts the workers again, and the addresses of the dead ones with it. Its count of
    restarts may differ from machine to machine, so rank 0 names the part and tells it to each process that asks.

    Raises:
        ResourceError: a process did not arrive in time; it is named.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"asking/{rank}", own)
        part = store.get(f"part/{own}").decode()
        store.set(f"{part}/arrived/{rank}", "")
        return PrefixStore(part, store)
    waiting, deadline = list(range(1, world_size)), time.monotonic() + seconds
    while waiting := [peer for peer in waiting if not store.check([f"{own}/arrived/{peer}"])]:
        for peer in waiting:
            if store.check([f"asking/{peer}"]):  # who asks may belong to an earlier attempt; the answer does no harm
                store.set(f"part/{store.get(f'asking/{peer}').decode()}", own)
        if time.monotonic() > deadline:
            raise ResourceError.plain(
                f"rank {waiting[0]}",
                happened=f"it did not arrive within {seconds:.0f} s",
                remedy="see its own errors, or raise training.distributed_timeout_seconds",
            )
        time.sleep(_ARRIVAL_POLL_SECONDS)
    return PrefixStore(own, store)


def _leave(processes: Processes) -> None:
    if processes.watch is not None:
        processes.enter("the end", _SECONDS_TO_LEAVE)
        dist.destroy_process_group()
        processes.watch.stop()


def is_of_transport(error: RuntimeError) -> bool:
    """Tell whether an error says that a peer could not be reached; gloo has no type of its own for that."""
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))


def _check_number(config: StepConfig, world_size: int) -> None:
    if isinstance(config.parallel, Single) and world_size > 1:
        raise UsageError(
            "training.parallel.kind single",
            expected="one process",
            found=str(world_size),
            remedy="start one, or set training.parallel.kind to ddp or fsdp2",
        )
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
