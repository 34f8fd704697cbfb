"""How the processes of a run are started, watched and ended.

Under `torchrun` they are torchrun's. Elsewhere `launch` starts `num_processes` of them on this machine, names the one
that failed first, and leaves none behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from rlaif_fast.distributed import child
from rlaif_fast.distributed.world import ConnectionLost, SharedOutage, World, telling_lost_exchanges
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.termination import EXIT_CODE, Terminated

T = TypeVar("T")

# The other processes wait this long for one that makes data, ranks with a slow oracle or writes a checkpoint.
TIMEOUT = timedelta(hours=2)

# Rank 0 waits this many seconds for the end of the process that broke a connection, and has as long to notice a
# process that failed before it is interrupted.
PATIENCE = 10.0


class RankZeroFirst:
    """Lets rank 0 prepare a run's folder before the other processes of torchrun look at it.

    Without torchrun there is only one process at this point, rank 0.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self._store: dist.Store | None = None
        if under_torchrun():
            self._store = dist.PrefixStore("rank zero first", _store_of_torchrun())

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Rank 0 does the block at once, the others once it has done so; where it fails, torchrun ends them."""
        if self._store is not None and self.rank != 0:
            self._store.wait(["ready"], TIMEOUT)
        yield
        if self._store is not None and self.rank == 0:
            self._store.set("ready", "")


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _store_of_torchrun() -> dist.Store:
    """The store that torchrun's processes meet in. After a restart it still holds the keys of the earlier processes."""
    rendezvous, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    # Each of several agents counts its own restarts.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    return dist.PrefixStore(f"restart {restarts}", rendezvous)


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
    if under_torchrun():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        with _membership(rank, size, int(os.environ.get("LOCAL_RANK", rank)), device) as world:
            world.connect()  # torchrun started them together: none begins before rank 0 is ready
            try:
                with telling_lost_exchanges():
                    return work(world, argument)
            except SharedOutage:
                if rank != 0:
                    _leave_to_rank_0(world)
                raise
    if num_processes == 1:
        return work(World(), argument)
    _check_device(device, num_processes)
    store = dist.TCPStore(
        "127.0.0.1", 0, num_processes, is_master=True, wait_for_workers=False, timeout=TIMEOUT
    )
    context = torch.multiprocessing.get_context("spawn")
    calls = [
        (_other, work, argument, rank, num_processes, device, store.port) for rank in range(1, num_processes)
    ]
    others = _Others(
        [
            context.Process(target=child.run, args=(bytes(ForkingPickler.dumps(call)),), daemon=True)
            for call in calls
        ]
    )
    with others, _membership(0, num_processes, 0, device, store, others) as world, others.blamed():
        with telling_lost_exchanges():
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
        self._ignores_interrupts = False
        self._insisting = False
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Others:
        if self._main is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._on_interrupt)  # background jobs ignore it; `_insist` needs it
            self._ignores_interrupts = True
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
            if self._ignores_interrupts:
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _on_interrupt(self, *_: object) -> None:
        if self._insisting:
            raise KeyboardInterrupt

    def expect_end(self) -> None:
        """Rank 0 knows that the run ends, and may take its time to save what it has."""
        self._over.set()

    def stop(self) -> None:
        """End those that are still there."""
        self._over.set()
        for process in self._processes:
            process.kill()  # rank 0 alone writes, so nothing of theirs is lost; SIGTERM would let them finish a step
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

        An error of this process's own stays as it is. The others end first, or they would report spurious lost
        connections.

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

        A process that only lost its connection is named last, where no other failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failed(besides=child.LOST), patience)
            ranks = self._failed(besides=child.LOST) or self._failed()
            return _describe_end(ranks[0], self._exit_codes[ranks[0]]) if ranks else None

    def _failed(self, besides: int = 0) -> list[int]:
        """The ranks that failed, except those with the exit code `besides`, in the order in which they ended."""
        return [rank for rank, code in self._exit_codes.items() if code not in (0, besides)]

    def _watch(self) -> None:
        """Record every exit; make sure that rank 0 does not wait for a process that failed."""
        running: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(self._processes, 1)}
        insists = False
        while running:
            for sentinel in wait(list(running)):
                rank = running.pop(sentinel)
                exit_code = _exit_code(self._processes[rank - 1])
                with self._changed:
                    self._exit_codes[rank] = exit_code
                    self._changed.notify_all()
            if self._failed() and not insists:
                insists = True
                threading.Thread(target=self._insist, daemon=True).start()

    def _insist(self) -> None:
        """Interrupt rank 0 where it does not notice a failure by itself; end it where it is stuck.

        A collective of gloo breaks when a process ends. One of NCCL goes on waiting on the GPU, and Python cannot
        interrupt a thread that waits for it.
        """
        if self._over.wait(PATIENCE):
            return
        self._insisting = True
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
    if exit_code == EXIT_CODE:
        return f"process {rank} of the run was ended by SIGTERM"
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
        local_size = _local_size(size) if store is None else size
        yield World(rank, size, connect, local_size, *([] if others is None else [others.expect_end]))
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
    """Run the work of a process that `launch` started."""
    try:
        store = dist.TCPStore(
            "127.0.0.1", port, size, is_master=False, wait_for_workers=False, timeout=TIMEOUT
        )
        with _membership(rank, size, rank, device, store) as world:
            try:
                with telling_lost_exchanges():
                    work(world, argument)
                world.connect()
            except SharedOutage:
                _leave_to_rank_0(world)
            except BaseException as error:
                _fail(rank, error)
    except BaseException as error:
        _fail(rank, error)


def _leave_to_rank_0(world: World) -> NoReturn:
    """Let rank 0 report why all processes end, and end this one where rank 0 does not."""
    with contextlib.suppress(ConnectionLost):
        world.barrier()  # rank 0 does not come: it leaves
    time.sleep(PATIENCE)  # else torchrun would end rank 0 before it has reported
    os._exit(SharedOutage.exit_code)


def _fail(rank: int, error: BaseException) -> NoReturn:
    """Report what went wrong in this process and end it at once, without leaving the group, which waits for others."""
    if isinstance(error, Terminated):
        os._exit(EXIT_CODE)
    if isinstance(error, RlaifFastError):
        print(f"error: process {rank}: {error}", file=sys.stderr)
    else:
        print(f"error: process {rank}:", file=sys.stderr)
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, ConnectionLost):
        os._exit(child.LOST)
    os._exit(error.exit_code if isinstance(error, RlaifFastError) else RlaifFastError.exit_code)


def _check_device(device: torch.device | None, processes: int) -> None:
    if processes > 1 and device is not None and device.type == "cuda" and device.index is not None:
        raise UsageError(
            f"device: {device} is one GPU, and each of {processes} processes needs its own; use --device cuda"
        )


def _choose_backend(local_rank: int, device: torch.device | None) -> str:
    """Return gloo for the CPU, and NCCL too where each process has a GPU, which becomes the current device."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return "gloo"
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"num_processes: process {local_rank} has no GPU, torch sees {torch.cuda.device_count()}; "
            "start at most one process a GPU, or set LOCAL_RANK=0 where each sees one of its own alone (srun)"
        )
    torch.cuda.set_device(local_rank)
    return "cpu:gloo,cuda:nccl"


def _join_group(backend: str, rank: int, size: int, store: dist.Store | None) -> None:
    """Make the default process group."""
    if store is not None:
        # The rendezvous is on this machine, and so is the traffic: the host's name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = _store_of_torchrun() if store is None else store
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _abandon_group() -> None:
    """Leave the default process group, if there is one, without waiting long for processes that may be gone."""
    if dist.is_initialized():
        leave = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leave.start()
        leave.join(timeout=PATIENCE)
