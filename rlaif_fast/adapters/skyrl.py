"""SkyRL: a policy loss of the documented signature (0.3); `register()` puts it into SkyRL's registry."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlaif_fast.loss.api import grpo_rank_loss


def policy_loss(
    log_probs: Tensor,  # (B, T)
    old_log_probs: Tensor,  # (B, T)
    advantages: Tensor,  # (B, T)
    config: Any,
    loss_mask: Tensor | None = None,  # (B, T)
    rollout_logprobs: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, dict[str, float]]:
    """Return the clipped loss summed over all tokens, and the share of them clipped.

    Args:
        log_probs: `logps` of `grpo_rank_loss`.
        old_log_probs: `old_logps`.
        advantages: One a token.
        config: `eps_clip_low` and `eps_clip_high`.
        loss_mask: `mask`.
        rollout_logprobs: Must be None: no correction is made of them.

    Raises:
        ValueError: There are `rollout_logprobs`.
    """
    if rollout_logprobs is not None:
        raise ValueError("rollout_logprobs must be None: this loss makes no correction of them")
    out = grpo_rank_loss(
        log_probs,
        old_logps=old_log_probs,
        advantages=advantages,
        mask=loss_mask,
        epsilon=config.eps_clip_low,
        epsilon_high=config.eps_clip_high,
        loss_type="luspo",
        num_items_in_batch=1,  # a sum
    )
    return out.loss, {"clip_ratio": out.stats["clip_ratio/region_mean"].item()}


def register(name: str = "rlaif_fast") -> None:
    """Register the loss with SkyRL."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry

    PolicyLossRegistry.register(name, policy_loss)
