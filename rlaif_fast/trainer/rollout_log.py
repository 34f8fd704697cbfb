"""What is recorded of a rollout before anything is learned from it."""

from __future__ import annotations

import math

from rlaif_fast.oracle.monitors import blind_control, counters, oracle_stats
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.trainer.groups import RankedRollout, concat, rank_requests, rollout_records
from rlaif_fast.trainer.run import Run


def log_rollouts(run: Run, ranked: RankedRollout | None, step: int) -> dict:
    """Record what all processes sampled in a step and return its statistics; in the other processes, nothing."""
    config, logger, world = run.config, run.logger, run.world
    shards = world.gather((ranked and ranked.without_media(), counters(run.oracle)))
    if not world.is_main:
        return {}
    sampled = [shard for shard, _ in shards if shard is not None]
    stats: dict = {}
    if sampled:
        everything = concat(sampled)
        logger.rollouts(step + 1, rollout_records(everything, step + 1))
        stats |= rollout_stats(everything)
    for _, counted in shards:
        stats |= {name: stats.get(name, 0.0) + count for name, count in counted.items()}
    if config.blind_control > 0 and (step + 1) % config.eval_steps == 0 and ranked is not None:
        requests = rank_requests(ranked.batch, ranked.rollout.texts, config.num_generations)
        with logger.timer("oracle"):
            stats |= blind_control(
                run.oracle, requests, ranked.rankings, sample=config.blind_control, seed=config.seed + step
            )
    return stats


def rollout_stats(ranked: RankedRollout) -> dict:
    """What is logged of a rollout before anything is learned from it."""
    rollout, g = ranked.rollout, ranked.rollout.num_generations
    judge = ReferenceOracle()
    correct, scored = 0, 0
    requests = rank_requests(ranked.batch, rollout.texts, g)
    for request in requests:
        if request.reference is not None:
            correct += sum(judge.is_correct(request, text) for text in request.responses)
            scored += g
    valid = ranked.valid
    best_by_policy = ranked.scores.argmax(1)
    top1 = [
        ranking.ranks[int(best)] == 0
        for ranking, best in zip(ranked.rankings, best_by_policy)
        if ranking.valid
    ]
    return {
        "accuracy": correct / scored if scored else math.nan,
        "ndcg": ranked.ndcg.nanmean(),
        "kendall_tau": ranked.kendall_tau.nanmean(),
        "top1_agreement": sum(top1) / len(top1) if top1 else math.nan,
        "no_signal": 1.0 - ranked.has_signal.float().mean(),
        "invalid": 1.0 - valid.float().mean(),
        "groups": len(ranked.batch),
        "completion_length": rollout.mask.sum(1).float().mean(),
        "truncated": 1.0 - rollout.finished.float().mean(),
        **oracle_stats(requests, ranked.rankings, reference=judge),
    }
