"""Log-probability and entropy of chosen tokens from hidden states: logits = hidden @ weight.T + bias.

Letters: M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss.reference.logits_loss import selective_log_softmax


def linear_logps(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    token_ids: Tensor,  # (M,)
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return logps and entropy (M,), in float32 or wider, with the logits materialised."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).t()
    if bias is not None:
        logits = logits + bias.to(wide)
    return selective_log_softmax(logits, token_ids, temperature)
