"""Features of deeper levels of the vision tower, added between the layers of the decoder.

transformers finds their places by a mask; reading its true entries means a device sync at every level. Here known
places are used directly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def install(decoder: Any) -> None:
    """Let a decoder accept places for `visual_pos_masks`; masks work as before."""
    own = getattr(decoder, "_deepstack_process", None)
    if own is not None and not isinstance(own, partial):
        decoder._deepstack_process = partial(_add, own)


def _add(
    own: Callable[..., Tensor],
    hidden: Tensor,  # (1, S, H)
    places: Tensor,  # (F,) int64, or a mask (1, S)
    features: Tensor,  # (F, H)
) -> Tensor:
    if places.dtype == torch.bool:
        return own(hidden, places, features)
    return hidden.index_add(1, places, features[None].to(hidden.dtype))
