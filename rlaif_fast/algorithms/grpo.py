"""GRPO: scores, centred and divided by their standard deviation in the group (arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from rlaif_fast import RankAdvantages, rank_advantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions


class Grpo(GroupAlgorithm):
    """A = (R - mean R) / (std R + 1e-4) over each group."""

    feedback: Feedback = "scores"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """It knows no ranks; `advantage: zscore` is another name of it."""
        return ("penalty_weight",) if options.advantage == "zscore" else ("advantage", "penalty_weight")

    def advantages(
        self,
        policy_scores: Tensor,  # (N, G)
        feedback: Tensor,  # (N, G) scores
    ) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        return rank_advantages(policy_scores, feedback, kind="zscore", scale=self.options.scale)
