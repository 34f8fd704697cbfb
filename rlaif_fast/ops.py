"""The operators that run the kernels under autograd and torch.compile."""

from __future__ import annotations

from typing import Any


def _missing(*_: Any) -> Any:
    raise NotImplementedError("no kernel is installed")


rank_loss = selective_log_softmax = linear_logps = linear_loss = _missing
