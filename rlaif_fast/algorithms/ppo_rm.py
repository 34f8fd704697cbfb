"""PPO on a reward model's scores: the pipeline that rankings without a reward model replace (arXiv 2203.02155)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rlaif_fast import RankAdvantages
from rlaif_fast.algorithms.base import Feedback, GroupAlgorithm, MakeUpdater
from rlaif_fast.algorithms.critic import RewardAndValue
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.verdicts import Verdicts
from rlaif_fast.distributed.world import World
from rlaif_fast.policy.policy import Policy


class PpoRm(GroupAlgorithm):
    """The oracle's rankings train a reward model; the policy learns from its scores, token by token.

    The KL to the reference is part of the loss, as in every other algorithm here (and in GRPO, arXiv 2402.03300), so
    arms of a comparison differ only in what they learn from; InstructGPT subtracts it from each token's reward.
    """

    feedback: Feedback = "ranks"
    has_critic = True

    def __init__(self, options: AlgorithmOptions) -> None:
        super().__init__(options)
        self.extra_models = (*self.extra_models, "reward", "value")

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """Advantages come from the value model, which assumes that the policy drew every token."""
        return "advantage", "penalty_weight", "scale", "max_reasoning_tokens"

    def make_critic(self, policy: Policy, world: World, make_updater: MakeUpdater) -> RewardAndValue:
        """See `GroupAlgorithm.make_critic`."""
        return RewardAndValue(policy, world, self, make_updater)

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """The centred win rates, for the log; the loss uses the critic's, per token."""
        return verdicts.centred_win_rates()

    def loss_inputs(self, verdicts: Verdicts) -> dict[str, Any]:
        """Nothing: the loop adds the critic's advantages."""
        return {}
