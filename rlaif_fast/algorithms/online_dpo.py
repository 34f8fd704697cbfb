"""Online DPO: the best response of each group against the worst, by the DPO loss (arXiv 2402.04792, 2305.18290)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlaif_fast import LossOutput, RankAdvantages, fused_linear_dpo_loss
from rlaif_fast.algorithms.preference import PreferenceAlgorithm, as_output
from rlaif_fast.algorithms.verdicts import Verdicts
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.oracle.pairs import best_and_worst


class OnlineDpo(PreferenceAlgorithm):
    """One pair per group; of responses that tie for best or worst, the first drawn. A group all tied has no pair."""

    def learns_from(self, ranking: Ranking) -> Sequence[int]:
        """The best response and the worst."""
        return best_and_worst(ranking.ranks) or ()

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """1 for the chosen response, -1 for the rejected one; only for the log, the loss does not use them."""
        ranks, members = verdicts.feedback, verdicts.members
        agreement = verdicts.agreement()
        best = ranks.masked_fill(~members, torch.iinfo(ranks.dtype).max).argmin(1, keepdim=True)
        worst = ranks.masked_fill(~members, -1).argmax(1, keepdim=True)
        signs = torch.zeros_like(verdicts.scores).scatter(1, best, 1.0).scatter(1, worst, -1.0)
        signs = signs.masked_fill(~agreement.has_signal[:, None], 0.0)
        return agreement._replace(advantages=verdicts.weigh(signs))

    def loss_inputs(self, verdicts: Verdicts) -> dict[str, Any]:
        """The weight of each pair."""
        return {"pair_weights": verdicts.weights}

    def loss(self, hidden: Tensor, weight: Tensor, token_ids: Tensor, **inputs: Any) -> LossOutput:
        """The DPO loss of the pairs, each best response before its worst; see `Algorithm.loss`."""
        found = fused_linear_dpo_loss(hidden, weight, token_ids, **self.arguments(inputs, 2))
        return as_output(found, len(inputs["lengths"]) // 2)
