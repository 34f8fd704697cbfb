"""ms-swift: an oracle as an `ORM` class (4.6), for a file given by `--external_plugins`:

    from rlaif_fast.adapters.ms_swift import register
    register("oracle", ReferenceOracle(), reference="solution")

and `--reward_funcs oracle`. Its Liger loss may be `rlaif_fast.adapters.liger.FusedLinearGRPOLoss`.
`ranked_trainer` computes the advantages itself, from the oracle's order.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather, gather_object
from torch import Tensor

from rlaif_fast.adapters.ranking import RowRanker, check_scale_rewards, mean_logps
from rlaif_fast.oracle.as_reward import as_reward
from rlaif_fast.oracle.base import Oracle


def orm_class(oracle: Oracle, base: type = object, **options: Any) -> type:
    """Return a class whose instances are called as `orm(completions, **columns) -> list[float]`.

    Args:
        oracle: Ranks the groups of a process's slice; `num_generations` must divide the slice.
        base: ms-swift's `ORM`.
        options: Options of `as_reward`.
    """
    reward = as_reward(oracle, **options)

    class OracleORM(base):  # type: ignore[misc, valid-type]
        def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
            return reward(completions=completions, **columns)

    return OracleORM


def register(name: str, oracle: Oracle, **options: Any) -> None:
    """Add an oracle to ms-swift's reward functions."""
    from swift.rewards import ORM, orms

    orms[name] = orm_class(oracle, ORM, **options)


def ranked_trainer(base: type, oracle: Oracle, *, reference: str = "solution", **options: Any) -> type:
    """Return a subclass of ms-swift's `GRPOTrainer` whose advantages come from an oracle's order.

    Whole groups are ranked, even if processes share one; every process asks the oracle, so give it a cache. The
    advantages of `--reward_funcs` are logged but not used.

    Args:
        base: `swift.rlhf_trainers.grpo_trainer.GRPOTrainer`.
        oracle: Ranks the samples with equal `prompt_id`.
        reference: Column of the data set with the reference answer.
        options: Options of `RowRanker`.

    Before anything is loaded, the trainer refuses with a ValueError an `advantage_estimator` other than "grpo", a
    `kl_in_reward`, and a `scale_rewards` that is neither the default nor the ranker's `scale`.
    """
    ranker = RowRanker(oracle, **options)

    class OracleTrainer(base):  # type: ignore[misc, valid-type]
        def __init__(self, *models: Any, args: Any, **others: Any) -> None:
            _refuse(args, ranker.options.scale)
            super().__init__(*models, args=args, **others)

        def _compute_advantages(self, samples, rewards_per_func, batch_encoded_inputs):
            """Return the advantages (N,) of the samples of all processes."""
            super()._compute_advantages(samples, rewards_per_func, batch_encoded_inputs)
            scores = _scores(batch_encoded_inputs, ranker, len(samples))
            ids, prompts, responses, answers = zip(*gather_object([_row(s, reference) for s in samples]))
            columns = {
                name: gather_object([getattr(s, name) or None for s in samples])
                for name in ("images", "videos")
            }
            scores = gather(scores.to(rewards_per_func.device))
            ranked = ranker(ids, prompts, responses, answers, scores, columns)
            return ranked.advantages.to(rewards_per_func)

    return OracleTrainer


def _row(sample: Any, reference: str) -> tuple[str, list[dict], str, Any]:
    *prompt, response = sample.messages
    return sample.prompt_id, prompt, response["content"], sample.extra.get(reference)


def _refuse(args: Any, scale: str) -> None:
    if args.advantage_estimator != "grpo":
        raise ValueError(f'advantage_estimator must be "grpo", got {args.advantage_estimator!r}')
    if args.kl_in_reward and args.beta != 0.0:
        raise ValueError("kl_in_reward must be false: ranks have no KL; with false the loss has it")
    check_scale_rewards(args.scale_rewards, scale)


def _scores(batches: list[dict[str, Any]], ranker: RowRanker, count: int) -> Tensor:
    """(N,) mean log-probability of each of this process's responses."""
    held = [batch["grpo_batch"] for batch in batches]
    if any(batch.old_per_token_logps is None for batch in held):
        missing = "ms-swift made no old log-probabilities; set num_iterations above 1"
        return ranker.scores([None] * count, missing)
    return torch.cat([mean_logps(batch.old_per_token_logps, batch.completion_mask) for batch in held])
