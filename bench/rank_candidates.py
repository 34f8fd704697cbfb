"""Uses of ranks that `rank_uses.py` predicts to be ahead, as algorithms: `--algorithm bench.rank_candidates:Levels`.

In training runs they were not ahead (docs/comparison.md), so they are not part of the package.

Both give each level of the group's order the gain of GRPO_rank and divide by nothing. Equal responses then share one
place, however often one was drawn, so the best stands as far above the rest in every group; `grpo_rank` spends a place
on each response and divides by the group's root mean square, which makes a group of seven alike and one other as loud
as one that is evenly split.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from rlaif_fast import RankAdvantages
from rlaif_fast.algorithms import AlgorithmOptions, GroupAlgorithm, Verdicts
from rlaif_fast.algorithms.base import Feedback


class Levels(GroupAlgorithm):
    """A = 4 (g(k) - mean g) with g(k) = 1 / ((1 + k) log2(2 + k)) at level k = 0, 1, ... of the distinct ranks.

    The factor makes the mean square over groups about 1, as that of a divided group, so that the KL weighs alike.
    """

    feedback: Feedback = "ranks"
    size = 4.0

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """The advantage is fixed and never divided."""
        return "advantage", "penalty_weight", "scale"

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        members = verdicts.members
        agreement = verdicts.agreement()
        below = verdicts.levels_below()
        level = (below.amax(1, keepdim=True) - below).to(verdicts.scores.dtype)
        gains = (1 / ((1 + level) * torch.log2(2 + level))).where(members, 0.0)
        centred = gains - gains.sum(1, keepdim=True) / members.sum(1, keepdim=True).clamp(min=1)
        advantages = self.size * centred * self.trust(level, members)
        advantages = advantages.masked_fill(~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=verdicts.weigh(advantages))

    def trust(self, level: Tensor, members: Tensor) -> Tensor | float:
        """The weight of each group: (N, 1), or one number."""
        return 1.0


class TrustedLevels(Levels):
    """`Levels` times m / (m + 1), m the number of responses on the best level (and 5 in place of 4).

    When a noisy oracle puts an answer first, it is more often wrong if the policy gave that answer once than if it gave
    it often.
    """

    size = 5.0

    def trust(self, level: Tensor, members: Tensor) -> Tensor:
        """See `Levels.trust`."""
        best = ((level == 0) & members).sum(1, keepdim=True)
        return best / (best + 1)
