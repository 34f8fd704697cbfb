"""The fused linear loss: reference, CPU kernels, chunks, packing, row elimination, and its two-sweep mode."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from linear_parts import assert_matches, evaluate
from torch import nn

from rlaif_fast import fused_linear_grpo_rank_loss, grpo_rank_loss, rank_advantages, token_logps
from rlaif_fast.loss import cpu as cpu_kernels
from rlaif_fast.loss.options import KINDS
from rlaif_fast.loss.testing import Problem, random_problem, relative, relative_l2

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 33, 257])
def test_matches_the_reference(V, dtype):
    assert_matches(random_problem(V=V, dtype=dtype, seed=V), beta=0.04, entropy_coef=0.01, temperature=0.7)


@pytest.mark.parametrize("V", [32_000, 151_936, 152_064])
def test_real_vocabularies(V):
    assert_matches(random_problem(N=1, G=2, T=3, V=V, H=8), beta=0.04, entropy_coef=0.01)


@pytest.mark.parametrize("on_policy", [False, True])
def test_ids_of_any_stride(on_policy):
    """As `topk(2).indices[..., 1]` leaves them, and no mask that would copy them."""
    problem = random_problem()
    tensors = {} if on_policy else {"old_logps": problem.tensors["old_logps"]}
    ids = torch.stack([problem.token_ids] * 2, -1)[..., 1]
    results = [
        evaluate(
            dataclasses.replace(problem, token_ids=x, tensors=tensors),
            "cpu",
            advantages=torch.linspace(-1, 1, 12),
        )
        for x in (problem.token_ids, ids)
    ]
    (plain, plain_grads), (strided, strided_grads) = results
    assert not ids.is_contiguous() and torch.equal(plain.loss, strided.loss)
    assert all(map(torch.equal, plain_grads, strided_grads))


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 10_000])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_chunks_of_any_size(chunk_size, on_policy, packed, level):
    problem = random_problem(seed=chunk_size)
    if on_policy:
        del problem.tensors["old_logps"]
    options = {"beta": 0.04, "entropy_coef": 0.01, "importance_sampling_level": level}
    assert_matches(problem, packed, chunk_size, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_kinds_and_aggregates(kind, loss_type):
    # No group whose penalties are all equal: its "paper" advantages are rounding noise, whose sign the clip
    # fractions would count.
    problem = random_problem(seed=5)
    options = {"kind": kind, "loss_type": loss_type, "max_completion_length": 9, "chunk_size": 13}
    assert_matches(problem, **options)
    options["valid"] = torch.tensor([True, False, True])
    assert_matches(problem, **options)
    del problem.tensors["old_logps"]
    assert_matches(problem, **options)


@pytest.mark.parametrize("per_token", [False, True])
def test_given_advantages(per_token):
    problem = random_problem()
    shape = problem.logps.shape if per_token else problem.logps.shape[:1]
    assert_matches(problem, advantages=torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))


def test_groups_are_packed_into_chunks_and_only_a_larger_one_stands_alone(monkeypatch):
    """Each chunk's rows reach the row kernel once; the logits of a group above a chunk are made twice."""
    problem = random_problem(N=8, G=1, T=9)
    problem.tensors["mask"] = torch.arange(9) < torch.tensor([3, 4, 0, 2, 9, 1, 0, 7])[:, None]
    del problem.tensors["old_logps"]
    sizes, row_grad = [], cpu_kernels.row_grad

    def counting(logits, *rest):
        sizes.append(len(logits))
        row_grad(logits, *rest)

    monkeypatch.setattr(cpu_kernels, "row_grad", counting)
    evaluate(problem, "cpu", chunk_size=8, entropy_coef=0.01)
    assert sizes == [7, 2, 8, 1, 8]


def test_rows_without_gradient_never_reach_the_last_matmuls(monkeypatch):
    """Masked rows are not even evaluated; rows with A = 0 or clipped are evaluated and then left out,
    exactly.
    """
    problem = random_problem(N=4, G=4, T=9, drift=0.6)
    problem.oracle_ranks[1] = 0  # all tied: A = 0
    kept, evaluated = [], []
    add, one_sweep = cpu_kernels.add_product, cpu_kernels.row_loss

    def counting_add(total, grad_logits, hidden, first):
        assert (grad_logits != 0).any(-1).all()
        kept.append(len(hidden))
        add(total, grad_logits, hidden, first)

    def counting_rows(logits, *rest):
        evaluated.append(len(logits))
        return one_sweep(logits, *rest)

    monkeypatch.setattr(cpu_kernels, "add_product", counting_add)
    monkeypatch.setattr(cpu_kernels, "row_loss", counting_rows)
    assert_matches(problem, chunk_size=20)
    _, grads = evaluate(problem, "reference")
    mask = problem.tensors["mask"]
    assert sum(evaluated) == int(mask.sum())
    assert 0 < sum(kept) < int(mask.sum() - mask[4:8].sum())
    assert sum(kept) >= int((grads[0] != 0).any(-1).sum())


def test_the_gradient_does_not_touch_memory_it_was_not_given():
    """Outputs start from uninitialised memory: poison what the allocator hands out next, then compare."""
    problem = random_problem(N=2, G=4, T=30, V=700, H=64)
    want = evaluate(problem, "cpu")[1]
    for _ in range(3):
        trash = [torch.full_like(x, float("nan")) for x in want]
        trash.append(torch.full((240, 700), float("nan")))
        del trash
        for a, b in zip(evaluate(problem, "cpu")[1], want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_frozen_head_or_frozen_body(needs):
    problem = random_problem()
    want = evaluate(problem, "cpu")[1]
    hidden = problem.hidden.clone().requires_grad_(needs[0])
    weight = problem.weight.clone().requires_grad_(needs[1])
    out = fused_linear_grpo_rank_loss(
        hidden, weight, problem.token_ids, problem.oracle_ranks, bias=problem.bias, **problem.tensors
    )
    out.loss.backward()
    assert (hidden.grad is None) == (not needs[0]) and (weight.grad is None) == (not needs[1])
    got, expected = (hidden.grad, want[0]) if needs[0] else (weight.grad, want[1])
    assert relative_l2(got, expected) <= 1e-6


def test_no_gradient_asked_for():
    problem = random_problem()
    with torch.no_grad():
        quiet = evaluate_without_grad(problem)
    loud, _ = evaluate(problem, "cpu")
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, loud.loss.detach())


def evaluate_without_grad(problem: Problem):
    return fused_linear_grpo_rank_loss(
        problem.hidden,
        problem.weight,
        problem.token_ids,
        problem.oracle_ranks,
        bias=problem.bias,
        backend="cpu",
        **problem.tensors,
    )


def test_upstream_gradient_and_accumulation():
    problem = random_problem()
    plain = evaluate(problem, "cpu")[1]
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    for _ in range(2):
        out = fused_linear_grpo_rank_loss(
            hidden, weight, problem.token_ids, problem.oracle_ranks, bias=problem.bias, **problem.tensors
        )
        (out.loss / 4).backward(retain_graph=True)
        out.loss.backward()
    assert relative_l2(weight.grad, 2.5 * plain[1]) <= 1e-6
    assert relative_l2(hidden.grad, 2.5 * plain[0]) <= 1e-6


def test_tied_weights_and_an_adapted_head():
    """The head's weight may also be the embedding, or an effective weight made of a frozen one and an
    adapter.
    """
    torch.manual_seed(0)
    problem = random_problem(V=40, H=16)
    grads = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        embedding, body = nn.Embedding(40, 16), nn.Linear(16, 16)
        down, up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(40, 2))
        hidden = body(embedding(problem.token_ids))
        out = fused_linear_grpo_rank_loss(
            hidden,
            embedding.weight + up @ down,
            problem.token_ids,
            problem.oracle_ranks,
            mask=problem.tensors["mask"],
            backend=backend,
        )
        out.loss.backward()
        grads.append([p.grad for p in (embedding.weight, body.weight, down, up)])
    for a, b in zip(*grads):
        assert relative_l2(a, b) <= 1e-5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    problem = random_problem(N=2, G=2, T=3, V=7, H=4, dtype=torch.float64, drift=0.1)
    leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]

    def loss(hidden, weight, bias):
        return fused_linear_grpo_rank_loss(
            hidden,
            weight,
            problem.token_ids,
            problem.oracle_ranks,
            bias=bias,
            beta=0.04,
            entropy_coef=0.01,
            epsilon=5.0,
            backend=backend,
            **problem.tensors,
        ).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_token_logps_and_its_gradient(chunk_size):
    problem = random_problem(V=129)
    up = torch.randn(2, *problem.logps.shape, dtype=torch.float64)
    results = []
    for p, backend in ((problem, "cpu"), (problem.double(), "reference")):
        leaves = [x.clone().requires_grad_() for x in (p.hidden, p.weight, p.bias)]
        logps, entropy = token_logps(
            leaves[0],
            leaves[1],
            p.token_ids,
            bias=leaves[2],
            temperature=0.7,
            return_entropy=True,
            chunk_size=chunk_size if backend == "cpu" else None,
            backend=backend,
        )
        total = (logps * up[0].to(logps)).sum() + (entropy * up[1].to(logps)).sum()
        results.append((logps, entropy, *torch.autograd.grad(total, leaves)))
    for a, b in zip(results[0][:2], results[1][:2]):
        assert relative(a, b) <= 1e-5
    for a, b in zip(results[0][2:], results[1][2:]):
        assert relative_l2(a, b) <= 1e-5


def test_the_two_forms_agree():
    """The fused loss is the token loss of token_logps."""
    problem = random_problem()
    logps, entropy = token_logps(problem.hidden, problem.weight, problem.token_ids, return_entropy=True)
    want = grpo_rank_loss(logps, problem.oracle_ranks, entropy=entropy, beta=0.04, **problem.tensors)
    got = fused_linear_grpo_rank_loss(
        problem.hidden, problem.weight, problem.token_ids, problem.oracle_ranks, beta=0.04, **problem.tensors
    )
    torch.testing.assert_close(got.loss, want.loss)
    for name, value in want.stats.items():
        torch.testing.assert_close(got.stats[name], value)


def test_empty_responses_and_an_empty_batch():
    problem = random_problem()
    problem.tensors["mask"][:] = False
    out, grads = evaluate(problem, "cpu")
    assert float(out.loss) == 0.0 and all((g == 0).all() for g in grads)
    hidden = torch.empty(0, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    out = fused_linear_grpo_rank_loss(
        hidden,
        weight,
        torch.empty(0, dtype=torch.long),
        torch.zeros(1, 3),
        lengths=torch.zeros(3, dtype=torch.long),
    )
    out.loss.backward()
    assert float(out.loss) == 0.0 and (weight.grad == 0).all() and hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("loss", [True, False], ids=["loss", "logps"])
def test_gradients_are_contiguous_however_the_inputs_lie(loss, chunk_size):
    """On a GPU the upstream scale is multiplied in by a kernel that walks over memory."""
    problem = random_problem(dtype=torch.float64)
    weight = problem.weight.t().contiguous().t().requires_grad_()
    hidden = problem.hidden.flatten(0, 1).t().contiguous().t().requires_grad_()
    lengths = torch.full((12,), problem.hidden.shape[1])
    layouts = []
    for x in (hidden, weight):
        assert not x.is_contiguous()
        x.register_hook(lambda grad: layouts.append(grad.is_contiguous()))
    if loss:
        ids = problem.token_ids.flatten()
        arguments = {"lengths": lengths, "chunk_size": chunk_size}
        fused_linear_grpo_rank_loss(hidden, weight, ids, problem.oracle_ranks, **arguments).loss.backward()
    else:
        logps = token_logps(hidden, weight, problem.token_ids.flatten(), chunk_size=chunk_size)
        logps.sum().backward()
    assert layouts == [True, True]


@pytest.mark.parametrize("batched", ["hidden", "weight"])
def test_vmap_loses_no_gradient(batched):
    problem = random_problem(N=1)
    tensors = {"hidden": problem.hidden, "weight": problem.weight}
    stack = torch.stack([tensors[batched], 2 * tensors[batched]])

    def loss(x):
        h, w = {**tensors, batched: x}.values()
        return fused_linear_grpo_rank_loss(h, w, problem.token_ids, problem.oracle_ranks, backend="cpu").loss

    def gradient(losses):
        leaf = stack.clone().requires_grad_()
        return torch.autograd.grad(losses(leaf), leaf)[0]

    together = gradient(lambda leaf: torch.vmap(loss)(leaf).sum())
    torch.testing.assert_close(together, gradient(lambda leaf: loss(leaf[0]) + loss(leaf[1])))


def test_vmap_takes_a_batch_in_every_argument():
    """The values of batched tensors cannot be read, so they are not checked."""
    batch = [random_problem(N=1, seed=seed) for seed in (1, 2)]

    def loss(hidden, ids, ranks, tensors):
        return fused_linear_grpo_rank_loss(hidden, batch[0].weight, ids, ranks, backend="cpu", **tensors).loss

    each = [(p.hidden, p.token_ids, p.oracle_ranks, p.tensors) for p in batch]
    stack = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *each)
    torch.testing.assert_close(torch.vmap(loss)(*stack), torch.stack([loss(*x) for x in each]))
    scores = torch.randn(2, 1, 4)
    ranking = torch.vmap(lambda s, r: rank_advantages(s, r).advantages)(scores, stack[2])
    torch.testing.assert_close(ranking[1], rank_advantages(scores[1], each[1][2]).advantages)
