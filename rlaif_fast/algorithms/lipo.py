"""LiPO-lambda: every pair of a group, weighted by how much swapping it changes the DCG (arXiv 2402.01878)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlaif_fast import LossOutput, RankAdvantages, fused_linear_lipo_loss
from rlaif_fast.algorithms.preference import PreferenceAlgorithm, as_output
from rlaif_fast.algorithms.verdicts import Verdicts
from rlaif_fast.loss.reference.preference import ordered_pairs


class Lipo(PreferenceAlgorithm):
    """LambdaLoss on log-probabilities relative to the reference.

    A response's label is its win rate in its group, in [0, 1], with ties as half: the paper's labels if the ranker is
    sure of each comparison.
    """

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """The centred labels, for the log; the loss makes pair weights from the labels and the policy's own order."""
        return verdicts.centred_win_rates()

    def loss_inputs(self, verdicts: Verdicts) -> dict[str, Any]:
        """The labels, which responses have one, and the weight of each group."""
        return {
            "labels": verdicts.win_rates(),
            "judged": verdicts.judged,
            "group_weights": verdicts.weights,
        }

    def loss(self, hidden: Tensor, weight: Tensor, token_ids: Tensor, **inputs: Any) -> LossOutput:
        """The LiPO-lambda loss of the groups; see `Algorithm.loss`."""
        arguments = self.arguments(inputs, inputs["labels"].shape[1])
        pairs = ordered_pairs(inputs["labels"], inputs["judged"])
        return as_output(fused_linear_lipo_loss(hidden, weight, token_ids, **arguments), pairs.sum())
