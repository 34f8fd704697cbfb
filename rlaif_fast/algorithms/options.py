"""The hyper-parameters of the algorithms and their loss, under the names TRL uses where TRL has one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from rlaif_fast.algorithms.registry import find_algorithm
from rlaif_fast.errors import UsageError, require, require_least, require_positive
from rlaif_fast.loss.backends import NAMES as BACKENDS
from rlaif_fast.loss.options import LossOptions, check_divisor

# Options that only an algorithm with a critic reads.
OF_A_CRITIC = (
    *("reward_model_steps", "reward_model_refresh", "reward_model_updates", "reward_model_learning_rate"),
    *("center_rewards_coefficient", "value_learning_rate", "gamma", "lam", "cliprange_value"),
)


@dataclass
class AlgorithmOptions:
    """The algorithm, its loss and its models.

    Attributes:
        algorithm: "grpo_rank" (the oracle's order), "grpo" (scores, normalised in the group), "rloo" (scores, against
            the other responses' mean), "gopo" (ranks, evenly spaced), "rlrr" (ranks as relative rewards), "odrpo"
            (ranks, threshold by threshold), "online_dpo" (the best response against the worst), "dpo" (the same
            with responses of the starting weights), "lipo" (every pair, weighed by LambdaLoss), "ppo_rm" (reward model
            from rankings, then PPO), one from the entry-point group `rlaif_fast.algorithms`, or "module:Class" of a
            file of your own.
        advantage: How grpo_rank turns ranks into advantages: "directed", "oracle", "paper", "paper_swapped";
            "zscore" is `algorithm: grpo`.
        penalty_weight: Weight w of the rank penalty in a directed advantage.
        scale: "none", or "group": divide by the group's root mean square (grpo_rank, grpo and rlrr).
        score: Score that gives the policy's own order: "mean" or "sum" of the token log-probs.
        weight_by_confidence: Multiply a group's advantages by the oracle's confidence.
        beta: Weight of the KL to the reference policy (the start of this stage), 0.01 where null. For online_dpo, dpo
            and lipo DPO's beta, 0.1 where null: how strongly the policy is held to the reference.
        kl: KL estimator: "k1", "k2", "k3".
        epsilon: Lower (and, by default, upper) clip range; what bounds the ratio is read where the weights have moved
            since the rollout, by `num_iterations` or `steps_per_generation`.
        epsilon_high: Upper clip range.
        delta: Upper bound on the ratio (two-sided clipping), at least 1; null for none.
        entropy_coef: Weight of the entropy bonus.
        loss_type: "grpo", "dapo", "dr_grpo".
        importance_sampling_level: "token" or "sequence".
        temperature: Sampling temperature; the loss uses the same.
        max_completion_length: Most tokens in a response, the end-of-sequence token counted; "dr_grpo" divides by it.
        max_reasoning_tokens: Most tokens of reasoning, for a model whose chat template opens it; then it is closed. The
            closing tokens are left out of the loss. null sets no bound of its own.
        backend: Backend of the loss: "auto", "triton", "cuda", "cpu", "reference".
        reward_model_steps: The first rollouts of `max_steps`. The starting weights draw them, the oracle ranks them,
            and the reward model learns from them before PPO begins (ppo_rm, like all options below).
        reward_model_refresh: Let the oracle rank PPO's rollouts too; the reward model learns from each before scoring
            it. Otherwise the reward model stays fixed, and PPO does not use the oracle.
        reward_model_updates: Updates of the reward model per rollout, each on a part of its groups.
        reward_model_learning_rate: Peak learning rate of the reward model; null is `learning_rate`.
        center_rewards_coefficient: Weight of the squared sum of two scores, which holds them near zero.
        value_learning_rate: Peak learning rate of the value model; null is `learning_rate`.
        gamma: Discount of later rewards, in [0, 1].
        lam: How far the advantage looks ahead, in [0, 1] (GAE): 0 trusts the next value, 1 no value.
        cliprange_value: How far a value moves from that of the rollout before its loss is clipped.
    """

    algorithm: str = "grpo_rank"
    advantage: Literal["directed", "oracle", "paper", "paper_swapped", "zscore"] = "directed"
    penalty_weight: float = 1.0
    scale: Literal["none", "group"] = "group"
    score: Literal["mean", "sum"] = "mean"
    weight_by_confidence: bool = False
    beta: float | None = None
    kl: Literal["k1", "k2", "k3"] = "k3"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    entropy_coef: float = 0.0
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    temperature: float = 1.0
    max_completion_length: int = 256
    max_reasoning_tokens: int | None = None
    backend: str = "auto"
    reward_model_steps: int = 50
    reward_model_refresh: bool = False
    reward_model_updates: int = 4
    reward_model_learning_rate: float | None = None
    center_rewards_coefficient: float = 0.01
    value_learning_rate: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    cliprange_value: float = 0.2

    def check_algorithm(self) -> None:
        """Raise `UsageError` for values that cannot work, and for those that the algorithm would ignore."""
        try:
            LossOptions(
                kind=self.advantage,
                penalty_weight=self.penalty_weight,
                scale=self.scale,
                score=self.score,
                epsilon_low=self.epsilon,
                epsilon_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
                delta=self.delta,
                beta=0.0 if self.beta is None else self.beta,
                kl=self.kl,
                entropy_coef=self.entropy_coef,
                loss_type=self.loss_type,
                max_completion_length=self.max_completion_length,
                importance_sampling_level=self.importance_sampling_level,
            )
            check_divisor("temperature", self.temperature)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
        # With less, the loss would bound an unchanged policy and learn nothing from its better responses.
        require_least("delta", self.delta, 1)
        require(self.backend in ("auto", *BACKENDS), "backend", f"auto, {', '.join(BACKENDS)}", self.backend)
        self._check_critic()
        algorithm = find_algorithm(self)
        ignored = {*algorithm(self).ignores(self), *(() if algorithm.has_critic else OF_A_CRITIC)}
        for option in fields(self):  # those of other sections too, where this is a part of a configuration
            value = getattr(self, option.name)
            if option.name in ignored and value != option.default:
                named = f"{self.algorithm} with advantage {self.advantage}"
                if "advantage" in ignored:
                    named = self.algorithm
                raise UsageError(f"{option.name}: {named} does not read it, got {value!r}; leave it out")

    def _check_critic(self) -> None:
        require_least("reward_model_steps", self.reward_model_steps, 1)
        require_least("reward_model_updates", self.reward_model_updates, 1)
        require_least("center_rewards_coefficient", self.center_rewards_coefficient, 0)
        require_positive("cliprange_value", self.cliprange_value)
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, name, "a share in [0, 1]", getattr(self, name))
        for name in ("reward_model_learning_rate", "value_learning_rate"):
            require_positive(name, getattr(self, name))
