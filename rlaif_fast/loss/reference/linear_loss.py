"""Log-probability and entropy of chosen tokens from hidden states: logits = hidden @ weight.T + bias.

Letters: B responses, T tokens, M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import Head, Padding
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


def padded_logps(
    hidden: Tensor,  # (B, T, H), or (M, H) with lengths
    head: Head,
    token_ids: Tensor,  # (B, T) or (M,)
    lengths: Tensor | None,  # (B,)
) -> tuple[Tensor, Tensor, Padding | None]:
    """Return logps and entropy (B, T), and how packed tokens were padded."""
    logps, entropy = linear_logps(hidden, head, token_ids.long())
    if lengths is None:
        return logps, entropy, None
    padding = Padding(lengths, hidden.shape[0])
    return padding.pad(logps), padding.pad(entropy), padding
