"""RLOO: scores against the mean score of the other responses (arXiv 2402.14740)."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from rlaif_fast import RankAdvantages, rank_advantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions


class Rloo(GroupAlgorithm):
    """A_i = R_i - mean of R_j over j != i: unbiased, in the unit of the scores."""

    feedback: Feedback = "scores"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """The advantage is fixed and never divided."""
        return "advantage", "penalty_weight", "scale"

    def advantages(
        self,
        policy_scores: Tensor,  # (N, G)
        feedback: Tensor,  # (N, G) scores
    ) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        agreement = rank_advantages(policy_scores, feedback, kind="zscore")
        others = (feedback.sum(1, keepdim=True) - feedback) / (feedback.shape[1] - 1)
        advantages = (feedback - others).masked_fill(~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=advantages)
