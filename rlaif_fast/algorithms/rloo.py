"""RLOO: scores against the mean score of the other responses (arXiv 2402.14740)."""

from __future__ import annotations

from collections.abc import Collection

from rlaif_fast import RankAdvantages, rank_advantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.verdicts import Verdicts


class Rloo(GroupAlgorithm):
    """A_i = R_i - mean of R_j over j != i: unbiased, in the unit of the scores."""

    feedback: Feedback = "scores"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """The advantage is fixed and never divided."""
        return "advantage", "penalty_weight", "scale"

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        rewards, members = verdicts.feedback, verdicts.members
        agreement = rank_advantages(
            verdicts.scores, rewards, kind="zscore", judged=verdicts.judged, validate=False
        )
        judged = rewards.where(members, 0.0)
        others = (judged.sum(1, keepdim=True) - judged) / (members.sum(1, keepdim=True) - 1).clamp(min=1)
        advantages = (rewards - others).masked_fill(~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=verdicts.weigh(advantages))
