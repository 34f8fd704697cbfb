"""The sigmoid DPO loss of pairs of responses from their log-probabilities.

    r_i  = beta (sum_t logp_it - sum_t ref_logp_it)                     implicit reward of a response
    loss = -mean over pairs of log sigmoid(r_chosen - r_rejected)

Letters: P pairs, B = 2 P responses (each chosen one before its rejected one), T tokens. Source: arXiv
2305.18290.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

PREFERENCE_STATS = ("margin", "accuracy", "reward_chosen", "reward_rejected")


def dpo_loss(
    logps: Tensor,  # (B, T) differentiable
    mask: Tensor,  # (B, T) bool
    ref_logps_sum: Tensor,  # (B,)
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the implicit rewards (B,), and the statistics in the order of PREFERENCE_STATS."""
    total = logps.where(mask, 0.0).sum(-1)
    rewards = beta * (total - ref_logps_sum.to(total.dtype))
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin = chosen - rejected
    pairs = max(1, len(margin))
    loss = -logsigmoid(margin).sum() / pairs
    wins = (margin > 0).to(margin.dtype)
    stats = torch.stack([x.detach().sum() / pairs for x in (margin, wins, chosen, rejected)])
    return loss, rewards.detach(), stats
