"""ODRPO: a graded verdict as a series of yes-or-no verdicts, each normalised separately (arXiv 2605.12667)."""

from __future__ import annotations

from collections.abc import Collection

import torch

from rlaif_fast import RankAdvantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.verdicts import Verdicts


class Odrpo(GroupAlgorithm):
    """A_i = sum over thresholds k of (1[level_i >= k] - p_k) / sqrt(p_k (1 - p_k)), p_k the share that reaches k.

    The paper's ordinal decomposition with GRPO's estimator at each threshold. The levels are the distinct ranks of the
    group, as a ranking has no scale of its own: L levels give L - 1 thresholds.
    """

    feedback: Feedback = "ranks"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """The advantage is fixed and normalised at each threshold."""
        return "advantage", "penalty_weight", "scale"

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        members = verdicts.members
        agreement = verdicts.agreement()
        level = verdicts.levels_below()  # (N, G)
        thresholds = torch.arange(1, level.shape[1], device=level.device)
        reached = ((level[:, None, :] >= thresholds[:, None]) & members[:, None, :]).to(verdicts.scores.dtype)
        share = reached.sum(2, keepdim=True) / members.sum(1).clamp(min=1)[:, None, None]  # (N, G - 1, 1)
        spread = (share * (1 - share)).sqrt()
        parts = (reached - share) / spread.where(spread > 0, 1.0)
        total = parts.masked_fill(spread == 0, 0.0).sum(1)
        total = total.masked_fill(~members | ~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=verdicts.weigh(total))
