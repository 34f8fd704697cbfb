"""GOPO: only ranks, evenly spaced from +2 for the best to -2 for the worst (arXiv 2602.03876)."""

from __future__ import annotations

from collections.abc import Collection

from rlaif_fast import RankAdvantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.verdicts import Verdicts


class Gopo(GroupAlgorithm):
    """A = 2 - 4 k / (G - 1) at position k = 0 .. G - 1; responses that tie share their positions' mean."""

    feedback: Feedback = "ranks"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """The advantage is fixed and never divided."""
        return "advantage", "penalty_weight", "scale"

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        agreement = verdicts.agreement()
        spaced = (4 * verdicts.win_rates() - 2).masked_fill(~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=verdicts.weigh(spaced))
