"""Log-probability and entropy of chosen tokens from hidden states: logits = hidden @ weight.T + bias.

Letters: H hidden, V vocabulary; `...` is any leading shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import Head
from rlaif_fast.loss.reference.logits_loss import selective_log_softmax


def linear_logps(
    hidden: Tensor,  # (..., H)
    head: Head,
    token_ids: Tensor,  # (...)
) -> tuple[Tensor, Tensor]:
    """Return logps and entropy (...), in float32 or wider, with the logits materialised."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight, leaf = head.weight.to(wide), head.float32_weight
    if leaf is not None:
        weight = weight.detach() + (leaf - leaf.detach())  # the values of the one, the gradient of the other
    logits = hidden.to(wide) @ weight.t()
    if head.bias is not None:
        logits = logits + head.bias.to(wide)
    return selective_log_softmax(logits, token_ids, head.scaling)
