"""The fused head against its reference."""

from __future__ import annotations

import torch

from rlaif_fast import fused_linear_grpo_rank_loss
from rlaif_fast.loss.testing import TOLERANCES, Problem, relative, relative_l2


def evaluate(problem: Problem, backend: str, packed: bool = False, **options):
    """Return the output and the gradients of hidden, weight and bias."""
    hidden, weight, bias = (
        x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)
    )
    tensors, ids, h = dict(problem.tensors), problem.token_ids, hidden
    if packed:
        mask = tensors.pop("mask")
        tensors = {name: x[mask] for name, x in tensors.items()}
        h, ids = hidden[mask], ids[mask]
        options["lengths"] = mask.sum(-1)
    use = {**tensors, **options}
    ranks = None if "advantages" in use else problem.oracle_ranks
    out = fused_linear_grpo_rank_loss(h, weight, ids, ranks, bias=bias, backend=backend, **use)
    return out, torch.autograd.grad(out.loss, [hidden, weight, bias])


def assert_matches(problem: Problem, packed: bool = False, chunk_size: int | None = None, **options):
    got, got_grads = evaluate(problem, "cpu", packed, chunk_size=chunk_size, **options)
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
    want, want_grads = evaluate(problem.double(), "reference", packed, **wide)
    bound = TOLERANCES[problem.hidden.dtype]
    assert relative(got.loss, want.loss) <= bound.value
    assert relative(got.advantages, want.advantages) <= bound.value
    for name, value in want.stats.items():
        assert relative(got.stats[name], value) <= bound.value, name
    for a, b in zip(got_grads, want_grads):
        assert a.dtype == problem.hidden.dtype and relative_l2(a, b) <= bound.gradient
