"""GPU work of prefetching threads beside the computation: its own stream, pinned memory, no graph captures."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PATIENCE = 300.0  # longest wait of a capture in seconds: a thread may hang in the driver


class _Captures:
    """Lets graphs be captured while no other thread uses the GPU.

    Synchronising a device breaks a capture on it, in whichever thread. Decoders synchronise: NVDEC under DALI did on an
    H100. A thread inside may wait for another that is about to enter, so a waiting capture keeps no thread out. After
    PATIENCE the capture runs anyway: if it breaks, an error says so, while a run that hangs says nothing.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._capturing = False

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._capturing)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            if not self._changed.wait_for(lambda: not self._capturing and not self._inside, PATIENCE):
                log.warning("rollout: captured beside threads that have used the GPU for %g s", PATIENCE)
                self._changed.wait_for(lambda: not self._capturing)
            self._capturing = True
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._changed.notify_all()


_CAPTURES = _Captures()
# For a block that may synchronise the device: no graph is captured meanwhile.
no_captures = _CAPTURES.kept_out
# For a block that captures a graph: it waits for the `no_captures` blocks of other threads, and they wait for it.
capturing = _CAPTURES.alone


def numbered(device: torch.device) -> torch.device:
    """The device with an index. "cuda" alone means the current GPU, which in a new thread is always the first."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Queue the block's GPU work on its own stream, and wait for it at the end; elsewhere change nothing.

    The calling thread waits but the computation does not, so call it from a prefetching thread. After the block its
    results are complete and its inputs may be freed; pass the results to `used_here` before reading them.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    with no_captures():
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device, ready to be read; to a GPU it goes through pinned memory, `beside` other work."""
    if device.type != "cuda" or x.device.type == "cuda":
        return x.to(device)
    with beside(device):
        return x.pin_memory().to(device, non_blocking=True)


def used_here(x: Tensor) -> Tensor:
    """Return `x`; its memory is not reused before the current stream has read it."""
    if x.is_cuda:
        x.record_stream(torch.cuda.current_stream(x.device))
    return x


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
