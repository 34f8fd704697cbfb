"""RLRR: relative rewards, linear in the rank from 1 for the best to 0 for the worst (arXiv 2601.23058)."""

from __future__ import annotations

from collections.abc import Collection

from rlaif_fast import RankAdvantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.verdicts import Verdicts


class Rlrr(GroupAlgorithm):
    """A = s - mean s, with s_i = (r_max - r_i) / (r_max - 1) over the levels r = 1 .. r_max of the group.

    This is the paper's reward for tasks without a verifier. With one, the paper adds the rank to the verifier's 0 or 1,
    which a ranking lacks, and bounds advantages by that verdict. Tied responses share a level. The paper leaves open
    whether to divide by the standard deviation: `scale`. Without ties the advantages are those of GOPO up to a factor.
    """

    feedback: Feedback = "ranks"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """The advantage is fixed."""
        return "advantage", "penalty_weight"

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        members = verdicts.members
        agreement = verdicts.agreement()
        worse = verdicts.levels_below().to(verdicts.scores.dtype)
        rewards = worse / worse.amax(1, keepdim=True).clamp(min=1)
        count = members.sum(1, keepdim=True).clamp(min=1)
        centred = (rewards - rewards.sum(1, keepdim=True) / count).where(members, 0.0)
        if self.options.scale == "group":
            spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
            centred = centred / spread.where(spread > 0, 1.0)
        centred = centred.masked_fill(~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=verdicts.weigh(centred))
