"""The DPO loss on the chunk driver: reference, CPU kernels, chunks, packing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlaif_fast import fused_linear_dpo_loss
from rlaif_fast.loss.testing import TOLERANCES, Problem, random_problem, relative, relative_l2


def evaluate(problem: Problem, backend: str, packed: bool = False, **options):
    """Return the output and the gradients of hidden, weight and bias."""
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    mask, ids, hidden = problem.tensors["mask"], problem.token_ids, leaves[0]
    if packed:
        hidden, ids, options = hidden[mask], ids[mask], {"lengths": mask.sum(-1), **options}
    else:
        options = {"mask": mask, **options}
    reference = (problem.tensors["ref_logps"] * mask).sum(-1)
    out = fused_linear_dpo_loss(
        hidden, leaves[1], ids, ref_logps_sum=reference, bias=leaves[2], backend=backend, **options
    )
    return out, torch.autograd.grad(out.loss, leaves)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_the_reference(dtype, chunk_size, packed):
    problem = random_problem(N=4, G=2, V=65, dtype=dtype)
    options = {"beta": 0.3, "temperature": 0.7}
    got, got_grads = evaluate(problem, "cpu", packed, chunk_size=chunk_size, **options)
    want, want_grads = evaluate(problem.double(), "reference", packed, **options)
    bound = TOLERANCES[dtype]
    assert relative(got.loss, want.loss) <= bound.value
    assert relative(got.rewards, want.rewards) <= bound.value
    for name, value in want.stats.items():
        assert relative(got.stats[name], value) <= bound.value, name
    for a, b in zip(got_grads, want_grads):
        assert a.dtype == dtype and relative_l2(a, b) <= bound.gradient


def test_the_loss_is_the_formula():
    """One pair of one token each: loss = -log sigmoid(beta ((c - c_ref) - (r - r_ref)))."""
    hidden, weight = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[0.5], [-0.5]])
    ids, reference = torch.tensor([[0], [1]]), torch.tensor([-0.4, -1.5])
    logp = (hidden * weight.view(1, 1, 2)).log_softmax(-1)
    margin = 0.2 * ((logp[0, 0, 0] + 0.4) - (logp[1, 0, 1] + 1.5))
    out = fused_linear_dpo_loss(hidden, weight, ids, ref_logps_sum=reference, beta=0.2)
    torch.testing.assert_close(out.loss, -logsigmoid(margin))
    torch.testing.assert_close(out.stats["margin"], margin)
    assert out.stats["accuracy"] == float(margin > 0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    problem = random_problem(N=2, G=2, T=3, V=7, H=4, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]

    def loss(hidden, weight, bias):
        return fused_linear_dpo_loss(
            hidden, weight, problem.token_ids, bias=bias, ref_logps_sum=problem.logps.sum(-1), backend=backend
        ).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_what_stands_under_the_mask_does_not_count():
    problem = random_problem(N=2, G=2)
    clean, clean_grads = evaluate(problem, "cpu")
    problem.token_ids[~problem.tensors["mask"]] = -100
    dirty, dirty_grads = evaluate(problem, "cpu")
    assert torch.equal(clean.loss, dirty.loss)
    assert all(torch.equal(a, b) for a, b in zip(clean_grads, dirty_grads))


def test_refusals_name_the_argument():
    hidden, weight, ids = torch.zeros(3, 2, 4), torch.zeros(5, 4), torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"hidden must hold pairs.* got 3 responses"):
        fused_linear_dpo_loss(hidden, weight, ids, ref_logps_sum=torch.zeros(3))
    with pytest.raises(ValueError, match=r"ref_logps_sum must be .*\(2,\)"):
        fused_linear_dpo_loss(hidden[:2], weight, ids[:2], ref_logps_sum=torch.zeros(3))
    with pytest.raises(ValueError, match="beta must be finite and above 0"):
        fused_linear_dpo_loss(hidden[:2], weight, ids[:2], ref_logps_sum=torch.zeros(2), beta=0.0)
