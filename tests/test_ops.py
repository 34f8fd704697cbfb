"""The operators: schema, shape functions and autograd (opcheck), torch.compile without graph breaks,
determinism.
"""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import rlaif_fast._C as extension
from rlaif_fast import (
    fused_linear_grpo_rank_loss,
    grpo_rank_loss,
    grpo_rank_loss_from_logits,
    rank_advantages,
    token_logps,
)
from rlaif_fast.loss.inputs import RowInputs, Scaling, TokenInputs
from rlaif_fast.loss.options import LossOptions
from rlaif_fast.loss.schema import flatten
from rlaif_fast.loss.testing import random_problem

OPS = torch.ops.rlaif_fast


def flat(problem, **changes):
    """Return the inputs and options of a problem as the operators take them."""
    given = {"oracle_ranks": problem.oracle_ranks.to(problem.logps.dtype), **problem.tensors, **changes}
    return flatten(TokenInputs(**given), LossOptions(beta=0.04, entropy_coef=0.01))


def test_rank_penalty():
    scores, ranks = torch.randn(5, 6), torch.randint(0, 4, (5, 6)).float()
    directed, paper = ("directed", 1.0, "none"), ("paper", 0.5, "group")
    judged, weights = torch.rand(5, 6) > 0.3, torch.rand(5)
    opcheck(OPS.rank_penalty.default, (scores, ranks, None, None, *directed))
    opcheck(OPS.rank_penalty.default, (scores.double(), ranks.double(), judged, weights.double(), *paper))
    opcheck(OPS.rank_advantages.default, (scores, ranks, judged, weights, "directed", 1.0, "group", "cpu"))
    opcheck(OPS.rank_penalty.default, (scores[:0], ranks[:0], None, None, *directed))


def test_row_operators():
    logits, ids = torch.randn(4, 37), torch.randint(0, 37, (4,))
    plain, capped = flatten(Scaling(0.7)), flatten(Scaling(1.0, torch.rand(4) + 0.5, 5.0, 1.5))
    for scaling in (plain, capped):
        opcheck(OPS.row_stats.default, (logits, ids, *scaling))
        opcheck(OPS.row_stats.default, (logits.bfloat16(), ids, *scaling))
        logps, lse, entropy = OPS.row_stats(logits, ids, *scaling)
        rest = (lse, entropy, logps, lse, torch.empty_like(logits))
        opcheck(OPS.row_grad_out.default, (logits, ids, *scaling, *rest))
        rows = RowInputs(torch.randn(4), torch.rand(4), None, None, None)
        opcheck(OPS.row_loss_.default, (logits.clone(), ids, *scaling, *rows, *flatten(LossOptions())))


def test_token_loss():
    problem = random_problem()
    opcheck(OPS.token_loss.default, (problem.logps, problem.entropy, *flat(problem)))
    opcheck(OPS.token_loss.default, (problem.logps, None, *flat(problem, judged=torch.rand(3, 4) > 0.2)))


@pytest.mark.parametrize("backend", ["cpu"])
def test_differentiable_operators(backend):
    problem = random_problem()
    arguments = flat(problem)
    logps, entropy = problem.logps.requires_grad_(), problem.entropy.requires_grad_()
    opcheck(OPS.rank_loss.default, (logps, entropy, *arguments, backend))
    opcheck(OPS.rank_loss.default, (logps, None, *arguments, backend))
    given = flat(problem, advantages=torch.randn(12), oracle_ranks=None)
    opcheck(OPS.rank_loss.default, (logps, entropy, *given, backend))

    logits = problem.logits.requires_grad_()
    scaling = flatten(Scaling(0.7))
    opcheck(OPS.logits_stats.default, (logits, problem.token_ids, *scaling, backend))

    hidden, weight, bias = (x.requires_grad_() for x in (problem.hidden, problem.weight, problem.bias))
    rows, ids = hidden.detach().view(-1, 16).requires_grad_(), problem.token_ids.flatten()
    opcheck(OPS.linear_stats.default, (rows, weight, bias, None, ids, *scaling, 5, backend))
    copy = weight.detach().double().requires_grad_()
    opcheck(OPS.linear_stats.default, (rows, weight, bias, copy, ids, *scaling, 5, backend))
    needs = (True, True, True)
    for wide in (None, copy):
        head = (weight, bias, wide, problem.token_ids, None, None)
        opcheck(OPS.linear_grpo_rank_loss.default, (hidden, *head, *needs, *scaling, *arguments, backend))
    frozen = (weight.detach(), None, None, problem.token_ids, None, 7, True, False, False)
    opcheck(OPS.linear_grpo_rank_loss.default, (hidden, *frozen, *scaling, *arguments, backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiles_without_graph_breaks(backend):
    problem = random_problem()
    tensors, ids, ranks = problem.tensors, problem.token_ids, problem.oracle_ranks
    options = {"beta": 0.04, "entropy_coef": 0.01, "backend": backend}

    def token(logps, entropy):
        return grpo_rank_loss(logps, ranks, entropy=entropy, **options, **tensors)

    def logits(logits):
        return grpo_rank_loss_from_logits(logits, ids, ranks, **options, **tensors)

    def linear(hidden, weight):
        return fused_linear_grpo_rank_loss(hidden, weight, ids, ranks, **options, **tensors)

    cases = (
        (token, (problem.logps, problem.entropy)),
        (logits, (problem.logits,)),
        (linear, (problem.hidden, problem.weight)),
    )
    for function, inputs in cases:
        torch._dynamo.reset()
        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            out = call(*leaves)
            (2 * out.loss).backward()
            results.append((out.loss, out.stats["kl"], out.advantages, *(x.grad for x in leaves)))
        for eager, compiled in zip(*results):
            torch.testing.assert_close(compiled, eager)


def test_ranking_and_log_probabilities_compile():
    problem = random_problem()
    scores, ranks = torch.randn(3, 4), problem.oracle_ranks
    compiled = torch.compile(
        lambda s, r: rank_advantages(s, r, backend="cpu"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(scores, ranks).advantages, rank_advantages(scores, ranks).advantages)
    compiled = torch.compile(
        lambda h, w: token_logps(h, w, problem.token_ids), fullgraph=True, backend="aot_eager"
    )
    want = token_logps(problem.hidden, problem.weight, problem.token_ids)
    torch.testing.assert_close(compiled(problem.hidden, problem.weight), want)


def test_equal_inputs_give_equal_bits():
    problem = random_problem(N=8, G=4, T=40, V=257)
    runs = []
    for _ in range(3):
        leaves = [x.detach().clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        out = fused_linear_grpo_rank_loss(
            *leaves, problem.token_ids, problem.oracle_ranks, beta=0.04, chunk_size=64, **problem.tensors
        )
        out.loss.backward()
        runs.append((out.loss, *(x.grad for x in leaves)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_operators_check_what_they_are_given():
    logits, ids = torch.randn(4, 9), torch.zeros(4, dtype=torch.long)
    scaling, ranking = flatten(Scaling()), ("directed", 1.0, "none")
    with pytest.raises(ValueError, match="token_ids must be a contiguous"):
        OPS.row_stats(logits, ids[:3], *scaling)
    with pytest.raises(TypeError, match="token_ids must be int64"):
        OPS.row_stats(logits, ids.int(), *scaling)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        OPS.row_stats(logits, ids, *flatten(Scaling(0.0)))
    with pytest.raises(TypeError, match="logits must be float32"):
        OPS.row_stats(logits.long(), ids, *scaling)
    with pytest.raises(ValueError, match="oracle_ranks must have the shape of scores"):
        OPS.rank_penalty(torch.randn(2, 3), torch.randn(2, 4), None, None, *ranking)
    with pytest.raises(ValueError, match="between 1 and 64"):
        OPS.rank_penalty(torch.randn(2, 65), torch.randn(2, 65), None, None, *ranking)
    with pytest.raises(ValueError, match="kind is unknown to this operator; got 'best'"):
        OPS.rank_penalty(torch.randn(2, 3), torch.randn(2, 3), None, None, "best", 1.0, "none")
    with pytest.raises(ValueError, match="judged must be"):
        OPS.rank_penalty(torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 2).bool(), None, *ranking)


def test_the_extension_says_how_it_was_built():
    info = extension.build_info()
    assert info["compiler"] and info["cpp_standard"] >= 201703
    assert info["torch"] == torch.__version__.split("+")[0]
    assert OPS.row_instruction_set() in info["instruction_sets"].split()


def of_logps(p, x):
    return grpo_rank_loss(x.mean(-1), p.oracle_ranks, beta=0.04, **p.tensors).loss


def of_logits(p, x):
    flat = {"group_size": p.oracle_ranks.shape[1], "inplace_backward": True}
    logits = x @ p.weight.t()
    return grpo_rank_loss_from_logits(logits, p.token_ids, p.oracle_ranks.flatten(), **flat, **p.tensors).loss


def of_hidden(p, x):
    on_policy = {"mask": p.tensors["mask"].float(), "loss_type": "dapo"}
    return fused_linear_grpo_rank_loss(x, p.weight, p.token_ids, p.oracle_ranks, **on_policy).loss


def of_packed(p, x):
    lengths = torch.full((x.shape[0],), x.shape[1])
    given = {"lengths": lengths, "advantages": p.oracle_ranks.flatten().float()}
    return fused_linear_grpo_rank_loss(x.flatten(0, 1), p.weight, p.token_ids.flatten(), **given).loss


def of_tokens(p, x):
    return token_logps(x, p.weight, p.token_ids, temperature=0.9).sum()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", [of_logps, of_logits, of_hidden, of_packed, of_tokens])
def test_sizes_that_change_compile_without_graph_breaks(function, dynamic):
    """After the first batch torch.compile takes the sizes that changed for symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N, G, T in ((4, 3, 6), (3, 3, 9), (5, 4, 2)):
        problem, results = random_problem(N=N, G=G, T=T), []
        for call in (function, compiled):
            leaf = problem.hidden.clone().requires_grad_()
            loss = call(problem, leaf)
            loss.backward()
            results.append((loss, leaf.grad))
        torch.testing.assert_close(*results)
