"""Derivatives that the kernels have not are refused, not taken for 0; the reference has them."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from rlaif_fast import (
    fused_linear_grpo_rank_loss,
    grpo_rank_loss,
    grpo_rank_loss_from_logits,
    selective_log_softmax,
    token_logps,
)
from rlaif_fast.loss.preference import fused_linear_dpo_loss
from rlaif_fast.loss.testing import random_problem

PROBLEM = random_problem(dtype=torch.float64)
OTHERS = {"mask": PROBLEM.tensors["mask"], "old_logps": PROBLEM.tensors["old_logps"]}
IDS, RANKS, HEAD = PROBLEM.token_ids, PROBLEM.oracle_ranks, PROBLEM.weight
REFERENCE = torch.zeros(len(IDS), dtype=torch.float64)
REFUSED = r"not by torch\.func or in forward mode"
FORMS = {  # what is differentiated, and a number made of it
    "logps": (PROBLEM.logps, lambda x, on: grpo_rank_loss(x, RANKS, backend=on, **OTHERS).loss),
    "logits": (
        PROBLEM.logits,
        lambda x, on: grpo_rank_loss_from_logits(x, IDS, RANKS, backend=on, **OTHERS).loss,
    ),
    "hidden": (
        PROBLEM.hidden,
        lambda x, on: fused_linear_grpo_rank_loss(x, HEAD, IDS, RANKS, backend=on, **OTHERS).loss,
    ),
    "weight": (
        HEAD,
        lambda x, on: fused_linear_grpo_rank_loss(PROBLEM.hidden, x, IDS, RANKS, backend=on, **OTHERS).loss,
    ),
    "log-softmax": (PROBLEM.logits, lambda x, on: selective_log_softmax(x, IDS, backend=on).sum()),
    "token_logps": (PROBLEM.hidden, lambda x, on: token_logps(x, HEAD, IDS, backend=on).sum()),
    "dpo": (
        PROBLEM.hidden,
        lambda x, on: fused_linear_dpo_loss(x, HEAD, IDS, ref_logps_sum=REFERENCE, backend=on).loss,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_derivative_forwards_is_refused(form):
    x, number = FORMS[form]
    direction = torch.randn_like(x)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.jvp(lambda x: number(x, "auto"), (x,), (direction,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=REFUSED):
        number(forward_ad.make_dual(x, direction), "auto")
    with forward_ad.dual_level():  # what has no tangent is not refused
        assert torch.equal(number(x, "auto"), number(x, "auto"))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(number(leaf, "auto"), leaf)
    _, along = torch.func.jvp(lambda x: number(x, "reference"), (x,), (direction,))
    torch.testing.assert_close(along, (gradient * direction).sum())


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_by_torch_func_is_refused(form):
    x, number = FORMS[form]
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.grad(lambda x: number(x, "auto"))(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(number(leaf, "auto"), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: number(x, "reference"))(x), gradient)
