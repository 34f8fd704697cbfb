"""The fused linear loss: reference, CPU kernels, chunks, packing, row elimination, and its two-sweep mode."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from rlaif_fast import (
    fused_linear_grpo_rank_loss,
    grpo_rank_loss,
    grpo_rank_loss_from_logits,
    token_logps,
)
from rlaif_fast.loss import cpu as cpu_kernels
from rlaif_fast.loss.options import KINDS
from rlaif_fast.loss.testing import TOLERANCES, Problem, random_problem, relative, relative_l2

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


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


SHARDS = (20, 13)


def _sharded(rank: int, rendezvous: str, where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=len(SHARDS))
    first = sum(SHARDS[:rank])
    own = slice(first, first + SHARDS[rank])
    results, sizes_asked, all_gather = [], [], dist.all_gather

    def counted(parts, mine, **options):
        sizes_asked.extend([mine] if mine.dtype == torch.int64 else [])
        return all_gather(parts, mine, **options)

    dist.all_gather = counted
    for options in SHARDED_OPTIONS:
        problem = random_problem(V=sum(SHARDS))
        if options.pop("on_policy", False):
            del problem.tensors["old_logps"]
        hidden = problem.hidden.clone().requires_grad_()
        weight, bias = (x[own].clone().requires_grad_() for x in (problem.weight, problem.bias))
        out = fused_linear_grpo_rank_loss(
            hidden,
            weight,
            problem.token_ids,
            problem.oracle_ranks,
            bias=bias,
            process_group=dist.group.WORLD,
            **problem.tensors,
            **options,
        )
        (2 * out.loss).backward()
        results.append((out.loss.detach(), hidden.grad, weight.grad, bias.grad))
    assert len(sizes_asked) == len(SHARDED_OPTIONS)  # each call asks the others for their sizes once
    torch.save(results, Path(where) / f"{rank}.pt")
    dist.destroy_process_group()


SHARDED_OPTIONS = (
    {"beta": 0.04, "entropy_coef": 0.01},
    {"importance_sampling_level": "sequence", "chunk_size": 5},
    {"on_policy": True, "entropy_coef": 0.01, "chunk_size": 40},
)


def test_a_vocabulary_sharded_over_two_processes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))  # the processes import this module by name
    mp.spawn(_sharded, (f"file://{tmp_path / 'rendezvous'}", str(tmp_path)), nprocs=len(SHARDS))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SHARDS))]
    for case, options in enumerate(SHARDED_OPTIONS):
        options = {k: v for k, v in options.items() if k != "chunk_size"}
        problem = random_problem(V=sum(SHARDS)).double()
        if options.pop("on_policy", False):
            del problem.tensors["old_logps"]
        want, grads = evaluate(problem, "reference", **options)
        for loss, grad_hidden, *_ in (part[case] for part in parts):
            assert relative(loss, want.loss) <= 1e-5
            assert relative_l2(grad_hidden, 2 * grads[0]) <= 1e-5
        for column in (1, 2):
            whole = torch.cat([part[case][column + 1] for part in parts])
            assert relative_l2(whole, 2 * grads[column]) <= 1e-5


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


@pytest.mark.parametrize("chunk_size", [3, 10_000])
@pytest.mark.parametrize("old", [True, False])
def test_partly_judged_weighted_groups_in_a_given_order(chunk_size, old):
    problem = random_problem(dtype=torch.float64)
    if not old:
        del problem.tensors["old_logps"]
    judged = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]]).bool()
    options = {"judged": judged, "weights": torch.tensor([0.5, 2.0, 1.0]).double(), "chunk_size": chunk_size}
    assert_matches(problem, **options)
    assert_matches(problem, scores=torch.rand(3, 4).double(), **options)
    assert_matches(problem, packed=True, scores=torch.rand(3, 4).double(), **options)


@pytest.mark.parametrize("form", ["logps", "logits", "hidden", "packed"])
def test_rows_of_any_order_with_a_group_index(form):
    """Shuffled rows with their group's number give the loss and the statistics of the groups in order."""
    problem = random_problem(dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    index = torch.arange(3).repeat_interleave(4)[order] * 10
    t = {name: x[order] for name, x in problem.tensors.items()}
    judged = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.8
    ranks = problem.oracle_ranks.flatten()[order]
    rest = {"group_index": index, "judged": judged.flatten()[order], "beta": 0.04}
    ids, hidden = problem.token_ids[order], problem.hidden[order]
    want = fused_linear_grpo_rank_loss(
        problem.hidden, problem.weight, problem.token_ids, problem.oracle_ranks, judged=judged, beta=0.04,
        **problem.tensors,
    )  # fmt: skip
    logits = hidden @ problem.weight.t()
    if form == "logps":
        logps = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        got = grpo_rank_loss(logps, ranks, **rest, **t)
    elif form == "logits":
        got = grpo_rank_loss_from_logits(logits, ids, ranks, **rest, **t)
    elif form == "hidden":
        got = fused_linear_grpo_rank_loss(hidden, problem.weight, ids, ranks, **rest, **t)
    else:
        mask = t.pop("mask")
        flat = {name: x[mask] for name, x in t.items()}
        got = fused_linear_grpo_rank_loss(
            hidden[mask], problem.weight, ids[mask], ranks, lengths=mask.sum(-1), **rest, **flat
        )
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.advantages, want.advantages[order])
    for name in ("penalty", "ndcg", "kendall_tau", "top1_agreement", "no_signal"):
        torch.testing.assert_close(got.stats[name], want.stats[name])


def test_a_group_index_on_policy_needs_an_order():
    problem = random_problem()
    index = torch.arange(12) % 3
    arguments = {"group_index": index, "mask": problem.tensors["mask"]}
    ranks = problem.oracle_ranks.flatten()
    with pytest.raises(ValueError, match="scores or old_logps must be given with group_index"):
        fused_linear_grpo_rank_loss(problem.hidden, problem.weight, problem.token_ids, ranks, **arguments)
    with pytest.raises(ValueError, match="group_size must be None with group_index"):
        grpo_rank_loss(problem.logps, ranks, group_size=4, **arguments)


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
