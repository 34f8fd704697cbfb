"""The maths in plain PyTorch: what every kernel is tested against, and what runs where no kernel does."""

from rlaif_fast.loss.reference.linear_loss import linear_logps
from rlaif_fast.loss.reference.logits_loss import cleared, selective_log_softmax
from rlaif_fast.loss.reference.rank_loss import TokenLoss, policy_scores, rank_loss
from rlaif_fast.loss.reference.rank_penalty import rank_penalty

__all__ = [
    "TokenLoss",
    "cleared",
    "linear_logps",
    "policy_scores",
    "rank_loss",
    "rank_penalty",
    "selective_log_softmax",
]
