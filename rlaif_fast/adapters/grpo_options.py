"""The options that have the same names in TRL and Liger, checked when a trainer is made."""

from __future__ import annotations

from typing import Any

from rlaif_fast.loss.options import LossOptions


def grpo_options(
    *,
    beta: float,
    epsilon: float,
    epsilon_high: float,
    importance_sampling_level: str,
    use_bias_correction_kl: bool,
    **same: Any,
) -> dict[str, Any]:
    """Return the options as `grpo_rank_loss` takes them.

    Args:
        beta: As in `grpo_rank_loss`, like everything not listed here.
        use_bias_correction_kl: `unbiased_kl`; has no effect if beta is 0.
        same: `loss_type`, `delta`, `max_completion_length`, `sapo_temperature_pos` and `sapo_temperature_neg`.

    Raises:
        ValueError: An option that this loss does not have, or options that do not go together.
    """
    corrected = use_bias_correction_kl and beta != 0.0
    if corrected and importance_sampling_level == "sequence":
        raise ValueError(
            "use_bias_correction_kl must be False with importance_sampling_level='sequence' and a beta; got True"
        )
    options = {
        "beta": beta,
        "epsilon_high": epsilon_high,
        "importance_sampling_level": importance_sampling_level,
        "unbiased_kl": corrected,
        "cispo_bound": "absolute",
        **same,
    }
    LossOptions(epsilon_low=epsilon, **options)
    return {**options, "epsilon": epsilon}
