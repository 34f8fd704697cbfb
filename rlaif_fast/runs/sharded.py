"""Checkpoints of sharded weights: each process writes its part, and any number of processes reads them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.tensor import DTensor

from rlaif_fast.distributed.world import is_of_an_exchange
from rlaif_fast.errors import UsageError, typed_line
from rlaif_fast.policy.shard import whole
from rlaif_fast.runs.background import copied_weights

FOLDER = "shards"


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes hold the weights together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights as one process would hold them, on the CPU, gathered one by one; with LoRA, the adapters.

    All processes call it; only process 0 gets the result.
    """
    main = dist.get_rank() == 0

    def gathered(value: Tensor) -> Tensor:
        full = whole(value.detach())
        return full.cpu() if main else full.new_empty(0)

    weights = copied_weights(model, gathered)
    return weights if main else {}


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what the processes hold together into a checkpoint; all of them call it.

    Raises:
        Exception: An error of one process, raised in all of them.
    """
    with _raising_causes():
        checkpoint.save(dict(tensors), checkpoint_id=folder / FOLDER)


def begin_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> Callable[[], None]:
    """Copy what the processes hold together and write it in the background; all call this, and its result.

    Args:
        folder: The checkpoint.
        tensors: What `write_shards` takes.
        group: All processes, in a group apart from the run's own exchanges.

    Returns:
        A function that waits until it is written, and raises like `write_shards`.
    """
    done = checkpoint.async_save(dict(tensors), checkpoint_id=folder / FOLDER, process_group=group)
    assert isinstance(done, Future)

    def wait() -> None:
        with _raising_causes():
            done.result()

    return wait


@contextlib.contextmanager
def _raising_causes() -> Iterator[None]:
    """Raise a process's own error instead of torch's report of it, which is no `Exception`."""
    try:
        yield
    except checkpoint.CheckpointException as report:
        raise _cause(report) from None


def _cause(report: checkpoint.CheckpointException) -> BaseException:
    cause, _ = next(iter(report.failures.values()))
    return cause


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or sharded over any number of processes, from a checkpoint.

    Raises:
        UsageError: The checkpoint has none of them, or not all.
    """
    if not (folder / FOLDER).is_dir():
        raise UsageError(
            f"{folder} was written without sharding, and a sharded run cannot go on from it; add --sharding none"
        )
    try:
        with warnings.catch_warnings():
            # One process reads everything, on purpose.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            checkpoint.load(dict(tensors), checkpoint_id=folder / FOLDER, no_dist=not dist.is_initialized())
    except (checkpoint.CheckpointException, RuntimeError, ValueError) as error:
        cause = _cause(error) if isinstance(error, checkpoint.CheckpointException) else error
        if is_of_an_exchange(cause):
            raise cause from None
        raise UsageError(f"{folder / FOLDER} does not fit what is trained: {typed_line(cause)}") from error
