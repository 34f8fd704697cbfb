"""What is recorded of a rollout: its groups, and the statistics of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rlaif_fast.algorithms.group import Group, for_the_log, requests_of
from rlaif_fast.oracle.base import Ranking, RankRequest, counters
from rlaif_fast.oracle.monitors import blind_control, oracle_stats
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.trainer.run import Run
from rlaif_fast.trainer.scoring import AnswerScorer, has_answer


def log_rollouts(run: Run, groups: Sequence[Group], step: int) -> dict:
    """Record what all processes sampled in a step and return its statistics; returns nothing in the other processes."""
    config, logger, world = run.config, run.logger, run.world
    shards = world.gather((for_the_log(groups), counters(run.oracle)))
    if not world.is_main:
        return {}
    everything = [group for shard, _ in shards for group in shard]
    stats: dict = {}
    asked = run.critic is None or run.critic.asks_oracle(step)
    if everything:
        logger.rollouts(rollout_records(everything, step + 1))
        stats |= rollout_stats(everything, run.scorer, asked) | ratio_stats(
            everything, config.sampling_ratio_cap
        )
    for _, counted in shards:
        stats |= {name: stats.get(name, 0.0) + count for name, count in counted.items()}
    if config.blind_control > 0 and (step + 1) % config.eval_steps == 0 and groups and asked:
        rankings = [group.ranking for group in groups]
        with logger.timer("oracle"):
            stats |= blind_control(
                run.oracle,
                requests_of(groups),
                rankings,
                sample=config.blind_control,
                seed=config.seed + step,
            )
    return stats


def rollout_records(groups: Sequence[Group], step: int) -> list[dict]:
    """The groups as records of rollouts.jsonl and samples.jsonl, one per group, ready for JSON."""
    records = []
    for group in groups:
        example, scores = group.prompt.example, group.scores.tolist()
        order = sorted(scores, reverse=True)
        records.append(
            {
                "step": step,
                "example_id": example.id,
                "category": example.category,
                "video": next(iter((*example.videos, *example.images)), None),
                "question": example.question,
                "options": list(example.options),
                "answer": example.answer,
                "metadata": dict(example.metadata),
                "responses": list(group.texts),
                "oracle_ranks": list(group.ranking.ranks),
                "policy_ranks": [order.index(score) for score in scores],
                "advantages": [round(value, 4) for value in group.advantages.tolist()],
                "valid": group.ranking.valid,
                "confidence": group.ranking.confidence,
                **({} if group.ranking.valid else {"error": group.ranking.failure}),
            }
        )
    return records


def rollout_stats(groups: Sequence[Group], scorer: AnswerScorer, asked: bool = True) -> dict:
    """What is logged of a rollout before anything is learned from it.

    Args:
        groups: The rollout's groups.
        scorer: Says which responses are right.
        asked: Whether the run's oracle ranked them; if not, a model did, and the oracle's figures are left out.
    """
    requests, rankings = requests_of(groups), [group.ranking for group in groups]
    right: list[bool] = []
    for group, request in zip(groups, requests):
        if has_answer(group.prompt.example):
            # Groups hold many repeats once the policy is confident; each distinct text is scored once.
            by_text = {text: scorer.is_correct(request, text) for text in set(request.responses)}
            right += [by_text[text] for text in request.responses]
    top1 = [group.ranking.ranks[int(group.scores.argmax())] == 0 for group in groups if group.ranking.valid]
    agreement = torch.stack([group.agreement for group in groups], dim=1)  # (2, groups)
    ndcg, kendall_tau = (row.nanmean() for row in agreement)
    return {
        "accuracy": sum(right) / len(right) if right else math.nan,
        "ndcg": ndcg,
        "kendall_tau": kendall_tau,
        "top1_agreement": sum(top1) / len(top1) if top1 else math.nan,
        "no_signal": 1.0 - _mean([group.has_signal for group in groups]),
        "invalid": 1.0 - _mean([ranking.valid for ranking in rankings]),
        "groups": len(groups),
        "completion_length": _mean([len(tokens) for group in groups for tokens in group.token_ids]),
        "truncated": 1.0 - _mean([done for group in groups for done in group.finished]),
        **(_of_the_oracle(requests, rankings, scorer) if asked else {"oracle/groups": 0.0}),
    }


def _of_the_oracle(
    requests: Sequence[RankRequest], rankings: Sequence[Ranking], scorer: AnswerScorer
) -> dict[str, float]:
    # Another oracle would have to be asked again, and its ranks say nothing about this one.
    return oracle_stats(requests, rankings, reference=scorer if isinstance(scorer, ReferenceOracle) else None)


def ratio_stats(groups: Sequence[Group], cap: float) -> dict:
    """How far the sampler's probabilities are from the policy's; nothing if the policy itself draws."""
    ratios = [group.sampling_ratio for group in groups if group.sampling_ratio is not None]
    if not ratios:
        return {}
    ratio = torch.cat(ratios)
    return {
        "sampling_ratio": ratio.mean(),
        "sampling_ratio_max": ratio.max(),
        "sampling_ratio_capped": (ratio > cap).float().mean(),
    }


def _mean(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).mean()
