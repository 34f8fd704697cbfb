"""The hyper-parameters of the loss, checked once and handed whole to every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("directed", "oracle", "paper", "paper_swapped", "zscore")
SCALES = ("none", "group")
SCORES = ("mean", "sum")
KLS = ("k1", "k2", "k3")
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo", "sapo")
AGGREGATES = ("loss", "tokens")
EMPTY_ROWS = ("count", "skip")
CISPO_BOUNDS = ("relative", "absolute")
LEVELS = ("token", "sequence")

MAX_GROUP_SIZE = 64
MIN_RANKED = 2  # judged responses from which a group says something

# exp() of a log-ratio is taken of its clamp to +-20 (4.9e8), so that sums and squared gradient norms stay
# finite in float32. The gradient through a clamped ratio is zero.
LOG_RATIO_LIMIT = 20.0

MAX_QUOTIENT = 1e30  # logits that are scaled by more overflow float32

RANKING_STATS = ("penalty", "ndcg", "kendall_tau", "top1_agreement", "no_signal")  # where there are ranks

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
    *RANKING_STATS,
    "tokens",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False: Python would take any other as one of them."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__} {value!r}")


def check_number(name: str, value: object, *, minimum: float, strict: bool = False) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number of at least (or above) `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not -math.inf < value < math.inf or value < minimum or (strict and value == minimum):
        raise ValueError(
            f"{name} must be finite and {'above' if strict else 'at least'} {minimum}; got {value}"
        )


def check_divisor(name: str, value: float, dividend: float = 1.0) -> None:
    """Raise TypeError or ValueError unless `value` is above 0 and the dividend over it has room in float32."""
    check_number(name, value, minimum=0.0, strict=True)
    if dividend / value > MAX_QUOTIENT:
        raise ValueError(
            f"{name} must be at least {dividend / MAX_QUOTIENT:.3g}, float32 overflows; got {value}"
        )


def check_scaling(temperature: float, softcap: float | None, scale: float) -> None:
    """Raise TypeError or ValueError unless logits can be scaled, capped and divided so in float32."""
    check_number("logit_scale", scale, minimum=0.0, strict=True)
    if softcap is not None:
        check_divisor("logit_softcap", softcap, scale)
    check_divisor("temperature", temperature, scale if softcap is None else softcap)


def check_count(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    check_number(name, value, minimum=1)


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
        dual_clip: Where A < 0 the policy term is at least dual_clip * A, or None.
        beta: Weight of the KL term against the reference policy.
        kl: Estimator of it: "k1", "k2" or "k3".
        kl_clamp: The estimate is kept within +-kl_clamp, or None.
        unbiased_kl: Whether the estimate is multiplied by the ratio.
        entropy_coef: Weight of the entropy bonus.
        entropy_aggregate: "loss" as the policy term, or "tokens", the mean over tokens.
        loss_type: "grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo" or "sapo".
        empty_rows: Whether a response without a token counts ("count") in the number of responses.
        max_completion_length: The constant length that "dr_grpo" divides by.
        importance_sampling_level: "token", or "sequence" (GSPO).
        cispo_bound: The upper bound of "cispo" is 1 + epsilon_high ("relative") or epsilon_high ("absolute").
        sapo_temperature_pos: Of "sapo" where A > 0.
        sapo_temperature_neg: Of "sapo" elsewhere.
    """

    score: str = "mean"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    kl_clamp: float | None = None
    unbiased_kl: bool = False
    entropy_coef: float = 0.0
    entropy_aggregate: str = "loss"
    loss_type: str = "grpo"
    empty_rows: str = "count"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    cispo_bound: str = "relative"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("score", self.score, SCORES)
        check_choice("kl", self.kl, KLS)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        check_choice("entropy_aggregate", self.entropy_aggregate, AGGREGATES)
        check_choice("empty_rows", self.empty_rows, EMPTY_ROWS)
        check_choice("cispo_bound", self.cispo_bound, CISPO_BOUNDS)
        check_divisor("sapo_temperature_pos", self.sapo_temperature_pos)
        check_divisor("sapo_temperature_neg", self.sapo_temperature_neg)
        check_number("epsilon", self.epsilon_low, minimum=0.0)
        check_number("epsilon_high", self.epsilon_high, minimum=0.0)
        check_number("beta", self.beta, minimum=0.0)
        check_number("entropy_coef", self.entropy_coef, minimum=-math.inf)
        for name in ("delta", "dual_clip", "kl_clamp"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, minimum=1.0 if name == "dual_clip" else 0.0, strict=True)
        check_flag("unbiased_kl", self.unbiased_kl)
        self._check_combinations()
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length must be given with loss_type='dr_grpo'; got None")
        if self.max_completion_length is not None:
            check_count("max_completion_length", self.max_completion_length)

    def _check_combinations(self) -> None:
        if self.surrogate != "clip":
            for name in ("delta", "dual_clip"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name} must be None with loss_type={self.loss_type!r}; got {value}")
        if self.per_sequence and (self.surrogate != "clip" or self.unbiased_kl):
            what = "unbiased_kl" if self.unbiased_kl else f"loss_type={self.loss_type!r}"
            raise ValueError(f"importance_sampling_level must be 'token' with {what}; got 'sequence'")

    @property
    def per_sequence(self) -> bool:
        """Whether a response has one ratio."""
        return self.importance_sampling_level == "sequence"

    @property
    def surrogate(self) -> str:
        """The form of the policy term: "clip", "cispo" or "sapo"."""
        return self.loss_type if self.loss_type in ("cispo", "sapo") else "clip"

    @property
    def aggregate(self) -> str:
        """What a token's term is divided by besides the number of items: its response's "length", nothing
        where items are "tokens", the "constant" length, or nothing where items are responses ("sum")."""
        names = {"grpo": "length", "sapo": "length", "dr_grpo": "constant", "luspo": "sum"}
        return names.get(self.loss_type, "tokens")

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """The bounds of the ratio; infinite above where none is."""
        if self.surrogate == "sapo":
            return 0.0, math.inf
        if self.surrogate == "cispo":
            return 0.0, self.epsilon_high + (1.0 if self.cispo_bound == "relative" else 0.0)
        return 1.0 - self.epsilon_low, 1.0 + self.epsilon_high
