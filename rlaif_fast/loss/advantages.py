"""From an oracle's ranks to advantages."""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss import backends, checks, ops
from rlaif_fast.loss.options import MAX_GROUP_SIZE, RankOptions
from rlaif_fast.loss.reference.rank_penalty import RankAdvantages, rank_penalty

__all__ = ["RankAdvantages", "rank_advantages"]


def check_ranks(
    oracle_ranks: Tensor,  # (N, G)
    valid: Tensor | None,  # (N,) bool
    kind: str,
    *,
    like: Tensor,
) -> None:
    """Raise unless ranks and the validity mask fit together and hold possible values."""
    checks.tensor("oracle_ranks", oracle_ranks, ("N", "G"), like=like)
    if oracle_ranks.dtype == torch.bool or oracle_ranks.is_complex():
        raise TypeError(
            f"oracle_ranks must be integer or floating point; got {checks.describe(oracle_ranks)}"
        )
    N, G = oracle_ranks.shape
    if not 1 <= G <= MAX_GROUP_SIZE:
        raise ValueError(f"oracle_ranks must have between 1 and {MAX_GROUP_SIZE} responses a group; got {G}")
    if valid is not None:
        checks.tensor("valid", valid, (N,), like=like)
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must be bool; got {checks.describe(valid)}")
    checks.finite_ranks("oracle_ranks", oracle_ranks, valid, negative=kind == "zscore")


def rank_advantages(
    scores: Tensor,  # (N, G)
    oracle_ranks: Tensor,  # (N, G)
    *,
    kind: str = "directed",
    penalty_weight: float = 1.0,
    scale: str = "none",
    valid: Tensor | None = None,  # (N,) bool
    backend: str = "auto",
) -> RankAdvantages:
    """Turn the oracle's ranks of N groups of G responses into advantages.

    Args:
        scores: (N, G) float, the policy's log-probability of each response; higher is more likely. It only
            orders the responses, and with `kind="oracle"` or `"zscore"` does not touch the advantages.
        oracle_ranks: (N, G) int or float, 0 is best and equal numbers tie; only the order counts. With
            `kind="zscore"` they are scalar rewards instead, higher is better.
        kind: "directed" (default), "oracle", "paper", "paper_swapped" or "zscore".
        penalty_weight: w >= 0, how much more a misranked response weighs ("directed").
        scale: "none", or "group" to divide by the root mean square over the group.
        valid: (N,) bool; a group whose ranking failed is false and gets advantages of 0.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `RankAdvantages`, in the dtype of `scores`.

    Raises:
        ValueError: A shape, device or value does not fit.
        TypeError: A dtype or type does not fit.

    Source: arXiv 2510.02561 (GRPO_rank).
    """
    options = RankOptions(kind, penalty_weight, scale)
    checks.floating("scores", scores, ("N", "G"))
    check_ranks(oracle_ranks, valid, kind, like=scores)
    checks.floating("scores", scores, tuple(oracle_ranks.shape))
    scores = scores.detach()
    if kind in ("oracle", "zscore"):
        scores = scores.nan_to_num()  # ignored, so it may hold anything
    else:
        checks.not_nan("scores", scores, valid)
    chosen = backends.select("rank_penalty", backend, scores, oracle_ranks.shape[1])
    if chosen == "reference":
        return rank_penalty(scores, oracle_ranks.detach(), valid, options)
    return ops.rank_advantages(scores, oracle_ranks.detach(), valid, options, chosen)
