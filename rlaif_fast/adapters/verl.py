"""verl: a policy loss with the signature that `register_policy_loss` documents (0.9).

Load `rlaif_fast.adapters.verl_plugin` by VERL_USE_EXTERNAL_MODULES and set `actor.policy_loss.loss_mode=rlaif_fast`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlaif_fast.loss.api import grpo_rank_loss

LOSS_TYPES = {"token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum": "luspo"}

DUAL_CLIP = 3.0  # verl's, if a configuration sets none


def policy_loss(
    old_log_prob: Tensor,  # (bs, T)
    log_prob: Tensor,  # (bs, T)
    advantages: Tensor,  # (bs, T)
    response_mask: Tensor,  # (bs, T)
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # (bs, T)
) -> tuple[Tensor, dict[str, float]]:
    """Return the clipped loss, aggregated over verl's global batch, and metrics under verl's names.

    Args:
        old_log_prob: `old_logps` of `grpo_rank_loss`.
        log_prob: `logps`.
        advantages: Made by verl, one per token.
        response_mask: `mask`.
        loss_agg_mode: "token-mean", "seq-mean-token-mean" or "seq-mean-token-sum"; empty responses do not count.
        config: verl's actor configuration: `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`, `clip_ratio_c` and
            `global_batch_info`.
        rollout_is_weights: `sampling_ratio`.

    Raises:
        ValueError: No configuration, an aggregate other than these, or several processes without the count of
            the whole batch.
    """
    if config is None:
        raise ValueError("config must be verl's actor configuration; got None")
    if loss_agg_mode not in LOSS_TYPES:
        raise ValueError(
            f"loss_agg_mode must be one of {', '.join(map(repr, LOSS_TYPES))}; got {loss_agg_mode!r}"
        )
    low, high = _of(config, "clip_ratio_low"), _of(config, "clip_ratio_high")
    dual_clip, info = _of(config, "clip_ratio_c"), _of(config, "global_batch_info") or {}
    whole = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    items, processes = info.get(whole), info.get("dp_size", 1)
    if items is None and processes > 1:
        raise ValueError(f"global_batch_info must have {whole} where dp_size is above 1; got {dict(info)}")
    out = grpo_rank_loss(
        log_prob,
        old_logps=old_log_prob,
        advantages=advantages,
        mask=response_mask,
        sampling_ratio=rollout_is_weights,
        epsilon=_of(config, "clip_ratio") if low is None else low,
        epsilon_high=_of(config, "clip_ratio") if high is None else high,
        dual_clip=DUAL_CLIP if dual_clip is None else dual_clip,
        loss_type=LOSS_TYPES[loss_agg_mode],
        empty_rows="skip",
        num_items_in_batch=None if items is None else items / processes,
    )
    mask = response_mask.bool()
    distance = (old_log_prob - log_prob).detach().masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
    return out.loss, {
        "actor/ppo_kl": distance.item(),
        "actor/pg_clipfrac": out.stats["clip_ratio/region_mean"].item(),
    }


def _of(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
