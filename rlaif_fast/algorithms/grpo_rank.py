"""GRPO_rank: the oracle's order, weighed by how far the policy's own order is from it (arXiv 2510.02561)."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from rlaif_fast import RankAdvantages, rank_advantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions


class GrpoRank(GroupAlgorithm):
    """Advantages of one of the kinds "directed", "oracle", "paper" and "paper_swapped"; see `rank_advantages`."""

    feedback: Feedback = "ranks"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """Only a directed advantage weighs the penalty."""
        return () if options.advantage == "directed" else ("penalty_weight",)

    def advantages(
        self,
        policy_scores: Tensor,  # (N, G)
        feedback: Tensor,  # (N, G) ranks
    ) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        options = self.options
        return rank_advantages(
            policy_scores,
            feedback,
            kind=options.advantage,
            penalty_weight=options.penalty_weight,
            scale=options.scale,
        )
