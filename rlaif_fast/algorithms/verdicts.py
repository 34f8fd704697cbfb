"""An oracle's verdicts on some groups, as the tensors that advantages are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlaif_fast import RankAdvantages, rank_advantages


@dataclass(frozen=True)
class Verdicts:
    """The oracle's verdicts on N groups, and the policy's own order of them, as tensors on the policy's device.

    Attributes:
        feedback: (N, G) the oracle's ranks (int64) or scores (float32), as the algorithm needs; 0 where not judged.
        judged: (N, G) bool; None if every response was judged.
        weights: (N,) float32, the oracle's confidence; None if it does not count.
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
        """How far the policy's order agrees with the oracle's ranks, with the advantages of `oracle`."""
        return rank_advantages(self.scores, self.feedback, kind="oracle", judged=self.judged, validate=False)

    def win_rates(self) -> Tensor:
        """(N, G) share of its group's other judged responses that each one beats, ties half; 0 if not judged."""
        ranks, members = self.feedback, self.members
        pairs = members[:, :, None] & members[:, None, :]
        better = (ranks[:, :, None] < ranks[:, None, :]) & pairs
        level = (ranks[:, :, None] == ranks[:, None, :]) & pairs  # including the response itself
        others = (members.sum(1, keepdim=True) - 1).clamp(min=1)
        wins = better.sum(2) + (level.sum(2) - 1) / 2
        return (wins / others).where(members, 0.0)

    def centred_win_rates(self) -> RankAdvantages:
        """Win rates minus their mean in the group, with the agreement of the policy's order."""
        agreement, rates = self.agreement(), self.win_rates()
        mean = rates.sum(1, keepdim=True) / self.members.sum(1, keepdim=True).clamp(min=1)
        centred = (rates - mean).masked_fill(~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=self.weigh(centred))

    def levels_below(self) -> Tensor:
        """(N, G) how many distinct ranks of its group are worse than a response's; 0 if it was not judged."""
        ranks = self.feedback.masked_fill(~self.members, -1)
        ordered = ranks.sort(1).values
        is_first = ordered >= 0
        is_first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        worse = (ordered[:, None, :] > ranks[:, :, None]) & is_first[:, None, :]
        return worse.sum(2).where(self.members, 0)

    def weigh(self, advantages: Tensor) -> Tensor:
        """Advantages (N, G) times the weight of their group; 0 if a response was not judged."""
        if self.weights is not None:
            advantages = advantages * self.weights[:, None]
        return advantages if self.judged is None else advantages.where(self.judged, 0.0)
