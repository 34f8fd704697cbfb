"""What an oracle said of some groups, as the tensors that advantages are made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlaif_fast import RankAdvantages, rank_advantages


@dataclass(frozen=True)
class Verdicts:
    """What the oracle said of N groups, and the policy's own order of them, as tensors on the policy's device.

    Attributes:
        feedback: (N, G) the oracle's ranks (int64) or scores (float32), as the algorithm needs; 0 where not judged.
        judged: (N, G) bool; None where every response was judged.
        weights: (N,) float32, the oracle's confidence; None where it does not count.
        scores: (N, G) float32, the policy's own score of each response; higher is more likely.
    """

    feedback: Tensor
    judged: Tensor | None
    weights: Tensor | None
    scores: Tensor

    @property
    def members(self) -> Tensor:
        """(N, G) bool, the judged responses."""
        if self.judged is None:
            return torch.ones_like(self.feedback, dtype=torch.bool)
        return self.judged

    def agreement(self) -> RankAdvantages:
        """What the policy's order has in common with the oracle's ranks, with the advantages of `oracle`."""
        return rank_advantages(self.scores, self.feedback, kind="oracle", judged=self.judged, validate=False)

    def weigh(self, advantages: Tensor) -> Tensor:
        """Advantages (N, G) times the weight of their group, 0 where a response was not judged."""
        if self.weights is not None:
            advantages = advantages * self.weights[:, None]
        return advantages if self.judged is None else advantages.where(self.judged, 0.0)
