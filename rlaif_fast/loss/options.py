"""The hyper-parameters of the loss, checked once and handed whole to every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("directed", "oracle", "paper", "paper_swapped", "zscore")
SCALES = ("none", "group")
SCORES = ("mean", "sum")
KLS = ("k1", "k2", "k3")
LOSS_TYPES = ("grpo", "dapo", "dr_grpo")
LEVELS = ("token", "sequence")

MAX_GROUP_SIZE = 64

# exp() of a log-ratio is taken of its clamp to +-20 (4.9e8), so that sums and squared gradient norms stay
# finite in float32. The gradient through a clamped ratio is zero.
LOG_RATIO_LIMIT = 20.0

# The order of the statistics in the vector that every backend returns.
STATS = (
    "loss/policy",
    "loss/kl",
    "loss/entropy",
    "kl",
    "entropy",
    "clip_low",
    "clip_high",
    "ratio_mean",
    "ratio_max",
    "penalty",
    "ndcg",
    "kendall_tau",
    "top1_agreement",
    "no_signal",
    "tokens",
)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_number(name: str, value: object, *, minimum: float, strict: bool = False) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number of at least (or above) `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not math.isfinite(value) or value < minimum or (strict and value == minimum):
        raise ValueError(
            f"{name} must be finite and {'above' if strict else 'at least'} {minimum}; got {value}"
        )


@dataclass(frozen=True)
class RankOptions:
    """How ranks become advantages.

    Attributes:
        kind: "directed", "oracle", "paper", "paper_swapped" or "zscore".
        penalty_weight: w of the directed advantage.
        scale: "none", or "group" to divide by the root mean square over the group.
    """

    kind: str = "directed"
    penalty_weight: float = 1.0
    scale: str = "none"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("scale", self.scale, SCALES)
        check_number("penalty_weight", self.penalty_weight, minimum=0.0)

    @property
    def orders_policy(self) -> bool:
        """Whether the advantages depend on the policy's own order."""
        return self.kind not in ("oracle", "zscore")


@dataclass(frozen=True)
class LossOptions(RankOptions):
    """How advantages and log-probabilities become a loss.

    Attributes:
        score: "mean" (per token) or "sum" log-probability of a response as the policy's score of it.
        epsilon_low: The ratio is clipped below at 1 - epsilon_low.
        epsilon_high: The ratio is clipped above at 1 + epsilon_high.
        delta: Upper bound on the ratio (two-sided clipping), or None.
        beta: Weight of the KL term against the reference policy.
        kl: Estimator of it: "k1", "k2" or "k3".
        entropy_coef: Weight of the entropy bonus.
        loss_type: "grpo", "dapo" or "dr_grpo".
        max_completion_length: The constant length that "dr_grpo" divides by.
        importance_sampling_level: "token", or "sequence" (GSPO).
    """

    score: str = "mean"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    entropy_coef: float = 0.0
    loss_type: str = "grpo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("score", self.score, SCORES)
        check_choice("kl", self.kl, KLS)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        check_number("epsilon", self.epsilon_low, minimum=0.0)
        check_number("epsilon_high", self.epsilon_high, minimum=0.0)
        check_number("beta", self.beta, minimum=0.0)
        check_number("entropy_coef", self.entropy_coef, minimum=-math.inf)
        if self.delta is not None:
            check_number("delta", self.delta, minimum=0.0, strict=True)
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given with loss_type='dr_grpo'; got None")
        if self.max_completion_length is not None:
            check_number("max_completion_length", self.max_completion_length, minimum=0.0, strict=True)

    @property
    def per_sequence(self) -> bool:
        """Whether a response has one ratio."""
        return self.importance_sampling_level == "sequence"
