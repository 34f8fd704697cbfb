"""Writes while the run continues, from copies of what the run changes meanwhile, one task at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


class Background:
    """Runs one function at a time in its own thread. A process that ends normally waits for the last one."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[Any] | None = None

    def begin(self, function: Callable[[], Any]) -> None:
        """Run a function; call `wait` first."""
        assert self._running is None
        self._running = self._thread.submit(function)

    def wait(self) -> None:
        """Wait until the function has ended, and raise what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def copied(value: Any) -> Any:
    """A copy of a state of nested mappings and lists, with its tensors copied to main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(part) for part in value)
    return value


@torch.no_grad()
def copied_weights(model: nn.Module, copy: Callable[[Tensor], Tensor] = copied) -> dict[str, Tensor]:
    """Copies of the weights in main memory, tied ones once; with LoRA, only the adapters.

    Args:
        model: The model.
        copy: Makes one copy.
    """
    adapters = hasattr(model, "peft_config")
    copies: dict[int, Tensor] = {}
    weights = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not adapters or value.requires_grad:
            if id(value) not in copies:
                copies[id(value)] = copy(value)
            weights[name] = copies[id(value)]
    return weights
