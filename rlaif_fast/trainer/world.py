"""The processes of a run: each takes its share of every step, and all of them hold the same weights.

Under `torchrun` the processes are torchrun's. Elsewhere `launch` starts `num_processes` of them on this machine.
With one process every method is free and needs no process group.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlaif_fast.errors import RlaifFastError, UsageError

T = TypeVar("T")

# The other processes wait this long for one that makes data, ranks with a slow oracle or writes a checkpoint.
TIMEOUT = timedelta(hours=2)

BUCKET_BYTES = 256 * 2**20  # of gradients that are averaged at once, in a buffer of this size

# Rank 0 waits this many seconds for the end of the process that broke a connection, and has as long to notice a
# process that failed before it is interrupted.
PATIENCE = 10.0

_LOST = 76  # exit code of a process that ended because another one did: EX_PROTOCOL of sysexits.h


class ConnectionLost(RlaifFastError):
    """An exchange with the other processes failed, most often because one of them has ended."""


class World:
    """The processes that train together, seen from one of them.

    The first exchange waits until every process is there, so what comes before it need not wait.

    Attributes:
        rank: This process, 0 to size - 1. Rank 0 writes the run's folder.
        size: How many there are.
        local_size: How many of them are on this machine.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        connect: Callable[[], Any] | None = None,
        local_size: int | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_size = size if local_size is None else local_size
        self._connect = connect

    def connect(self) -> None:
        """Wait until every process is there."""
        if self._connect is not None:
            connect, self._connect = self._connect, None
            with _telling_lost_connections():
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
        total = torch.tensor(numbers, dtype=torch.float64)
        with self._exchange():
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, item: T) -> list[T]:
        """Everyone's `item`, by rank; it is pickled."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(items, item)
        return items

    def average_gradients(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        """Replace each gradient by its mean over the processes; a process that has none counts as zero.

        Args:
            parameters: Those whose gradients are averaged, the same in every process.
            bucket_bytes: Gradients are copied into buffers of at most this size, one after the other.
        """
        if self.size == 1:
            return
        for bucket in _buckets(parameters, bucket_bytes):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = [parameter.grad for parameter in bucket if parameter.grad is not None]
            if len(grads) == 1 and grads[0].is_contiguous():  # perhaps larger than a bucket: no copy at all
                with self._exchange():
                    dist.all_reduce(grads[0])
                grads[0] /= self.size
                continue
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            with self._exchange():
                dist.all_reduce(flat)
            flat /= self.size
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(mean.view_as(grad))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every process rank 0's values, in place."""
        if self.size == 1:
            return
        with self._exchange():
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

    def check_shared(self, folder: Path) -> None:
        """Refuse a folder that is not the same one on all machines of the run.

        Raises:
            UsageError: A process does not see what rank 0 writes there.
        """
        if self.local_size == self.size:
            return
        name, place = self.gather((f".seen-{uuid.uuid4().hex}", str(folder.resolve())))[0]
        proof = folder / name
        try:
            if self.is_main:
                proof.touch()
            self.barrier()
            blind = [rank for rank, seen in enumerate(self.gather(proof.exists())) if not seen]
        finally:
            if self.is_main:
                proof.unlink(missing_ok=True)
        if blind:
            raise UsageError(
                f"output_dir: process {blind[0]} does not see the folder {place} of process 0; "
                "with several machines it must be on a file system that all of them share"
            )

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Join the others if that has not happened, and run a block that exchanges something with them."""
        self.connect()
        with _telling_lost_connections():
            yield


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """The parameters by device and dtype, in lists of at most `bucket_bytes`; a larger parameter is alone."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for kind in by_kind.values():
        bucket: list[nn.Parameter] = []
        for parameter in kind:
            if bucket and sum(p.nbytes for p in bucket) + parameter.nbytes > bucket_bytes:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket


@contextlib.contextmanager
def _telling_lost_connections() -> Iterator[None]:
    """Tell a broken connection from the other errors of a process."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise ConnectionLost(f"lost the connection to the other processes ({reason})") from error


def rank_under_torchrun() -> int:
    """The rank torchrun gave this process; 0 elsewhere."""
    return int(os.environ.get("RANK", "0"))


def launch(
    work: Callable[[World, Any], T], argument: Any, num_processes: int, device: torch.device | None = None
) -> T:
    """Call `work(world, argument)` in every process of the run; return what it returned in this one.

    Under torchrun (RANK is set) this process is one of torchrun's. Otherwise this process is rank 0, and the others
    are started here and end with it.

    Args:
        work: An importable function; it runs in each process.
        argument: Its second argument; it is pickled.
        num_processes: Processes to start on this machine, this one counted; not used under torchrun.
        device: Where the work is done, each of several processes on a GPU of its own; None is the GPU where there
            is one.

    Raises:
        UsageError: There are several processes, and too few GPUs or `device` names one of them.
        RlaifFastError: Another process failed; it has printed why, unless it was killed.
    """
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        with _membership(rank, size, int(os.environ.get("LOCAL_RANK", rank)), device) as world:
            world.connect()  # torchrun started them together: none begins before rank 0 is ready
            return work(world, argument)
    if num_processes == 1:
        return work(World(), argument)
    _check_device(device, num_processes)
    store = dist.TCPStore(
        "127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False, timeout=TIMEOUT
    )
    context = torch.multiprocessing.get_context("spawn")
    others = _Others(
        [
            context.Process(
                target=_other, args=(work, argument, rank, num_processes, device, store.port), daemon=True
            )
            for rank in range(1, num_processes)
        ]
    )
    with others, _membership(0, num_processes, 0, device, store, others) as world, others.blamed():
        result = work(world, argument)
        world.connect()
        return result


class _Others:
    """The processes that `launch` started. A thread watches them until all have ended.

    As a context manager it starts them, and leaves none behind.

    Args:
        processes: Those of rank 1 and up, not started yet.
    """

    def __init__(self, processes: Sequence[Any]) -> None:
        self._processes = processes
        self._exit_codes: dict[int, int] = {}  # by rank, in the order in which they ended
        self._changed = threading.Condition()
        self._over = threading.Event()  # rank 0 has done its part, or knows that it cannot
        self._main = threading.current_thread()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Others:
        for process in self._processes:
            process.start()
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._watcher.join(timeout=6 * PATIENCE)  # they have done their part and are about to end
        finally:
            self.stop()

    def stop(self) -> None:
        """End those that are still there."""
        self._over.set()
        for process in self._processes:
            process.terminate()
        self._watcher.join(timeout=PATIENCE)
        for process in self._processes:
            process.kill()
        self._watcher.join(timeout=PATIENCE)

    def wait_until_joined(self, store: dist.Store) -> None:
        """Wait until all are about to join the group; one that ends before never will."""
        for rank in range(1, len(self._processes) + 1):
            while not store.check([f"joined {rank}"]):
                with self._changed:
                    self._changed.wait(timeout=0.05)
                if rank in self._exit_codes:
                    raise ConnectionLost(f"process {rank} of the run ended before its work began")

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Name the process that failed where the block breaks because of it, and end the others on any error.

        An error of this process's own stays as it is. That the others end before this process leaves the group
        keeps them from reporting a connection that they lost because of it.

        Raises:
            RlaifFastError: Another process failed before.
        """
        try:
            yield
        except BaseException as error:
            self._over.set()
            culprit = self._culprit(PATIENCE if isinstance(error, ConnectionLost) else 0.0)
            self.stop()
            if culprit is not None and isinstance(error, (ConnectionLost, KeyboardInterrupt)):
                raise RlaifFastError(culprit) from error
            raise
        self._over.set()

    def _culprit(self, patience: float = 0.0) -> str | None:
        """What is known of the first process that failed, waiting up to `patience` seconds for one.

        One that only lost its connection is named where no other failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failed(besides=_LOST), patience)
            ranks = self._failed(besides=_LOST) or self._failed()
            return _describe_end(ranks[0], self._exit_codes[ranks[0]]) if ranks else None

    def _failed(self, besides: int = 0) -> list[int]:
        """The ranks of those that failed, but for those with the exit code `besides`, in the order they ended."""
        return [rank for rank, code in self._exit_codes.items() if code not in (0, besides)]

    def _watch(self) -> None:
        """Note every end; see to it that rank 0 does not wait for a process that failed."""
        running: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(self._processes, 1)}
        insisting = False
        while running:
            for sentinel in wait(list(running)):
                rank = running.pop(sentinel)
                exit_code = _exit_code(self._processes[rank - 1])
                with self._changed:
                    self._exit_codes[rank] = exit_code
                    self._changed.notify_all()
            if self._failed() and not insisting:
                insisting = True
                threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        """Interrupt rank 0 where it does not notice a failure by itself; end it where it is stuck.

        A collective of gloo breaks when a process ends. One of NCCL goes on waiting on the GPU, and Python cannot
        interrupt who waits for it.
        """
        if self._over.wait(PATIENCE):
            return
        if self._main is threading.main_thread():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if self._over.wait(PATIENCE):
            return
        print(f"error: {self._culprit()}", file=sys.stderr, flush=True)
        for process in self._processes:
            process.kill()
        os._exit(RlaifFastError.exit_code)


def _exit_code(process: Any) -> int:
    """The exit code of a process that has ended; another thread may be about to take it from the system."""
    while process.exitcode is None:
        process.join(timeout=0.05)
    return process.exitcode


def _describe_end(rank: int, exit_code: int) -> str:
    """What is known of a process that failed."""
    if exit_code >= 0:
        return f"process {rank} of the run failed with exit code {exit_code}; its message is above"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"process {rank} of the run was ended by {name}{hint}"


@contextlib.contextmanager
def _membership(
    rank: int,
    size: int,
    local_rank: int,
    device: torch.device | None,
    store: dist.Store | None = None,
    others: _Others | None = None,
) -> Iterator[World]:
    """The world as one of several processes sees it; it joins their group at the first exchange."""
    _check_device(device, size)
    backend = _choose_backend(local_rank, device)

    def connect() -> None:
        if store is not None:
            store.set(f"joined {rank}", "")
        if others is not None:
            assert store is not None
            others.wait_until_joined(store)
        _join_group(backend, rank, size, store)

    try:
        yield World(rank, size, connect, _local_size(size) if store is None else size)
    except BaseException:
        _abandon_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def _local_size(size: int) -> int:
    """How many of torchrun's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size))


def _other(
    work: Callable[[World, Any], Any],
    argument: Any,
    rank: int,
    size: int,
    device: torch.device | None,
    port: int,
) -> None:
    """The life of a process that `launch` started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        store = dist.TCPStore(
            "127.0.0.1", port, size, is_master=False, wait_for_workers=False, timeout=TIMEOUT
        )
        with _membership(rank, size, rank, device, store) as world:
            try:
                work(world, argument)
                world.connect()
            except BaseException as error:
                _fail(rank, error)
    except BaseException as error:
        _fail(rank, error)


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, and end at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(_LOST)


def _fail(rank: int, error: BaseException) -> NoReturn:
    """Say what went wrong in this process and end it, without the leave that the others would have to wait for."""
    if isinstance(error, RlaifFastError):
        print(f"error: process {rank}: {error}", file=sys.stderr)
    else:
        print(f"error: process {rank}:", file=sys.stderr)
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, ConnectionLost):
        os._exit(_LOST)
    os._exit(error.exit_code if isinstance(error, RlaifFastError) else RlaifFastError.exit_code)


def _check_device(device: torch.device | None, processes: int) -> None:
    if processes > 1 and device is not None and device.type == "cuda" and device.index is not None:
        raise UsageError(
            f"device: {device} is one GPU, and each of {processes} processes needs its own; use --device cuda"
        )


def _choose_backend(local_rank: int, device: torch.device | None) -> str:
    """Gloo for the CPU, and NCCL where each process has a GPU, which is this process's from now on."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return "gloo"
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"num_processes: process {local_rank} has no GPU, torch sees {torch.cuda.device_count()}; "
            "start at most one process a GPU"
        )
    torch.cuda.set_device(local_rank)
    return "cpu:gloo,cuda:nccl"


def _join_group(backend: str, rank: int, size: int, store: dist.Store | None) -> None:
    """Make the default process group."""
    if store is not None:
        # The rendezvous is on this machine, and so is the traffic: the host's name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _abandon_group() -> None:
    """Leave the default process group, if there is one, without waiting long for processes that may be gone."""
    if dist.is_initialized():
        leave = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leave.start()
        leave.join(timeout=PATIENCE)
