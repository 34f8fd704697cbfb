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

    Attributes:
        rank: This process, 0 to size - 1. Rank 0 writes the run's folder.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

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
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, item: T) -> list[T]:
        """Everyone's `item`, by rank; it is pickled."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes; a process that has none counts as zero."""
        if self.size == 1:
            return
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
        if self.size > 1:
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
        with _group(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store=None):
            return work(World(rank, size), argument)
    if num_processes == 1:
        return work(World(), argument)
    store = dist.TCPStore("127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_other, args=(work, argument, rank, num_processes, store.port), daemon=True)
        for rank in range(1, num_processes)
    ]
    try:
        for process in others:
            process.start()
        for rank, process in enumerate(others, 1):
            _wait_for(rank, process, store)
        with _group(0, num_processes, 0, store):
            result = work(World(0, num_processes), argument)
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


def _wait_for(rank: int, process: Any, store: dist.Store) -> None:
    """Wait until another process has joined the store."""
    while not store.check([f"joined {rank}"]):
        process.join(timeout=0.05)
        if process.exitcode is not None:
            raise RlaifFastError(_FAILED.format(rank))


def _other(work: Callable[[World, Any], Any], argument: Any, rank: int, size: int, port: int) -> None:
    """The life of a process that `launch` started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the others
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False, wait_for_workers=False)
    store.set(f"joined {rank}", "")
    try:
        with _group(rank, size, rank, store):
            work(World(rank, size), argument)
    except RlaifFastError as error:
        print(f"error: process {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


@contextlib.contextmanager
def _group(rank: int, size: int, local_rank: int, store: dist.Store | None) -> Iterator[None]:
    """The default process group while the block runs: gloo for the CPU, and NCCL where each process has a GPU."""
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"num_processes: process {local_rank} has no GPU, torch sees {torch.cuda.device_count()}; "
                "start at most one process a GPU"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    if store is not None:
        # The rendezvous is on this machine, and so is the traffic: the host's name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
