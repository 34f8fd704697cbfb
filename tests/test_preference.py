"""The losses of preferences on the chunk driver: formulas, reference, CPU kernels, chunks, packing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlaif_fast import fused_linear_dpo_loss, fused_linear_lipo_loss
from rlaif_fast.loss.testing import TOLERANCES, Problem, random_problem, relative, relative_l2

LABELS = torch.tensor([[0.5, 0.0, 1.0], [0.25, 0.25, 0.25], [1.0, 0.5, 0.0], [0.0, 0.875, 0.375]])
JUDGED = torch.tensor([[True] * 3, [True] * 3, [True] * 3, [True, False, True]])
WEIGHTS = torch.tensor([1.0, 0.75, 0.0, 0.375])
LOSSES = {
    "dpo": (fused_linear_dpo_loss, 2, {"pair_weights": WEIGHTS}),
    "lipo": (fused_linear_lipo_loss, 3, {"labels": LABELS, "judged": JUDGED, "group_weights": WEIGHTS}),
}


def evaluate(problem: Problem, backend: str, packed: bool = False, *, name: str = "dpo", **options):
    """Return the output and the gradients of hidden, weight and bias."""
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    mask, ids, hidden = problem.tensors["mask"], problem.token_ids, leaves[0]
    if packed:
        hidden, ids, options = hidden[mask], ids[mask], {"lengths": mask.sum(-1), **options}
    else:
        options = {"mask": mask, **options}
    reference = (problem.tensors["ref_logps"] * mask).sum(-1)
    loss, _, inputs = LOSSES[name]
    inputs = {key: x.to(hidden.dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    out = loss(
        hidden, leaves[1], ids, ref_logps_sum=reference, bias=leaves[2], backend=backend, **inputs, **options
    )
    return out, torch.autograd.grad(out.loss, leaves)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_the_reference(dtype, chunk_size, packed, name):
    problem = random_problem(N=4, G=LOSSES[name][1], V=65, dtype=dtype)
    options = {"beta": 0.3, "temperature": 0.7, "name": name, "num_items_in_batch": 3.0}
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


def plain_loss(name, rewards, inputs, items):
    """The two formulas, pair by pair."""
    total = torch.zeros((), dtype=rewards.dtype)
    if name == "dpo":
        for p, w in enumerate(inputs["pair_weights"].tolist()):
            total = total - w * logsigmoid(rewards[2 * p] - rewards[2 * p + 1])
        return total / items
    labels, judged = inputs["labels"].tolist(), inputs["judged"].tolist()
    for n, w in enumerate(inputs["group_weights"].tolist()):
        s = rewards.view(len(labels), -1)[n]
        members = [i for i in range(len(s)) if judged[n][i]]
        place = {i: 1 + sum(s[j].item() > s[i].item() for j in members) for i in members}
        for i in members:
            for j in members:
                if labels[n][i] > labels[n][j]:
                    gain = 2 ** labels[n][i] - 2 ** labels[n][j]
                    swap = abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
                    total = total + w * gain * swap * torch.log1p(torch.exp(s[j] - s[i]))
    return total / items


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_plain_autograd(name):
    problem = random_problem(N=4, G=LOSSES[name][1], V=65, dtype=torch.float64)
    out, gradients = evaluate(problem, "cpu", name=name, beta=0.3, num_items_in_batch=5, chunk_size=7)
    hidden, weight, bias = (
        x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)
    )
    logps = (hidden @ weight.t() + bias).log_softmax(-1)
    mask = problem.tensors["mask"]
    chosen = logps.gather(-1, problem.token_ids.where(mask, 0)[..., None])[..., 0]
    rewards = 0.3 * ((chosen - problem.tensors["ref_logps"]) * mask).sum(-1)
    expected = plain_loss(name, rewards, LOSSES[name][2], 5)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.rewards, rewards.detach())
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [hidden, weight, bias])):
        torch.testing.assert_close(ours, theirs)


def test_the_dpo_loss_is_liger_s():
    peer = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(beta=0.3, compiled=False)
    problem = random_problem(N=4, G=2, V=65)
    mask, ids = problem.tensors["mask"], problem.token_ids
    start = 0.9 * problem.weight  # the reference's head
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    logps = (problem.hidden @ start.t() + problem.bias).log_softmax(-1)
    reference = (logps.gather(-1, ids.where(mask, 0)[..., None])[..., 0] * mask).sum(-1)
    out = fused_linear_dpo_loss(
        *leaves[:2], ids, ref_logps_sum=reference, bias=leaves[2], mask=mask, beta=0.3
    )
    ours = torch.autograd.grad(out.loss, leaves)

    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # Liger wants the chosen half first
    targets = ids.where(mask, -100)[order]
    loss, _ = peer(
        leaves[1], leaves[0][order], targets, leaves[2], problem.hidden[order], start, problem.bias
    )
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, torch.autograd.grad(loss, leaves)):
        assert relative_l2(a, b) <= 1e-5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    problem = random_problem(N=2, G=2, T=3, V=7, H=4, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]

    def loss(hidden, weight, bias):
        return fused_linear_dpo_loss(
            hidden, weight, problem.token_ids, bias=bias, ref_logps_sum=problem.logps.sum(-1), backend=backend
        ).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_under_the_mask_does_not_count(name):
    problem = random_problem(N=4, G=LOSSES[name][1])
    clean, clean_grads = evaluate(problem, "cpu", name=name)
    problem.token_ids[~problem.tensors["mask"]] = -100
    dirty, dirty_grads = evaluate(problem, "cpu", name=name)
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
    with pytest.raises(ValueError, match="num_items_in_batch must be above 0"):
        fused_linear_dpo_loss(hidden[:2], weight, ids[:2], ref_logps_sum=torch.zeros(2), num_items_in_batch=0)
    with pytest.raises(ValueError, match=r"pair_weights must be .*\(1,\)"):
        fused_linear_dpo_loss(
            hidden[:2], weight, ids[:2], ref_logps_sum=torch.zeros(2), pair_weights=torch.ones(2)
        )
    with pytest.raises(ValueError, match=r"labels must be \(N, G\) with N \* G = 3 responses, got \(2, 2\)"):
        fused_linear_lipo_loss(hidden, weight, ids, ref_logps_sum=torch.zeros(3), labels=torch.zeros(2, 2))
    with pytest.raises(TypeError, match="unexpected arguments: betta"):
        fused_linear_dpo_loss(hidden[:2], weight, ids[:2], ref_logps_sum=torch.zeros(2), betta=0.1)
