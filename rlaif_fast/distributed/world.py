"""The processes of a run, seen from one of them: each takes its share of every step, all hold the same weights.

With one process every method is free and needs no process group. `distributed.launch` starts several.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlaif_fast.errors import Outage, RlaifFastError, UsageError, first_line, typed_line

T = TypeVar("T")

BUCKET_BYTES = 256 * 2**20  # of gradients that are averaged at once, in a buffer of this size


class ConnectionLost(RlaifFastError):
    """An exchange with the other processes failed, most often because one of them has ended."""


class SharedOutage(Outage):
    """An error of at least one process that all processes know of, so that they end together. Rank 0 reports it.

    Args:
        message: What went wrong.
        exit_code: That of the error: 2 where the input is wrong, else 1.
    """

    def __init__(self, message: str, exit_code: int = Outage.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _as_array(tensor: Tensor) -> tuple[Callable[[Any], Tensor], tuple[Any]]:
    """How a tensor is pickled: torch would pickle all of its storage, a hundred times slower for a few numbers."""
    return torch.from_numpy, (tensor.numpy(force=True),)


class World:
    """The processes that train together, seen from one of them.

    The first exchange waits until every process is there, so what comes before it need not wait.

    Attributes:
        rank: This process, 0 to size - 1. Rank 0 writes the run's folder.
        size: How many there are.
        local_size: How many of them are on this machine.
        expect_end: Called by a process that knows that the run ends: it is not interrupted from then on.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        connect: Callable[[], Any] | None = None,
        local_size: int | None = None,
        expect_end: Callable[[], Any] = lambda: None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_size = size if local_size is None else local_size
        self._connect = connect
        self.expect_end = expect_end

    def connect(self) -> None:
        """Wait until every process is there."""
        if self._connect is not None:
            connect, self._connect = self._connect, None
            with telling_lost_connections():
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

    def max(self, number: float) -> float:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64)
        with self._exchange():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()

    def gather(self, item: T) -> list[T]:
        """Everyone's `item`, by rank; it is pickled, its tensors as NumPy arrays (so not bfloat16)."""
        if self.size == 1:
            return [item]
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        pickler.dispatch_table = copyreg.dispatch_table | {Tensor: _as_array}
        pickler.dump(item)
        parts: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(parts, buffer.getvalue())
        return [item if rank == self.rank else pickle.loads(part) for rank, part in enumerate(parts)]

    def average_gradients(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        """Replace each gradient by its mean over the processes; a process that has none counts as zero.

        Args:
            parameters: Those whose gradients are averaged, the same in every process.
            bucket_bytes: Gradients are copied into buffers of at most this size, one after the other.
        """
        if self.size == 1:
            return
        for bucket in buckets(parameters, bucket_bytes):
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

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns in this process, once it is done in all; `work` itself may not exchange anything.

        Raises:
            Exception: What `work` raised, where this process is the only one.
            SharedOutage: `work` raised in any of several processes; all of them raise this.
        """
        if self.size == 1:
            return work()
        met: Exception | None = None
        try:
            result = work()
        except Exception as error:
            met = error
            if not isinstance(error, RlaifFastError):
                traceback.print_exception(error)  # now: once the others know, rank 0 ends this process
        if self.sum(met is not None)[0]:
            said = None if met is None else (typed_line(met), Outage.exit_code)
            if isinstance(met, RlaifFastError):
                said = str(met), met.exit_code
            rank, (message, exit_code) = next((rank, it) for rank, it in enumerate(self.gather(said)) if it)
            raise SharedOutage(f"process {rank}: {message}", exit_code) from met
        return result

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
        """Join the others if that has not happened yet, and run a block that exchanges something with them."""
        self.connect()
        with telling_lost_connections():
            yield


def buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
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
def telling_lost_connections() -> Iterator[None]:
    """Turn a RuntimeError into `ConnectionLost`; for a block that is an exchange and nothing else."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _lost(error) from error


@contextlib.contextmanager
def telling_lost_exchanges() -> Iterator[None]:
    """As `telling_lost_connections`, for any block: FSDP and checkpoints exchange by themselves."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_an_exchange(error):
            raise
        raise _lost(error) from error


def is_of_an_exchange(error: BaseException) -> bool:
    """Whether it comes from an exchange; errors of gloo have no type of their own, but name a line of its source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _lost(error: RuntimeError) -> ConnectionLost:
    return ConnectionLost(f"lost the connection to the other processes ({first_line(error)})")
