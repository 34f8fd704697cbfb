"""The fused head in mixed dtypes: bias, autocast, upstream scale, float32 copies of the weight."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from linear_parts import evaluate

from rlaif_fast import fused_linear_grpo_rank_loss, token_logps
from rlaif_fast.loss.testing import TOLERANCES, random_problem, relative, relative_l2


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_head_and_keeps_statistics_wide(autocast):
    problem = random_problem()
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        out = fused_linear_grpo_rank_loss(
            hidden, weight, problem.token_ids, problem.oracle_ranks, backend="cpu", **problem.tensors
        )
    out.loss.backward()
    low = random_problem()
    low_hidden, low_weight = (
        low.hidden.to(autocast).requires_grad_(),
        low.weight.to(autocast).requires_grad_(),
    )
    want = fused_linear_grpo_rank_loss(
        low_hidden, low_weight, low.token_ids, low.oracle_ranks, backend="cpu", **low.tensors
    )
    want.loss.backward()
    assert out.loss.dtype == torch.float32 and torch.equal(out.loss, want.loss)
    assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, low_weight.grad.float())
    assert torch.equal(hidden.grad, low_hidden.grad.float())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_another_dtype(dtype, bias_dtype, backend):
    problem = random_problem(dtype=dtype)
    problem = dataclasses.replace(problem, bias=problem.bias.to(bias_dtype))
    got, got_grads = evaluate(problem, backend, beta=0.04)
    want, want_grads = evaluate(problem.double(), "reference", beta=0.04)
    bound = TOLERANCES[dtype]
    assert relative(got.loss, want.loss) <= bound.value
    for a, b, x in zip(got_grads, want_grads, (problem.hidden, problem.weight, problem.bias)):
        rounding = max(TOLERANCES[dtype].gradient, TOLERANCES[x.dtype].gradient)
        assert a.dtype == x.dtype and relative_l2(a, b) <= rounding


def test_upstream_gradients_are_not_rounded_to_the_gradient_s_dtype():
    """1/3 in bfloat16 is off by 0.2%: a gradient that is a power of two shows it."""
    hidden = torch.ones(1, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[0.0] * 4, [0.0] * 4], dtype=torch.bfloat16, requires_grad=True)
    out = fused_linear_grpo_rank_loss(
        hidden, weight, torch.zeros(1, 1, dtype=torch.long), advantages=torch.ones(1)
    )
    (out.loss * 3.0078125).backward()  # bfloat16 would make it 3.0
    assert torch.equal(weight.grad[0], torch.full((4,), -1.5, dtype=torch.bfloat16) * 1.0026)


@pytest.mark.parametrize("chunk_size", [5, None])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float32_weight_gets_the_gradient_in_float32(chunk_size, backend):
    problem = random_problem(dtype=torch.bfloat16)
    arguments = {"bias": problem.bias, "chunk_size": chunk_size, "backend": backend, **problem.tensors}
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
    copy = torch.randn(problem.weight.shape, requires_grad=True)  # its values are not read
    for _ in range(2):
        out = fused_linear_grpo_rank_loss(
            *leaves, problem.token_ids, problem.oracle_ranks, float32_weight=copy, **arguments
        )
        (out.loss / 3).backward()
    _, grads = evaluate(problem.double(), "reference")
    assert leaves[1].grad is None and leaves[0].grad is not None
    assert relative_l2(copy.grad, grads[1] * (2 / 3)) <= TOLERANCES[torch.float32].gradient


@pytest.mark.parametrize("chunk_size", [5, None])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float32_weight_gets_the_gradient_of_log_probabilities(chunk_size, backend):
    problem = random_problem(dtype=torch.bfloat16)
    hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    copy = torch.zeros(weight.shape, requires_grad=True)
    options = {"bias": problem.bias, "chunk_size": chunk_size, "backend": backend}
    logps = token_logps(hidden, weight, problem.token_ids, float32_weight=copy, **options)
    (logps * logps.detach()).sum().backward()
    exact = problem.double()
    wide = exact.weight.clone().requires_grad_()
    options |= {"bias": exact.bias, "backend": "reference"}
    expected = token_logps(exact.hidden, wide, exact.token_ids, **options)
    (expected * expected.detach()).sum().backward()
    assert weight.grad is None and hidden.grad is not None
    assert relative_l2(copy.grad, wide.grad) <= TOLERANCES[torch.float32].gradient


def test_float32_weight_of_another_shape_or_dtype_is_refused():
    problem = random_problem(dtype=torch.bfloat16)
    call = partial(
        fused_linear_grpo_rank_loss,
        *(problem.hidden, problem.weight, problem.token_ids, problem.oracle_ranks),
        **problem.tensors,
    )
    with pytest.raises(TypeError, match="float32_weight must be float32; got"):
        call(float32_weight=problem.weight.clone())
    with pytest.raises(ValueError, match="float32_weight must be"):
        call(float32_weight=problem.weight[1:].float())
