"""rLLM (0.3): an advantage estimator based on an oracle.

    from rlaif_fast.adapters.rllm import register
    register("oracle", ReferenceOracle())

and `AgentTrainer(..., traj_group_adv_estimator_map={role: "oracle"})`: rLLM takes names that it does not know only
from the map, not from `algorithm.adv_estimator`. With the backend verl, `algorithm.loss_fn` may be our loss
(`rlaif_fast.adapters.verl_plugin`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlaif_fast.adapters.ranking import RowRanker
from rlaif_fast.oracle.base import Oracle

Arrays = list[np.ndarray]


def estimator(
    oracle: Oracle, *, reference: str = "ground_truth", **options: Any
) -> Callable[..., tuple[Arrays, Arrays]]:
    """Return `fn(rewards, algorithm_config, traj_groups=...) -> (advantages, returns)`, one array per group.

    The oracle reads everything before the first answer of a trajectory as the prompt, and all of its answers as the
    response; rewards are not read. The policy's own order is by the mean log-probability of the sampled tokens; a
    trajectory without a step or a token has no advantage.

    Args:
        oracle: Ranks the trajectories of each group.
        reference: Key of a task's metadata with the reference answer.
        options: Options of `RowRanker`.
    """
    ranker = RowRanker(oracle, **options)

    def oracle_advantages(
        rewards: Sequence[np.ndarray], algorithm_config: Any, *, traj_groups: Sequence[Any], **other: Any
    ) -> tuple[Arrays, Arrays]:
        places = [
            (number, place)
            for number, group in enumerate(traj_groups)
            for place, trajectory in enumerate(group.trajectories)
            if trajectory.steps
        ]
        rows = [traj_groups[number].trajectories[place] for number, place in places]
        ranked = ranker(
            [number for number, _ in places],
            [_prompt(row) for row in rows],
            ["\n".join(step.model_response for step in row.steps) for row in rows],
            [_metadata(row.task).get(reference) for row in rows],
            ranker.scores(
                [_logps(row.steps) for row in rows], "these steps have no logprobs; sample with them"
            ),
        )
        advantages = [np.zeros(len(group.trajectories)) for group in traj_groups]
        for (number, place), advantage in zip(places, ranked.advantages.tolist()):
            advantages[number][place] = advantage
        return advantages, advantages

    return oracle_advantages


def register(name: str, oracle: Oracle, **options: Any) -> None:
    """Add an oracle to rLLM's advantage estimators; the options are those of `estimator`."""
    from rllm.trainer.algorithms.advantage import register_rllm_adv_estimator

    register_rllm_adv_estimator(name)(estimator(oracle, **options))


def _prompt(trajectory: Any) -> Any:
    chat = trajectory.steps[0].chat_completions
    return chat[:-1] if chat else getattr(trajectory.task, "instruction", "")


def _metadata(task: Any) -> dict[str, Any]:
    """The metadata of rLLM's task, which is an object with metadata or a row of the data set."""
    return task if isinstance(task, dict) else getattr(task, "metadata", None) or {}


def _logps(steps: Sequence[Any]) -> list[float] | None:
    if any(step.response_ids and not step.logprobs for step in steps):
        return None
    return [logp for step in steps for logp in step.logprobs]
