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

    def win_rates(self) -> Tensor:
        """(N, G) share of the other judged responses of its group that each is ranked before, ties half; 0 unjudged."""
        ranks, members = self.feedback, self.members
        pairs = members[:, :, None] & members[:, None, :]
        better = (ranks[:, :, None] < ranks[:, None, :]) & pairs
        level = (ranks[:, :, None] == ranks[:, None, :]) & pairs  # the response itself included
        others = (members.sum(1, keepdim=True) - 1).clamp(min=1)
        wins = better.sum(2) + (level.sum(2) - 1) / 2
        return (wins / others).where(members, 0.0)

    def centred_win_rates(self) -> RankAdvantages:
        """The rates of wins against their mean in the group, beside how far the policy's order agrees."""
        agreement, rates = self.agreement(), self.win_rates()
        mean = rates.sum(1, keepdim=True) / self.members.sum(1, keepdim=True).clamp(min=1)
        centred = (rates - mean).masked_fill(~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=self.weigh(centred))

    def levels_below(self) -> Tensor:
        """(N, G) how many distinct ranks of its group are worse than a response's; 0 where it was not judged."""
        ranks = self.feedback.masked_fill(~self.members, -1)
        ordered = ranks.sort(1).values
        is_first = ordered >= 0
        is_first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        worse = (ordered[:, None, :] > ranks[:, :, None]) & is_first[:, None, :]
        return worse.sum(2).where(self.members, 0)

    def weigh(self, advantages: Tensor) -> Tensor:
        """Advantages (N, G) times the weight of their group, 0 where a response was not judged."""
        if self.weights is not None:
            advantages = advantages * self.weights[:, None]
        return advantages if self.judged is None else advantages.where(self.judged, 0.0)
