"""Frames to a GPU beside what it computes: through pinned memory, on a stream of its own."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on the device, ready to be read.

    To a GPU it travels through pinned memory on a stream of its own. The calling thread waits for the copy and no
    computation does, so call it from a thread that prefetches, and `used_here` where the copy is read.
    """
    if device.type != "cuda" or x.device.type == "cuda":
        return x.to(device)
    stream = _stream(device)
    with torch.cuda.stream(stream):
        moved = x.pin_memory().to(device, non_blocking=True)
    stream.synchronize()
    return moved


def used_here(x: Tensor) -> Tensor:
    """Return `x`, whose memory now stays until the present stream has read it."""
    if x.is_cuda:
        x.record_stream(torch.cuda.current_stream(x.device))
    return x


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
