"""Loads the compiled extension, which registers its operators under `torch.ops.rlaif_fast`."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def load() -> Any:
    """Import the extension.

    Returns:
        The module `rlaif_fast._C`, or the ImportError that says why it cannot be loaded.
    """
    try:
        return importlib.import_module("rlaif_fast._C")
    except ImportError as error:
        return error


def unavailable() -> str | None:
    """Return why the extension cannot run, or None."""
    module = load()
    if not isinstance(module, ImportError):
        return None
    if isinstance(module, ModuleNotFoundError):
        return "the extension rlaif_fast._C is not built (pip install . builds it; RLAIF_FAST_EXT=0 skips it)"
    return f"the extension rlaif_fast._C does not load (was it built for this torch?): {module}"
