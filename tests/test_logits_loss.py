"""Log-probability, entropy and loss from logits: reference, CPU kernels, vocabularies of every size,
strides.
"""

from __future__ import annotations

import math

import pytest
import torch

from rlaif_fast import fused_linear_grpo_rank_loss, grpo_rank_loss_from_logits, selective_log_softmax
from rlaif_fast.loss import ops
from rlaif_fast.loss.cpu import _matrices, row_loss, row_stats
from rlaif_fast.loss.inputs import RowInputs, Scaling
from rlaif_fast.loss.options import LossOptions
from rlaif_fast.loss.testing import TOLERANCES, random_problem, relative, relative_l2

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 2, 7, 8, 9, 15, 16, 17, 33, 257, 2047, 2048, 2049, 32_000, 151_936, 152_064]


def both(logits, ids, temperature=1.0):
    """Return (logps, entropy, gradient) of the kernel, and of the reference on the same values in float64."""
    torch.manual_seed(1)
    results = []
    up = torch.randn(2, *ids.shape, dtype=torch.float64)
    for x, backend in ((logits, "cpu"), (logits.double(), "reference")):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        logps, entropy = selective_log_softmax(
            x, ids, temperature=temperature, return_entropy=True, backend=backend
        )
        total = (logps * up[0].to(logps)).sum() + (entropy * up[1].to(logps)).sum()
        (grad,) = torch.autograd.grad(total, x)
        results.append((logps, entropy, grad))
    return results


def assert_rows_match(logits, ids, temperature=1.0):
    got, want = both(logits, ids, temperature)
    bound = TOLERANCES[logits.dtype]
    # The upstream gradients are exact here, so half-precision statistics are as good as float32's.
    exact = bound.value if logits.dtype == torch.float64 else TOLERANCES[torch.float32].value
    assert relative(got[0], want[0]) <= exact
    assert relative(got[1], want[1]) <= exact
    assert got[2].dtype == logits.dtype and relative_l2(got[2], want[2]) <= bound.gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_rows_match_the_reference(V, dtype):
    torch.manual_seed(V)
    logits = (3 * torch.randn(3, V, dtype=torch.float64)).to(dtype)
    ids = torch.tensor([0, V - 1, V // 2])
    assert_rows_match(logits, ids)
    assert_rows_match(logits, ids, temperature=0.6)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("in_one_sweep", [False, True])
def test_a_probability_in_the_gradient_is_as_good_as_the_logsumexp(temperature, in_one_sweep):
    """The bound of docs/kernels.md. Each row: confident or not, and a gradient that is 0 or not."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 300)
    ids = logits.topk(2).indices.gather(1, torch.arange(64)[:, None] % 2).squeeze(1)
    grads = []
    for x, backend in ((logits, "cpu"), (logits.double(), "reference")):
        x = x.clone().requires_grad_()
        if in_one_sweep:
            identity, ones = torch.eye(300, dtype=x.dtype), torch.ones(64, dtype=x.dtype)
            arguments = {"advantages": ones, "temperature": temperature, "backend": backend}
            loss = fused_linear_grpo_rank_loss(x[:, None], identity, ids[:, None], **arguments).loss * -64
        else:
            loss = selective_log_softmax(x, ids, temperature=temperature, backend=backend).sum()
        grads.append(torch.autograd.grad(loss, x)[0].double() * temperature)
    lse = (logits.double() / temperature).logsumexp(-1).abs()
    assert ((grads[0] - grads[1]).abs().amax(-1) <= torch.finfo(torch.float32).eps * lse).all()


def test_no_rows():
    logps, entropy = selective_log_softmax(
        torch.empty(0, 5), torch.empty(0, dtype=torch.long), return_entropy=True
    )
    assert logps.shape == entropy.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked_flat_shifted_and_impossible_logits(dtype):
    torch.manual_seed(0)
    logits = torch.randn(5, 300, dtype=torch.float64)
    logits[0, 7] = 60.0  # almost certain
    logits[1] = 0.5  # uniform
    logits[2] += 300.0  # far from 0
    logits[3, ::2] = -math.inf  # impossible tokens
    logits[4, 1:] = -math.inf  # one possible token
    ids = torch.tensor([7, 3, 5, 1, 0])
    assert_rows_match(logits.to(dtype), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [5.0, 65536.0, 1e20])
def test_a_large_gradient_of_the_entropy_leaves_impossible_tokens_alone(dtype, scale):
    torch.manual_seed(0)
    logits = torch.randn(2, 67).to(dtype)
    logits[:, 1::3] = -math.inf
    grads = []
    for x, backend in ((logits, "cpu"), (logits.double(), "reference")):
        x = x.clone().requires_grad_()
        ids = torch.zeros(2, dtype=torch.long)
        _, entropy = selective_log_softmax(x, ids, return_entropy=True, backend=backend)
        grads += torch.autograd.grad(scale * entropy.sum(), x)
    assert (grads[0][:, 1::3] == 0).all()
    assert relative_l2(grads[0], grads[1]) < TOLERANCES[dtype].gradient


def test_a_nan_logit_is_not_swallowed():
    for at in (0, 5, 299):
        logits = torch.randn(1, 300)
        logits[0, at] = math.nan
        logps, entropy = selective_log_softmax(logits, torch.tensor([3]), return_entropy=True, backend="cpu")
        assert torch.isnan(logps).all() and torch.isnan(entropy).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_logits_are_not_copied(dtype):
    """The usual slice logits[:, :-1] is read where it lies, and its gradient has the slice's shape."""
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 65).to(dtype)
    ids = torch.randint(0, 65, (4, 5))
    assert_rows_match(logits[:, :-1], ids)
    assert_rows_match(logits[::2, 1:], ids[::2])
    assert_rows_match(logits.transpose(0, 1)[:5], ids.t())
    odd = torch.randn(4, 5, 130).to(dtype)[..., ::2]
    assert_rows_match(odd, ids)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    problem = random_problem(N=2, G=2, T=3, V=5, dtype=torch.float64, drift=0.1)
    logits = problem.logits.clone().requires_grad_()

    def loss(logits):
        return grpo_rank_loss_from_logits(
            logits,
            problem.token_ids,
            problem.oracle_ranks,
            temperature=0.8,
            beta=0.04,
            entropy_coef=0.01,
            epsilon=5.0,
            backend=backend,
            **problem.tensors,
        ).loss

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 257, 2049])
@pytest.mark.parametrize("inplace", [False, True])
def test_loss_matches_the_reference(V, dtype, inplace):
    problem = random_problem(V=V, dtype=dtype, seed=V)
    losses, grads = [], []
    for p, backend in ((problem, "cpu"), (problem.double(), "reference")):
        leaf = p.logits.clone().requires_grad_()
        logits = leaf.clone()
        out = grpo_rank_loss_from_logits(
            logits,
            p.token_ids,
            p.oracle_ranks,
            beta=0.04,
            entropy_coef=0.01,
            temperature=0.9,
            inplace_backward=inplace,
            backend=backend,
            **p.tensors,
        )
        (3.0 * out.loss).backward()
        losses.append(out.loss)
        grads.append(leaf.grad)
    bound = TOLERANCES[dtype]
    assert relative(losses[0], losses[1]) <= bound.value
    assert relative_l2(grads[0], grads[1]) <= bound.gradient


def test_inplace_backward_writes_over_the_logits_and_runs_once():
    problem = random_problem()
    leaf = problem.logits.clone().requires_grad_()
    logits = leaf * 1.0
    where = logits.data_ptr()
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    out = grpo_rank_loss_from_logits(
        logits,
        problem.token_ids,
        problem.oracle_ranks,
        inplace_backward=True,
        backend="cpu",
        **problem.tensors,
    )
    out.loss.backward(retain_graph=True)
    assert seen == [where]
    with pytest.raises(RuntimeError, match="backward once"):
        out.loss.backward()


def test_ids_under_the_mask_may_be_anything():
    problem = random_problem(seed=3)
    mask = problem.tensors["mask"]
    want = grpo_rank_loss_from_logits(
        problem.logits, problem.token_ids, problem.oracle_ranks, **problem.tensors
    )
    ids = problem.token_ids.masked_fill(~mask, -100)
    got = grpo_rank_loss_from_logits(problem.logits, ids, problem.oracle_ranks, **problem.tensors)
    assert torch.equal(got.loss, want.loss)


def test_nan_logits_under_the_mask_do_not_count():
    problem = random_problem(seed=3)
    mask = problem.tensors["mask"]
    for backend in ("cpu", "reference"):
        logits = problem.logits.clone()
        logits[~mask] = math.nan
        logits.requires_grad_()
        out = grpo_rank_loss_from_logits(
            logits,
            problem.token_ids,
            problem.oracle_ranks,
            entropy_coef=0.01,
            backend=backend,
            **problem.tensors,
        )
        assert torch.isfinite(out.loss)
        if backend == "cpu":
            out.loss.backward()
            assert (logits.grad[~mask] == 0).all() and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_guards_every_read_by_id(dtype):
    """Below the checked public functions: an id outside the vocabulary gives NaN, here with no memory behind
    the row.
    """
    logits = torch.randn(2, 9).to(dtype)
    for bad in (-1, 9, 2**40, -(2**62)):
        stats = row_stats(logits, torch.tensor([0, bad]), Scaling())
        assert torch.isfinite(stats.logps[0]) and torch.isnan(stats.logps[1])
        assert torch.isfinite(stats.entropy).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sweep_equals_two(dtype):
    """row_loss, which overwrites the logits in one sweep, against statistics, loss and gradient one after
    another.
    """
    problem = random_problem(N=1, G=4, T=6, V=2050, dtype=dtype)
    options = LossOptions(beta=0.04, entropy_coef=0.01)
    wide = problem.logps.dtype
    rows = RowInputs(
        advantages=torch.linspace(-1, 1, 24, dtype=wide),
        weights=torch.arange(24).ne(5).to(wide) / 24,
        old_logps=problem.tensors["old_logps"].flatten(),
        ref_logps=problem.tensors["ref_logps"].flatten(),
        sampling_ratio=torch.linspace(0.5, 1.5, 24, dtype=wide),
    )
    logits = problem.logits.view(24, -1).clone()
    stats, grad_logps, grad_entropy = row_loss(
        logits, problem.token_ids.flatten(), Scaling(0.8), rows, options
    )

    leaf = problem.logits.detach().clone().requires_grad_()
    want = grpo_rank_loss_from_logits(
        leaf,
        problem.token_ids,
        advantages=rows.advantages.view(4, 6),
        old_logps=problem.tensors["old_logps"],
        ref_logps=problem.tensors["ref_logps"],
        sampling_ratio=rows.sampling_ratio.view(4, 6),
        mask=rows.weights.view(4, 6) > 0,
        num_items_in_batch=24,
        loss_type="dapo",
        beta=0.04,
        entropy_coef=0.01,
        temperature=0.8,
        backend="cpu",
    )
    want.loss.backward()
    assert relative_l2(logits, leaf.grad.view(24, -1)) <= TOLERANCES[dtype].gradient
    assert (logits[5] == 0).all() and grad_logps[5] == 0 and grad_entropy[5] == 0
    assert torch.isfinite(stats.logps).all()


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (2, 7, 3), (2, 3, 7), (40, 1)])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_view_takes_as_few_launches_as_it_can(shape, inplace):
    """`logits[..., :-1, :]` is read where it lies: a matrix a response, or a token of all responses."""
    torch.manual_seed(0)
    whole = torch.randn(*shape[:-1], shape[-1] + 1, 11)
    ids, temperature = torch.randint(0, 11, shape), torch.rand(shape) + 0.5
    assert len(list(_matrices(whole[..., :-1, :]))) == math.prod(shape[:-2]) * min(shape[-2:])

    def run(logits):
        leaf = logits.clone().requires_grad_()
        view = (leaf * 1.0)[..., :-1, :] if logits is whole else leaf * 1.0
        scaling = Scaling(1.0, temperature.reshape(-1))
        logps, entropy = ops.selective_log_softmax(view, ids, scaling, "cpu", inplace)
        ((logps + 0.3 * entropy) * temperature).sum().backward()
        return logps, entropy, leaf.grad

    logps, entropy, grad = run(whole)
    wanted = run(whole[..., :-1, :].contiguous())
    assert torch.equal(logps, wanted[0]) and torch.equal(entropy, wanted[1])
    assert torch.equal(grad[..., :-1, :], wanted[2])
