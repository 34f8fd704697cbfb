"""What is written while the run goes on: copies of what it changes meanwhile, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


class Background:
    """Runs one function at a time, in a thread of its own. A process that ends by itself waits for the last."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[Any] | None = None

    def begin(self, function: Callable[[], Any]) -> None:
        """Run a function; `wait` comes first."""
        assert self._running is None
        self._running = self._thread.submit(function)

    def wait(self) -> None:
        """Wait until it has ended, and raise what it raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def copied(value: Any) -> Any:
    """A state of nested mappings and lists whose tensors are copies in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(part) for part in value)
    return value


@torch.no_grad()
def copied_weights(model: nn.Module, copy: Callable[[Tensor], Tensor] = copied) -> dict[str, Tensor]:
    """Copies of the weights in main memory, tied ones once; of LoRA, the adapters.

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
