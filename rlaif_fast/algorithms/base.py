"""How algorithms differ: the feedback they need, their advantages, their loss, the models they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from rlaif_fast import LossOutput, RankAdvantages, fused_linear_grpo_rank_loss, rank_advantages
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.verdicts import Verdicts
from rlaif_fast.oracle.base import Oracle, Ranking

if TYPE_CHECKING:
    from rlaif_fast.algorithms.group import Group
    from rlaif_fast.distributed.world import World
    from rlaif_fast.policy.policy import Policy
    from rlaif_fast.prompts.encoder import Prompt
    from rlaif_fast.rollout.base import Rollout

Feedback = Literal["ranks", "scores"]  # pairs are made from ranks


class Updates(Protocol):
    """Trains a model: `step` once the gradients are there; its state is part of a checkpoint."""

    def step(self) -> Tensor:
        """Update the weights by the gradients of all processes and clear them."""
        ...

    def skip(self) -> None:
        """Advance the schedule when there was nothing to learn."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        ...


class MakeUpdater(Protocol):
    """Makes the optimizer of a model beside the policy, with the schedule of the stage."""

    def __call__(
        self,
        model: nn.Module,
        learning_rate: float | None,
        *,
        begin: int = 0,
        end: int | None = None,
        updates: int | None = None,
    ) -> Updates:
        """The optimizer of `model`.

        Args:
            model: The model it trains.
            learning_rate: Peak learning rate; None takes the policy's.
            begin: The first rollout that it learns from.
            end: The rollout before which it ends; None is the stage's end.
            updates: Updates per rollout; None is as many as the policy's.
        """
        ...


class Critic(Protocol):
    """Models that learn beside the policy and judge what its responses are worth.

    Attributes:
        first_policy_step: The first rollout (from 0) that the policy learns from.
    """

    first_policy_step: int

    def asks_oracle(self, step: int) -> bool:
        """Whether the oracle ranks the rollout of this step, counted from 0."""
        ...

    def judge(self, oracle: Oracle, prompts: Sequence[Prompt], rollout: Rollout, step: int) -> Oracle:
        """What ranks the rollout of this step: the run's oracle, or a model of the critic."""
        ...

    def appraise(self, groups: Sequence[Group], step: int) -> tuple[list[Group], dict[str, float]]:
        """The groups that the policy learns from, with the worth of each token; and figures for the log."""
        ...

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """Learn from the same groups as an update of the policy; returns figures for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        ...


class Algorithm(Protocol):
    """One way to learn from groups; the loop does not depend on its name.

    Attributes:
        options: Its hyper-parameters.
        feedback: What the oracle has to give: "ranks", or "scores" (from an oracle that `gives_scores`).
        extra_models: Models held beside the policy: "reference", the policy at this stage's start; those of a critic.
        samples_from: Whose weights draw the responses: "policy", the current ones, or "start", the stage's first.
        has_critic: Whether `make_critic` makes one.
    """

    options: AlgorithmOptions
    feedback: Feedback
    extra_models: tuple[str, ...]
    samples_from: Literal["policy", "start"]
    has_critic: ClassVar[bool]

    def __init__(self, options: AlgorithmOptions) -> None: ...

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """Names of the options that it would not read; setting one of them is refused."""
        ...

    def make_critic(self, policy: Policy, world: World, make_updater: MakeUpdater) -> Critic | None:
        """The critic, given the policy at the start of the stage; None for an algorithm without one."""
        ...

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """Turn the oracle's verdicts on N groups of G responses into advantages; responses not judged get 0."""
        ...

    def learns_from(self, ranking: Ranking) -> Sequence[int]:
        """Places of a group's responses that the loss takes, in its order; an empty result leaves the group out."""
        ...

    def loss_inputs(self, verdicts: Verdicts) -> dict[str, Any]:
        """What the loss takes of the verdicts: its advantages, or the ranks themselves and their weights."""
        ...

    def loss(
        self,
        hidden: Tensor,  # (M, H)
        weight: Tensor,  # (V, H)
        token_ids: Tensor,  # (M,)
        **inputs: Any,
    ) -> LossOutput:
        """The loss of packed responses; `inputs` are the arguments of `fused_linear_grpo_rank_loss` besides options."""
        ...


class GroupAlgorithm(ABC):
    """Base of algorithms that compare the responses of a group: the clipped loss with its KL."""

    default_beta: ClassVar[float] = 0.01  # if the options leave it null
    samples_from: Literal["policy", "start"] = "policy"
    has_critic: ClassVar[bool] = False

    def __init__(self, options: AlgorithmOptions) -> None:
        self.options = options
        self.beta = self.default_beta if options.beta is None else options.beta
        self.extra_models: tuple[str, ...] = ("reference",) if self.beta > 0 else ()

    def make_critic(self, policy: Policy, world: World, make_updater: MakeUpdater) -> Critic | None:
        """None; see `Algorithm.make_critic`."""
        return None

    @abstractmethod
    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """See `Algorithm.advantages`."""

    def learns_from(self, ranking: Ranking) -> Sequence[int]:
        """All of them; see `Algorithm.learns_from`."""
        return range(len(ranking.ranks))

    def loss_inputs(self, verdicts: Verdicts) -> dict[str, Any]:
        """The advantages, computed here; an algorithm whose advantages the loss knows passes the ranks instead."""
        return {"advantages": self.advantages(verdicts).advantages.flatten()}

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
            beta=self.beta,
            kl=options.kl,
            entropy_coef=options.entropy_coef,
            loss_type=options.loss_type,
            importance_sampling_level=options.importance_sampling_level,
            temperature=options.temperature,
            max_completion_length=options.max_completion_length,
            backend=options.backend,
            **inputs,
        )


class KernelAlgorithm(GroupAlgorithm):
    """An algorithm with advantages that the kernels compute: the loss gets the feedback itself."""

    @property
    @abstractmethod
    def rank_options(self) -> dict[str, Any]:
        """`kind`, `penalty_weight` and `scale` of `rank_advantages`."""

    def advantages(self, verdicts: Verdicts) -> RankAdvantages:
        """See `Algorithm.advantages`."""
        return rank_advantages(
            verdicts.scores,
            verdicts.feedback,
            judged=verdicts.judged,
            weights=verdicts.weights,
            validate=False,
            backend=self.options.backend,
            **self.rank_options,
        )

    def loss_inputs(self, verdicts: Verdicts) -> dict[str, Any]:
        """The feedback and the policy's scores, ranked and weighted in the loss's own launch."""
        return {
            "oracle_ranks": verdicts.feedback,
            "scores": verdicts.scores,
            "judged": verdicts.judged,
            "weights": verdicts.weights,
            **self.rank_options,
        }
