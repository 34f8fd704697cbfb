"""The processes of a run: each takes its share of every step, and all of them hold the same weights.

Under `torchrun` the processes are torchrun's. Elsewhere `launch` starts `num_processes` of them on this machine.
With one process every method is free and needs no process group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlaif_fast.errors import RlaifFastError, UsageError

T = TypeVar("T")

# The other processes wait this long for one that makes data, ranks with a slow oracle or writes a checkpoint.
TIMEOUT = timedelta(hours=2)

_FAILED = "process {} of the run failed; its message is above"


class World:
    """The processes that train together, seen from one of them.

    The first exchange waits until every process is there, so what comes before it need not wait.

    Attributes:
        rank: This process, 0 to size - 1. Rank 0 writes the run's folder.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, connect: Callable[[], Any] | None = None) -> None:
        self.rank = rank
        self.size = size
        self._connect = connect

    def connect(self) -> None:
        """Wait until every process is there."""
        if self._connect is not None:
            connect, self._connect = self._connect, None
            connect()

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of `items`."""
        return list(items[self.rank :: self.size])

    def sum(self, *numbers: float) -> list[float]:
        """The sums over the processes."""
        if self.size == 1:
            return list(numbers)
        self.connect()
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, item: T) -> list[T]:
        """Everyone's `item`, by rank; it is pickled."""
        if self.size == 1:
            return [item]
        self.connect()
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes; a process that has none counts as zero."""
        if self.size == 1:
            return
        self.connect()
        by_kind: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_kind.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        for kind in by_kind.values():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in kind]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            flat /= self.size
            for parameter, mean in zip(kind, flat.split([p.numel() for p in kind])):
                parameter.grad = mean.view_as(parameter)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every process rank 0's values, in place."""
        if self.size == 1:
            return
        self.connect()
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum(0.0)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in rank 0, then in the others: what rank 0 makes and caches, they find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


def rank_under_torchrun() -> int:
    """The rank torchrun gave this process; 0 elsewhere."""
    return int(os.environ.get("RANK", "0"))


def launch(work: Callable[[World, Any], T], argument: Any, num_processes: int) -> T:
    """Call `work(world, argument)` in every process of the run; return what it returned in this one.

    Under torchrun (RANK is set) this process is one of torchrun's. Otherwise this process is rank 0, and the others
    are started here and end with it.

    Args:
        work: An importable function; it runs in each process.
        argument: Its second argument; it is pickled.
        num_processes: Processes to start on this machine, this one counted; not used under torchrun.

    Raises:
        RlaifFastError: Another process failed; it has printed why.
    """
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return _take_part(work, argument, rank, size, int(os.environ.get("LOCAL_RANK", rank)))
    if num_processes == 1:
        return work(World(), argument)
    store = dist.TCPStore(
        "127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False, timeout=TIMEOUT
    )
    context = torch.multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_other, args=(work, argument, rank, num_processes, store.port), daemon=True)
        for rank in range(1, num_processes)
    ]
    try:
        for process in others:
            process.start()
        result = _take_part(work, argument, 0, num_processes, 0, store, others)
        for process in others:
            process.join()
        return result
    except RuntimeError as error:  # a collective whose other side is gone
        for rank, process in enumerate(others, 1):
            process.join(timeout=5)
            if process.exitcode:
                raise RlaifFastError(_FAILED.format(rank)) from error
        raise
    finally:
        for process in others:
            process.terminate()
            process.join()


def _take_part(
    work: Callable[[World, Any], T],
    argument: Any,
    rank: int,
    size: int,
    local_rank: int,
    store: dist.Store | None = None,
    others: Sequence[Any] = (),
) -> T:
    """Call `work` in one of several processes."""
    backend = _choose_backend(local_rank)
    with contextlib.ExitStack() as stack:

        def connect() -> None:
            if store is not None:
                store.set(f"joined {rank}", "")
            for other, process in enumerate(others, 1):
                _wait_for(other, process, store)
            stack.enter_context(_group(backend, rank, size, store))

        world = World(rank, size, connect)
        if store is None:  # torchrun started them together: none begins before rank 0 is ready
            world.connect()
        result = work(world, argument)
        world.connect()
        return result


def _wait_for(rank: int, process: Any, store: Any) -> None:
    """Wait until another process is about to join the group; one that ends before never will."""
    while not store.check([f"joined {rank}"]):
        process.join(timeout=0.05)
        if process.exitcode is not None:
            raise RlaifFastError(_FAILED.format(rank))


def _other(work: Callable[[World, Any], Any], argument: Any, rank: int, size: int, port: int) -> None:
    """The life of a process that `launch` started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the others
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
    try:
        _take_part(work, argument, rank, size, rank, store)
    except RlaifFastError as error:
        print(f"error: process {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _choose_backend(local_rank: int) -> str:
    """Gloo for the CPU, and NCCL where each process has a GPU, which is this process's from now on."""
    if not torch.cuda.is_available():
        return "gloo"
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"num_processes: process {local_rank} has no GPU, torch sees {torch.cuda.device_count()}; "
            "start at most one process a GPU"
        )
    torch.cuda.set_device(local_rank)
    return "cpu:gloo,cuda:nccl"


@contextlib.contextmanager
def _group(backend: str, rank: int, size: int, store: dist.Store | None) -> Iterator[None]:
    """The default process group while the block runs."""
    if store is not None:
        # The rendezvous is on this machine, and so is the traffic: the host's name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
