"""What a run monitors in its oracle, to detect reward hacking and a judge that does not look.

All figures are plain numbers for the log. Correlations are Kendall's tau-b, averaged over the groups where it
is defined; a figure that is defined for no group is left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from rlaif_fast.errors import require_least
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest, Verdict, rank_all
from rlaif_fast.oracle.fusion import Order, kendall_tau, top1_agreement
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.oracle.wrappers import CircuitBreaker, OracleFailedError


def oracle_stats(
    requests: Sequence[RankRequest],
    rankings: Sequence[Ranking],
    *,
    reference: ReferenceOracle | None = None,
) -> dict[str, float]:
    """The figures of one step.

    Args:
        requests: What was asked.
        rankings: What came back, in the same order.
        reference: Compares with the reference answers, if there are any; None skips that.

    Returns:
        oracle/groups, oracle/invalid, oracle/abstained, oracle/tied, oracle/confidence, oracle/tokens;
        oracle/length_tau (positive: longer is ranked better); oracle/position_bias (positive:
        what is shown first is ranked better; 0 is fair); oracle/reference_tau and oracle/reference_top1.
    """
    valid = [pair for pair in zip(requests, rankings) if pair[1].valid]
    judged = [[rank for rank in ranking.ranks if rank is not None] for _, ranking in valid]
    responses = sum(len(ranking.ranks) for _, ranking in valid)
    stats: dict[str, float | None] = {
        "oracle/groups": float(len(rankings)),
        "oracle/invalid": 1.0 - len(valid) / len(rankings) if rankings else None,
        "oracle/abstained": 1.0 - sum(map(len, judged)) / responses if responses else None,
        "oracle/tied": _mean([float(len(set(ranks)) == 1) for ranks in judged]),
        "oracle/confidence": _mean([ranking.confidence for _, ranking in valid]),
        "oracle/tokens": float(sum(ranking.tokens for ranking in rankings)),
        "oracle/length_tau": length_tau(requests, rankings),
        "oracle/position_bias": position_bias(rankings),
    }
    if reference is not None:
        stats["oracle/reference_tau"], stats["oracle/reference_top1"] = reference_agreement(
            requests, rankings, reference
        )
    return {key: value for key, value in stats.items() if value is not None}


def length_tau(requests: Sequence[RankRequest], rankings: Sequence[Ranking]) -> float | None:
    """How far longer responses are ranked better, in [-1, 1]; length in characters."""
    taus = [
        kendall_tau(ranking.ranks, [-len(response) for response in request.responses])
        for request, ranking in zip(requests, rankings)
        if ranking.valid
    ]
    return _mean(taus)


def position_bias(rankings: Sequence[Ranking]) -> float | None:
    """How far what is shown first is ranked better, in [-1, 1], over the single orders of the judges.

    Every order comes with its reverse, so the quality of the responses cancels and only the slot's pull remains.
    """
    taus: list[float | None] = []
    for ranking in rankings:
        for verdict in ranking.verdicts:
            if isinstance(verdict, Verdict) and verdict.error is None:
                slots = range(len(verdict.order))
                taus.append(kendall_tau(slots, [verdict.ranks[i] for i in verdict.order]))
    return _mean(taus)


def reference_agreement(
    requests: Sequence[RankRequest], rankings: Sequence[Ranking], reference: ReferenceOracle
) -> tuple[float | None, float | None]:
    """Tau and top-1 agreement with the rule-based ranking, over the groups that have a reference answer."""
    pairs: list[tuple[Order, Order]] = []
    for request, ranking in zip(requests, rankings):
        if ranking.valid and request.reference:
            pairs.append((ranking.ranks, reference.rank([request])[0].ranks))
    return _mean([kendall_tau(*pair) for pair in pairs]), _mean([top1_agreement(*pair) for pair in pairs])


def blind_control(
    oracle: Oracle,
    requests: Sequence[RankRequest],
    rankings: Sequence[Ranking],
    *,
    sample: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Ask the same oracle again without the frames, on a sample of the groups.

    A judge that ranks the same without looking at the video does not judge by the video.

    Returns:
        oracle/blind_tau and oracle/blind_top1, the agreement of the blind ranking with the seeing one; empty
        if no sampled group has frames, or nothing was ranked blindly.
    """
    require_least("sample", sample, 1)
    seen = [pair for pair in zip(requests, rankings) if pair[0].clips and pair[1].valid]
    chosen = random.Random(seed).sample(seen, min(sample, len(seen)))
    if not chosen:
        return {}
    # A judge that declines to judge blindly must not stop the run.
    if isinstance(oracle, CircuitBreaker):
        oracle = oracle.inner
    try:
        blind = rank_all(oracle, [replace(request, clips=()) for request, _ in chosen])
    except OracleFailedError:  # from a nested breaker
        return {}
    pairs = [(ranking.ranks, other.ranks) for (_, ranking), other in zip(chosen, blind) if other.valid]
    stats = {
        "oracle/blind_tau": _mean([kendall_tau(*pair) for pair in pairs]),
        "oracle/blind_top1": _mean([top1_agreement(*pair) for pair in pairs]),
    }
    return {key: value for key, value in stats.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
