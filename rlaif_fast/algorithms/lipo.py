"""LiPO-lambda: every pair of a group, weighed by what swapping it changes in the DCG (arXiv 2402.01878)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlaif_fast import LossOutput, RankAdvantages, fused_linear_lipo_loss, rank_advantages
from rlaif_fast.algorithms.preference import PreferenceAlgorithm, as_output
from rlaif_fast.algorithms.verdicts import Verdicts


class Lipo(PreferenceAlgorithm):
    """LambdaLoss on log-probabilities relative to the reference.

    The label of a response is its rate of wins in its group, ties half, in [0, 1]: the paper's labels where the ranker
    is sure of each comparison.
    """

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """The labels, centred, for the log; the loss makes weights of pairs from them and the policy's own order."""
        return centred_win_rates(verdicts)

    def loss_inputs(self, verdicts: Verdicts) -> dict[str, Any]:
        """The labels, who has one, and how much each group counts."""
        return {
            "labels": win_rates(verdicts),
            "judged": verdicts.judged,
            "group_weights": verdicts.weights,
        }

    def loss(self, hidden: Tensor, weight: Tensor, token_ids: Tensor, **inputs: Any) -> LossOutput:
        """The LiPO-lambda loss of the groups; see `Algorithm.loss`."""
        arguments = self.arguments(inputs, inputs["labels"].shape[1])
        return as_output(fused_linear_lipo_loss(hidden, weight, token_ids, **arguments))


def win_rates(verdicts: Verdicts) -> Tensor:
    """(N, G) share of the other judged responses of its group that each is ranked before, ties half; 0 unjudged."""
    ranks, members = verdicts.feedback, verdicts.members
    pairs = members[:, :, None] & members[:, None, :]
    better = (ranks[:, :, None] < ranks[:, None, :]) & pairs
    level = (ranks[:, :, None] == ranks[:, None, :]) & pairs  # the response itself included
    others = (members.sum(1, keepdim=True) - 1).clamp(min=1)
    wins = better.sum(2) + (level.sum(2) - 1) / 2
    return (wins / others).where(members, 0.0)


def centred_win_rates(verdicts: Verdicts) -> RankAdvantages:
    """The rates of wins against their mean in the group, and how far the policy's order agrees with the oracle's."""
    agreement = rank_advantages(
        verdicts.scores, verdicts.feedback, kind="oracle", judged=verdicts.judged, validate=False
    )
    rates = win_rates(verdicts)
    mean = rates.sum(1, keepdim=True) / verdicts.members.sum(1, keepdim=True).clamp(min=1)
    centred = (rates - mean).masked_fill(~agreement.has_signal[:, None], 0.0)
    return agreement._replace(advantages=verdicts.weigh(centred))
