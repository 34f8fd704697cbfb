"""Our statistics under TRL's names, over all processes, as TRL counts them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MEANS = {"kl": "kl", "entropy": "entropy"}
CLIPPED = {
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clip_ratio/region_mean": "clip_ratio/region_mean",
}
EXTREMES = {"clip_ratio/low_min": torch.min, "clip_ratio/high_max": torch.max}
# losses that clip no ratio have no clipped share
OF_TYPE = {"cispo": {"clip_high": "cispo_clip_ratio"}, "sapo": {}}


def logged(stats: dict[str, Tensor], loss_type: str, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Return what TRL logs of a loss: means over the tokens of all processes, and extremes over responses; NaN without
    a token, which TRL leaves out of its means.

    Args:
        stats: Statistics of `LossOutput` in this process.
        loss_type: TRL's.
        gather: Returns a tensor with one number per process.
    """
    tokens = gather(stats["tokens"])
    names = MEANS | OF_TYPE.get(loss_type, CLIPPED)
    found = {}
    for ours, theirs in names.items():
        if ours in stats:
            total = gather(stats[ours]).masked_fill(tokens == 0, 0.0) * tokens
            found[theirs] = (total.sum() / tokens.sum().clamp(min=1)).item()
    if loss_type not in OF_TYPE:
        for name, extreme in EXTREMES.items():
            shares = gather(stats[name])[tokens > 0]  # leaves out processes without a token
            found[name] = extreme(shares).item() if len(shares) else math.nan
    return found
