"""The reference as a row of the backend table: it runs everywhere and refuses nothing."""

from __future__ import annotations

import torch

from rlaif_fast.loss.reference.rank_penalty import rank_penalty

__all__ = ["rank_penalty", "supports", "unavailable"]


def unavailable() -> None:
    """Return None: plain PyTorch is always there."""


def supports(op: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> None:
    """Return None: every dtype, device and group size runs."""
