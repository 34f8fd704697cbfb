"""GOPO: ranks alone, evenly spaced from +2 for the best to -2 for the worst (arXiv 2602.03876)."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from rlaif_fast import RankAdvantages, rank_advantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions


class Gopo(GroupAlgorithm):
    """A = 2 - 4 k / (G - 1) at position k = 0 .. G - 1; responses that tie share their positions' mean."""

    feedback: Feedback = "ranks"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """The advantage is fixed and never divided."""
        return "advantage", "penalty_weight", "scale"

    def advantages(
        self,
        policy_scores: Tensor,  # (N, G)
        feedback: Tensor,  # (N, G) ranks
    ) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        agreement = rank_advantages(policy_scores, feedback, kind="oracle")
        better = (feedback[:, None, :] < feedback[:, :, None]).sum(2)
        level = (feedback[:, None, :] == feedback[:, :, None]).sum(2)  # the response itself included
        position = better + (level - 1) / 2
        return agreement._replace(advantages=2 - 4 * position / (feedback.shape[1] - 1))
