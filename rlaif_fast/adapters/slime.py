"""slime (0.3): rewards of whole groups, and advantages of a rollout.

In your own module, named by `--group-rm --custom-rm-path` and `--custom-reward-post-process-path`:

    rank = group_rewards(oracle)
    advantages = ranked_advantages(oracle)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rlaif_fast.adapters.ranking import RowRanker
from rlaif_fast.oracle.as_reward import as_reward
from rlaif_fast.oracle.base import Oracle


def group_rewards(oracle: Oracle, failed: float = 0.0) -> Callable[..., Awaitable[list[float | None]]]:
    """Return `async rm(args, samples, **options)`: the gains of the ranks of one group; see `as_reward`."""

    async def rm(args: Any, samples: Sequence[Any], **options: Any) -> list[float | None]:
        reward = as_reward(oracle, group_size=len(samples), failed=failed)
        columns = {"reference": [sample.label for sample in samples]}
        prompts, responses = [sample.prompt for sample in samples], [sample.response for sample in samples]
        return await asyncio.to_thread(lambda: reward(prompts, responses, **columns))

    return rm


def ranked_advantages(
    oracle: Oracle, **options: Any
) -> Callable[[Any, Sequence[Any]], tuple[list[float], list[float]]]:
    """Return `post_process(args, samples) -> (raw, rewards)`: gains, and the advantages of `rank_advantages`.

    The policy's own order is by the mean of `Sample.rollout_log_probs` where `Sample.loss_mask` is set; a sample
    without such a token has no advantage. Samples with equal `Sample.group_index` are a group.

    Args:
        oracle: Ranks the groups.
        options: `kind`, `penalty_weight`, `scale` and `media`, as in `RowRanker`.

    The function raises a ValueError if a sample has no group, or lacks log-probabilities that the kind needs.
    """
    ranker = RowRanker(oracle, **options)

    def post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
        groups = [sample.group_index for sample in samples]
        if None in groups:
            raise ValueError(
                f"Sample.group_index must say what is a group; got None in sample {groups.index(None)}"
            )
        ranked = ranker(
            groups,
            [sample.prompt for sample in samples],
            [sample.response for sample in samples],
            [sample.label for sample in samples],
            ranker.scores(
                [_logps(sample) for sample in samples],
                "a sample has no rollout_log_probs; have the rollout return them",
            ),
        )
        return ranked.gains, ranked.advantages.tolist()

    return post_process


def _logps(sample: Any) -> Sequence[float] | None:
    """The log-probabilities of the trained tokens; None if the rollout recorded none."""
    logps, mask = sample.rollout_log_probs, sample.loss_mask
    if logps is None or mask is None:
        return logps
    if len(mask) != len(logps):
        raise ValueError(
            f"Sample.loss_mask must have {len(logps)} values as rollout_log_probs has; got {len(mask)}"
        )
    return [logp for logp, trained in zip(logps, mask) if trained]
