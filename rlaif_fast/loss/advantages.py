"""The advantages of responses: ranks or rewards in, (N, G) out, each kind beside its formula.

Letters: N groups, G responses a group, u gain in the oracle's order, p rank penalty, w penalty_weight.
"""

from __future__ import annotations

from torch import Tensor

from rlaif_fast.loss.options import RankOptions

ZSCORE_EPS = 1e-4  # added to the standard deviation of a group
SCALE_EPS = 1e-6  # added to the root mean square of a group


def directed(u: Tensor, penalty: Tensor, w: float) -> Tensor:
    """b = u - mean u;  a = b (1 + w p);  A = a - mean a."""
    a = oracle(u) * (1 + w * penalty)
    return a - _mean(a)


def oracle(u: Tensor) -> Tensor:
    """A = u - mean u: the oracle's order alone."""
    return u - _mean(u)


def paper(penalty: Tensor) -> Tensor:
    """A = mean p - p, for either of the paper's penalties."""
    return _mean(penalty) - penalty


def zscore(reward: Tensor) -> Tensor:
    """A = (R - mean R) / (std R + 1e-4): plain GRPO."""
    centred = reward - _mean(reward)
    G = reward.shape[-1]
    std = (centred.square().sum(-1, keepdim=True) / max(G - 1, 1)).sqrt()
    return centred / (std + ZSCORE_EPS)


def advantages_of(
    u: Tensor,  # (N, G)
    penalty: Tensor,  # (N, G)
    oracle_ranks: Tensor,  # (N, G); rewards with kind="zscore"
    tied: Tensor,  # (N,) bool, the oracle ties the whole group
    options: RankOptions,
) -> Tensor:  # (N, G)
    """Return the advantages of a kind, scaled where asked."""
    if options.kind in ("paper", "paper_swapped"):
        A = paper(penalty)
    else:
        if options.kind == "zscore":
            A = zscore(oracle_ranks)
        elif options.kind == "oracle":
            A = oracle(u)
        else:
            A = directed(u, penalty, options.penalty_weight)
        A = A.masked_fill(tied[:, None], 0.0)  # exact zeros, whatever the mean rounded to
    if options.scale == "group":
        A = A / (_mean(A.square()).sqrt() + SCALE_EPS)
    return A


def _mean(x: Tensor) -> Tensor:  # (N, G) -> (N, 1)
    return x.mean(-1, keepdim=True)
