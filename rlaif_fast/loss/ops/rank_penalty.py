"""rlaif_fast::rank_advantages: scores and ranks -> advantages, penalties and agreement. No gradient."""

from __future__ import annotations

import torch

from rlaif_fast.loss import backends, reference
from rlaif_fast.loss.inputs import RankAdvantages, RankInputs
from rlaif_fast.loss.options import RankOptions
from rlaif_fast.loss.schema import declare, flatten, unflatten


@torch.library.custom_op(
    "rlaif_fast::rank_advantages",
    mutates_args=(),
    schema=f"({declare(RankInputs, RankOptions)}, str backend) -> (Tensor advantages, Tensor penalties, "
    "Tensor ndcg, Tensor kendall_tau, Tensor has_signal, Tensor top1_agreement)",
)
def _rank_advantages(*arguments):
    inputs, options, backend = unflatten(arguments, RankInputs, RankOptions)
    return tuple(backends.get("rank_penalty", backend).rank_penalty(inputs, options))


@_rank_advantages.register_fake
def _(scores, *_):
    matrix = [torch.empty(scores.shape, dtype=scores.dtype, device=scores.device) for _ in range(2)]
    column = [scores.new_empty(scores.shape[0]) for _ in range(3)]
    signal = scores.new_empty(scores.shape[0], dtype=torch.bool)
    return (*matrix, *column[:2], signal, column[2])


def rank_advantages(inputs: RankInputs, options: RankOptions, backend: str) -> RankAdvantages:
    """Rank N groups on the backend of that name, or the best with "auto"."""
    chosen = backends.select("rank_penalty", backend, inputs.scores, inputs.scores.shape[1])
    if chosen == "reference":
        return reference.rank_penalty(inputs, options)
    return RankAdvantages(*_rank_advantages(*flatten(inputs, options), chosen))
