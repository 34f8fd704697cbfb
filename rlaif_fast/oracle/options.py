"""The options of the oracle in a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlaif_fast.errors import require, require_least
from rlaif_fast.oracle.feedback import CORRUPTIONS
from rlaif_fast.oracle.registry import refuse_secrets


@dataclass
class OracleOptions:
    """Who ranks.

    Attributes:
        oracle: Name of a registered oracle: "reference", "embedding", "local", "api", "reward_model", "callable",
            "replay", "ensemble", one from the entry-point group `rlaif_fast.oracles`, or "module:Class" of a file of
            your own.
        oracle_options: Keyword arguments of that oracle, as YAML or JSON.
        feedback: "exact", or how the oracle's scores are corrupted before they are ranked (an experiment): "gaussian",
            "heavy_tails", "warp", "grades", "flips", "slot_bias", "slot_bias_debiased", "listwise", "outliers".
        feedback_strength: How much; null is the usual strength of the kind (see `rlaif_fast.oracle.feedback`).
        oracle_noise: Standard deviation of noise on the oracle's scores (an experiment), 0 for none.
        oracle_shuffle: Shuffle every ranking (a control that must teach nothing).
        max_invalid_fraction: Share of failed rankings over the last window above which the run stops.
        blind_control: Groups that the oracle ranks again without frames every `eval_steps`, to see whether it looks; 0
            for none. With several processes only the first asks, about its own groups, which may be fewer.
    """

    oracle: str = "reference"
    oracle_options: dict[str, Any] = field(default_factory=dict)
    feedback: str = "exact"
    feedback_strength: float | None = None
    oracle_noise: float = 0.0
    oracle_shuffle: bool = False
    max_invalid_fraction: float = 0.5
    blind_control: int = 8

    def check_oracle(self) -> None:
        """Raise `UsageError` for values that cannot work."""
        kinds = ("exact", *CORRUPTIONS)
        require(self.feedback in kinds, "feedback", ", ".join(kinds), self.feedback)
        unused = self.feedback == "exact" and self.feedback_strength is not None
        require(not unused, "feedback_strength", "null where feedback is exact", self.feedback_strength)
        require_least("oracle_noise", self.oracle_noise, 0)
        require(
            0 <= self.max_invalid_fraction <= 1,
            "max_invalid_fraction",
            "a share in [0, 1]",
            self.max_invalid_fraction,
        )
        require_least("blind_control", self.blind_control, 0)
        refuse_secrets(self.oracle_options)
