"""GPU work of threads that prefetch, beside what is computed: its own stream, pinned memory, no captures meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds that a capture waits: a driver may never answer a thread


class _Captures:
    """Lets captures of graphs run while no other thread uses the GPU.

    Whatever synchronises a device breaks a capture on it, in any thread. Decoders do: NVDEC under DALI did on an H100.
    A thread inside may wait for another that is about to come in, so a capture that waits keeps nobody out. One that
    has waited for PATIENCE goes on all the same: it may break, which is told, and a run that hangs says nothing.
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
# The block may synchronise the device: no graph is captured meanwhile.
no_captures = _CAPTURES.kept_out
# The block captures a graph: it waits for the blocks of other threads, and they for it.
capturing = _CAPTURES.alone


def numbered(device: torch.device) -> torch.device:
    """The device with its number. Without one it is the current GPU, and that is the first one in any new thread."""
    nameless = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if nameless else device


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Queue the block's work on a GPU on a stream of its own, and wait for it at the end; elsewhere change nothing.

    The calling thread waits and no computation does, so call it from a thread that prefetches. What the block makes is
    whole behind it, and what it read may be freed; `used_here` comes before its results are read.
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
    """Return `x` on the device, ready to be read; to a GPU it travels through pinned memory, `beside` the rest."""
    if device.type != "cuda" or x.device.type == "cuda":
        return x.to(device)
    with beside(device):
        return x.pin_memory().to(device, non_blocking=True)


def used_here(x: Tensor) -> Tensor:
    """Return `x`, whose memory now stays until the present stream has read it."""
    if x.is_cuda:
        x.record_stream(torch.cuda.current_stream(x.device))
    return x


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
