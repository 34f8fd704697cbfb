"""verl (0.9, trainers of V1): advantages from an oracle's order, where verl computes them.

    from verl.trainer.ppo.v1 import register_trainer
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    register_trainer("oracle")(ranked(PPOTrainerSync, ReferenceOracle()))

in a module that verl imports (VERL_USE_EXTERNAL_MODULES), then `trainer.v1.trainer_mode=oracle` and
`algorithm.adv_estimator=rlaif_fast`.
"""

from __future__ import annotations

from typing import Any

import torch
import transfer_queue
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from rlaif_fast.adapters.ranking import RowRanker, mean_logps, put_at_last_token
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.policy.vocabulary import texts_of

ESTIMATOR = "rlaif_fast"
FIELDS = ["uid", "raw_prompt", "responses", "response_mask", "old_log_probs", "rm_scores", "reward_model"]


@register_adv_est(ESTIMATOR)
def advantages_of_scores(
    token_level_rewards: Tensor,  # (bs, T)
    response_mask: Tensor,  # (bs, T)
    **other: Any,
) -> tuple[Tensor, Tensor]:
    """Return the sum of each response's scores on all of its tokens, as advantages and as returns (bs, T)."""
    mask = response_mask.to(token_level_rewards.dtype)
    advantages = (token_level_rewards * mask).sum(-1, keepdim=True) * mask
    return advantages, advantages


def ranked(trainer: type, oracle: Oracle, **options: Any) -> type:
    """Return a subclass of a verl trainer that ranks the responses to a prompt before advantages are computed.

    The oracle gets `raw_prompt` with its pictures and videos, the responses as text, and
    `reward_model["ground_truth"]` as the reference answer. The policy's own order is that of `old_log_probs`; a
    response without a token has no advantage.

    Args:
        trainer: `PPOTrainerSync` or another `PPOTrainer`.
        oracle: Ranks the responses with equal `uid`.
        options: Options of `RowRanker`.

    When made, the trainer refuses with a ValueError another estimator and a KL in the reward.
    """
    ranker = RowRanker(oracle, **options)

    class OracleTrainer(trainer):  # type: ignore[misc, valid-type]
        def __init__(self, *parts: Any, **others: Any) -> None:
            super().__init__(*parts, **others)
            _refuse(self.config.algorithm)

        def _compute_advantage(self, batch, metrics):
            """Put the advantages where verl reads scores, then continue as verl does."""
            several = [key for key in batch.keys if not key.endswith("_0")]
            if several:
                raise ValueError(
                    f"agent loops with several outputs a session cannot be ranked, got {several[0]!r}"
                )
            where = {"keys": batch.keys, "partition_id": batch.partition_id}
            data = transfer_queue.kv_batch_get(**where, select_fields=FIELDS)
            mask, logps = (data[name].to_padded_tensor(0) for name in ("response_mask", "old_log_probs"))
            texts = texts_of(self.tokenizer, list(data["responses"].unbind()))
            rows = ranker(
                list(data["uid"]),
                list(data["raw_prompt"]),
                texts,
                [(row or {}).get("ground_truth") for row in data["reward_model"]],
                mean_logps(logps, mask),
            )
            scores = [torch.zeros_like(row) for row in data["rm_scores"].unbind()]
            put_at_last_token(scores, data["response_mask"].unbind(), rows.advantages)
            nested = torch.nested.as_nested_tensor(scores, layout=torch.jagged)
            fields = TensorDict({"rm_scores": nested}, batch_size=len(scores))
            metrics["oracle/gain"] = sum(rows.gains) / len(rows.gains)
            return super()._compute_advantage(
                transfer_queue.kv_batch_put(**where, fields=fields) or batch, metrics
            )

    return OracleTrainer


def _refuse(algorithm: Any) -> None:
    if algorithm.adv_estimator != ESTIMATOR:
        raise ValueError(f"algorithm.adv_estimator must be {ESTIMATOR}, got {algorithm.adv_estimator!r}")
    if algorithm.use_kl_in_reward:
        raise ValueError("algorithm.use_kl_in_reward must be false: ranks have no KL; use actor.use_kl_loss")
