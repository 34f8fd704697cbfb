"""Loads the compiled extension, which registers its operators under `torch.ops.rlaif_fast`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

# What the extension registers for the CPU.
OPERATORS = (
    "rank_penalty",
    "token_loss",
    "row_stats",
    "row_grad_out",
    "row_loss_",
    "compact_rows_",
    "decode_layer_",
)


@functools.cache
def load() -> Any:
    """Import the extension.

    Returns:
        The module `rlaif_fast._C`, or the ImportError that says why it cannot be loaded or used.
    """
    try:
        module = importlib.import_module("rlaif_fast._C")
    except ImportError as error:
        return error
    absent = [name for name in OPERATORS if not hasattr(torch.ops.rlaif_fast, name)]
    if absent:  # an editable install was updated and not built again
        return ImportError(f"it was built from older sources, which have no {absent[0]}; build it again")
    return module


def unavailable() -> str | None:
    """Return why the extension cannot run, or None."""
    module = load()
    if not isinstance(module, ImportError):
        return None
    if isinstance(module, ModuleNotFoundError):
        return "the extension rlaif_fast._C is not built (pip install . builds it; RLAIF_FAST_EXT=0 skips it)"
    return f"the extension rlaif_fast._C cannot be used (was it built for this torch?): {module}"
