"""Groups of any order and unequal size: flat responses laid out in a padded grid, and back.

Letters: B responses, N groups (in ascending order of their index), G the size of the largest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss import checks, ops
from rlaif_fast.loss.inputs import LossArguments, Padding, RankAdvantages
from rlaif_fast.loss.options import RANKING_STATS, LossOptions, RankOptions
from rlaif_fast.loss.reference.rank_loss import policy_scores, ranking_stats


class Grouping:
    """Where each response stands. The size of the grid is read on the host."""

    def __init__(self, index: Tensor) -> None:  # (B,)
        _, group, counts = index.unique(return_inverse=True, return_counts=True)
        order = group.argsort(stable=True)
        first = counts.cumsum(0) - counts
        place = torch.empty_like(group)
        place[order] = torch.arange(len(group), device=group.device) - first[group[order]]
        self.at = (group, place)
        self.shape = (len(counts), int(counts.max()) if len(counts) else 1)

    def grid(self, x: Tensor) -> Tensor:  # (B,) -> (N, G)
        """Lay responses out in the grid; empty cells are 0, or false."""
        out = x.new_zeros(self.shape)
        out[self.at] = x
        return out

    def flat(self, x: Tensor) -> Tensor:  # (N, G) -> (B,)
        """Take the responses out of the grid again."""
        return x[self.at]


def rank_by_index(
    scores: Tensor,  # (B,)
    oracle_ranks: Tensor,  # (B,)
    group_index: Any,  # (B,)
    judged: Tensor | None,  # (B,) bool
    weights: Tensor | None,  # (N,)
    valid: Tensor | None,  # (N,) bool
    options: RankOptions,
    validate: bool,
    backend: str,
) -> tuple[RankAdvantages, list[Tensor]]:
    """Return advantages and penalties (B,), the rest (N,); and the means over what was ranked."""
    checks.floating("scores", scores, ("B",))
    shape = tuple(scores.shape)
    checks.ranks(oracle_ranks, shape, like=scores)
    checks.integers("group_index", group_index, shape, like=scores)
    if judged is None:
        judged = torch.ones(shape, dtype=torch.bool, device=scores.device)
    checks.boolean("judged", judged, shape, like=scores)
    grouping = Grouping(group_index)
    grid = grouping.grid
    rest = (weights, valid, options, validate)
    inputs = checks.rank_inputs(grid(scores.detach()), grid(oracle_ranks), grid(judged), *rest)
    result = ops.rank_advantages(inputs, options, backend)
    stats = ranking_stats(result, inputs.judged, scores.new_zeros(()))
    flat = result._replace(
        advantages=grouping.flat(result.advantages), penalties=grouping.flat(result.penalties)
    )
    return flat, stats


def close_groups(
    like: Tensor,  # of the dtype of the statistics, float32 or wider
    shape: tuple[int, ...],  # of the tokens: (B, T), or (M,) with padding
    logps: Tensor | None,  # None where they are not known yet
    oracle_ranks: Tensor | None,  # (B,)
    arguments: LossArguments,
    padding: Padding | None,
    backend: str,
) -> tuple[Tensor | None, LossArguments, dict[str, Tensor]]:
    """Rank the responses beforehand where a loss is given a group_index.

    Returns:
        The ranks and the arguments to use instead, and the statistics of the ranking.
    """
    index = arguments.get("group_index")
    if index is None:
        return oracle_ranks, arguments, {}
    if oracle_ranks is None or arguments.get("advantages") is not None:
        raise ValueError("group_index belongs to oracle_ranks; got advantages")
    for name in ("group_size", "valid"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} must be None with group_index, which says which responses are a group")
    options = checks.loss_options(arguments)
    responses = shape[0] if padding is None else len(padding.mask)
    checks.tensor("oracle_ranks", oracle_ranks, (responses,), like=like)
    ranking, stats = rank_by_index(
        _scores(like, shape, logps, responses, arguments, options, padding).to(like.dtype),
        oracle_ranks,
        index,
        arguments.get("judged"),
        arguments.get("weights"),
        None,
        RankOptions(options.kind, options.penalty_weight, options.scale),
        arguments.get("validate", True),
        backend,
    )
    used = ("group_index", "judged", "weights", "scores", *checks.OF_RANKS)
    rest: Any = {name: value for name, value in arguments.items() if name not in used}
    rest["advantages"] = ranking.advantages
    return None, rest, dict(zip(RANKING_STATS, stats))


def _scores(
    like: Tensor,
    shape: tuple[int, ...],
    logps: Tensor | None,
    responses: int,
    arguments: LossArguments,
    options: LossOptions,
    padding: Padding | None,
) -> Tensor:  # (B,)
    """Return what orders the policy's responses: `scores`, else `old_logps`, else `logps`; 0 where nothing has to."""
    scores: Any = arguments.get("scores")
    if scores is not None:
        checks.floating("scores", scores, (responses,), like=like)
        return scores
    if not options.orders_policy:
        return like.new_zeros(responses)
    old = checks.per_token("old_logps", arguments.get("old_logps"), shape, like)
    logps = logps if old is None else old
    if logps is None:
        raise ValueError("scores or old_logps must be given with group_index and hidden states; got neither")
    mask = checks.mask(arguments.get("mask"), shape, like, arguments.get("validate", True))
    mask = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask
    if padding is not None:
        logps, mask = padding.pad(logps), padding.pad(mask)
    return policy_scores(logps.to(like.dtype), mask, 1, options.score).view(-1)
