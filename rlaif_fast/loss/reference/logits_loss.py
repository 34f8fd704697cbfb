"""Log-probability and entropy of chosen tokens from logits.

    z = cap tanh(scale logits / cap) / temperature, or scale logits / temperature without a cap
    p = softmax(z),  logp = z_y - logsumexp(z),  H = logsumexp(z) - sum p z

Letters: V vocabulary; `...` is any leading shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss.inputs import Scaling


def cleared(x: Tensor, mask: Tensor | None) -> Tensor:  # (..., V), (...) bool
    """Return rows with 0 in those that are masked: autograd would carry NaN through a gradient of 0."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    scaling: Scaling = Scaling(),  # noqa: B008  immutable
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each chosen token and the entropy of its distribution, in float32 or
    wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scaling.softcap is not None:
        z = scaling.softcap * torch.tanh(z * (scaling.logit_scale / scaling.softcap))
    if scaling.temperatures is None:
        z = z * (scaling.factor / scaling.temperature)
    else:
        z = z * scaling.factor / scaling.temperatures.to(z.dtype).view(z.shape[:-1])[..., None]
    log_p = z.log_softmax(-1)
    logps = log_p.gather(-1, token_ids[..., None]).squeeze(-1)
    p = log_p.exp()
    # p log p tends to 0 where the logit is -inf, and so must its gradient.
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return logps, entropy
