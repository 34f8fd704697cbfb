"""What differs between algorithms: the feedback they need, their advantages, their loss, the models they hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, Protocol

from torch import Tensor

from rlaif_fast import LossOutput, RankAdvantages, fused_linear_grpo_rank_loss
from rlaif_fast.algorithms.options import AlgorithmOptions

Feedback = Literal["ranks", "scores"]  # pairs are made from ranks


class Algorithm(Protocol):
    """One way to learn from groups; the loop does not know its name.

    Attributes:
        options: Its hyper-parameters.
        feedback: What the oracle has to give: "ranks", or "scores" (from an oracle that `gives_scores`).
        extra_models: Models held beside the policy: "reference", the policy as this stage began.
    """

    options: AlgorithmOptions
    feedback: Feedback
    extra_models: tuple[str, ...]

    def __init__(self, options: AlgorithmOptions) -> None: ...

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """Names of the options that it would not read; one of them set by hand is refused."""
        ...

    def advantages(
        self,
        policy_scores: Tensor,  # (N, G)
        feedback: Tensor,  # (N, G)
    ) -> RankAdvantages:
        """Turn the feedback on N groups of G responses into advantages.

        Args:
            policy_scores: (N, G) float32, the policy's log-probability of each response, higher is more likely.
            feedback: (N, G) the oracle's ranks (int64, 0 is best) or scores (float32, higher is better).
        """
        ...

    def loss(
        self,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        token_ids: Tensor,  # (M,)
        **inputs: Any,
    ) -> LossOutput:
        """The loss of packed responses; `inputs` are those of `fused_linear_grpo_rank_loss` that are no options."""
        ...


class GroupAlgorithm:
    """What algorithms that compare the responses of a group have in common: the clipped loss with its KL."""

    def __init__(self, options: AlgorithmOptions) -> None:
        self.options = options
        self.extra_models: tuple[str, ...] = ("reference",) if options.beta > 0 else ()

    def loss(
        self,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        token_ids: Tensor,  # (M,)
        **inputs: Any,
    ) -> LossOutput:
        """The clipped policy-gradient loss; see `Algorithm.loss`."""
        options = self.options
        return fused_linear_grpo_rank_loss(
            hidden,
            weight,
            token_ids,
            epsilon=options.epsilon,
            epsilon_high=options.epsilon_high,
            delta=options.delta,
            beta=options.beta,
            kl=options.kl,
            entropy_coef=options.entropy_coef,
            loss_type=options.loss_type,
            importance_sampling_level=options.importance_sampling_level,
            temperature=options.temperature,
            max_completion_length=options.max_completion_length,
            backend=options.backend,
            **inputs,
        )
