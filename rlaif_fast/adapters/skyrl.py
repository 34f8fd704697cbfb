"""SkyRL (0.3): a policy loss and an advantage estimator for its registries, and a trainer based on an oracle.

Call `register()` before the trainer starts, then set `trainer.algorithm.policy_loss_type=rlaif_fast`. Ranks also need
`trainer.algorithm.advantage_estimator=rlaif_fast` and a trainer made by `ranked_trainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.adapters.ranking import RowRanker, mean_logps, put_at_last_token
from rlaif_fast.loss.api import grpo_rank_loss
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.policy.vocabulary import texts_of

NAME = "rlaif_fast"
CORRECTIONS = (
    *("tis_ratio_type", "sequence_mask_metric"),
    *("outlier_token_is_threshold_low", "outlier_token_is_threshold_high"),
    *("token_mask_is_threshold_low", "token_mask_is_threshold_high"),
)


def policy_loss(
    log_probs: Tensor,  # (B, T)
    old_log_probs: Tensor,  # (B, T)
    advantages: Tensor,  # (B, T)
    config: Any,
    loss_mask: Tensor | None = None,  # (B, T)
    rollout_logprobs: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, dict[str, float]]:
    """Return the clipped loss summed over all tokens, and the share of them clipped, as SkyRL's "regular" does.

    Args:
        log_probs: `logps` of `grpo_rank_loss`.
        old_log_probs: `old_logps`.
        advantages: One per token; SkyRL has already divided them so that the sum becomes a mean.
        config: `eps_clip_low` and `eps_clip_high`; `off_policy_correction` must be off.
        loss_mask: `mask`.
        rollout_logprobs: The sampler's; SkyRL reads them only for its correction.

    Raises:
        ValueError: The configuration corrects for the sampler's log-probabilities.
    """
    correction = config.off_policy_correction
    for name in CORRECTIONS:
        if getattr(correction, name, None) is not None:
            raise ValueError(f"off_policy_correction.{name} must be null: this loss makes no correction")
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


def advantages_of_scores(
    token_level_rewards: Tensor,  # (B, T)
    response_mask: Tensor,  # (B, T)
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """Return the sum of each response's scores on all of its tokens, as advantages and as returns (B, T)."""
    advantages = token_level_rewards.sum(-1, keepdim=True) * response_mask
    return advantages, advantages


def register(name: str = NAME) -> None:
    """Register the loss and the estimator with SkyRL."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry, PolicyLossRegistry

    PolicyLossRegistry.register(name, policy_loss)
    AdvantageEstimatorRegistry.register(name, advantages_of_scores)


def ranked_trainer(
    base: type, oracle: Oracle, *, reference: Callable[[str], Any] | None = None, **options: Any
) -> type:
    """Return a subclass of SkyRL's `RayPPOTrainer` whose advantages come from an oracle's order.

    The oracle reads prompts and responses as the tokenizer decodes them. The policy's own order is that of
    `action_log_probs` where `loss_mask` is set, so text written by tools does not count; a response without such a
    token has no advantage.

    Args:
        base: `skyrl.train.trainer.RayPPOTrainer`, or one of its subclasses.
        oracle: Ranks the responses with equal `uids`.
        reference: The reference answer of a decoded prompt; SkyRL's batch no longer holds it.
        options: Options of `RowRanker`; SkyRL's batch holds pictures only as patches, so `media` shows none.

    When made, the trainer refuses with a ValueError another estimator, a KL in the reward and step-wise
    trajectories.
    """
    ranker = RowRanker(oracle, **options)

    class OracleTrainer(base):  # type: ignore[misc, valid-type]
        def __init__(self, *parts: Any, **others: Any) -> None:
            super().__init__(*parts, **others)
            _refuse(self.cfg)

        def compute_advantages_and_returns(self, data):
            """Put the advantages where SkyRL reads rewards, then continue as SkyRL does."""
            mask, ids = data["response_mask"].bool(), data["sequences"]
            responses = [row[-len(kept) :][kept] for row, kept in zip(ids, mask)]
            prompts = [
                row[seen.bool()][: -len(response) or None]
                for row, seen, response in zip(ids, data["attention_mask"], responses)
            ]
            asked = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
            texts = texts_of(self.tokenizer, responses)
            answers = [reference(prompt) if reference else None for prompt in asked]
            scores = mean_logps(data["action_log_probs"], mask & data["loss_mask"].bool())
            ranked = ranker(data.metadata["uids"], asked, texts, answers, scores)
            rewards = torch.zeros_like(data["rewards"])
            put_at_last_token(rewards, mask, ranked.advantages)
            data["rewards"] = rewards
            self.all_metrics["oracle/gain"] = sum(ranked.gains) / len(ranked.gains)
            return super().compute_advantages_and_returns(data)

    return OracleTrainer


def _refuse(config: Any) -> None:
    algorithm = config.trainer.algorithm
    if algorithm.advantage_estimator != NAME:
        raise ValueError(
            f"algorithm.advantage_estimator must be {NAME}, got {algorithm.advantage_estimator!r}"
        )
    if algorithm.use_kl_in_reward:
        raise ValueError("algorithm.use_kl_in_reward must be false: ranks have no KL; use use_kl_loss")
    if config.generator.step_wise_trajectories:
        raise ValueError("generator.step_wise_trajectories must be false: a response is ranked as a whole")
