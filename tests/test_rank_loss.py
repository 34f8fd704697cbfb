"""The loss over token log-probabilities: reference, CPU kernel, and what masks and extreme ratios must not
do.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_fast import grpo_rank_loss
from rlaif_fast.loss.options import KINDS, LOSS_TYPES
from rlaif_fast.loss.testing import TOLERANCES, Problem, random_problem, relative, relative_l2


def evaluate(problem: Problem, backend: str, **options):
    """Return the output and the gradients of logps and entropy."""
    logps, entropy = problem.logps.clone().requires_grad_(), problem.entropy.clone().requires_grad_()
    use = {**problem.tensors, **options}
    out = grpo_rank_loss(logps, problem.oracle_ranks, entropy=entropy, backend=backend, **use)
    grads = torch.autograd.grad(out.loss, [logps, entropy], allow_unused=True)
    return out, [g for g in grads if g is not None]


def assert_matches(problem: Problem, backend: str, **options):
    got, got_grads = evaluate(problem, backend, **options)
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
    want, want_grads = evaluate(problem.double(), "reference", **wide)
    bound = TOLERANCES[problem.logps.dtype]
    assert relative(got.loss, want.loss) <= bound.value
    assert relative(got.advantages, want.advantages) <= bound.value
    assert got.stats.keys() == want.stats.keys()
    # Shares of clipped tokens go by the sign of the advantage, which rounding decides where one is close to zero.
    rounded = not torch.equal(got.advantages.sign().double(), want.advantages.sign())
    for name, value in want.stats.items():
        if not (rounded and name.startswith("clip")):
            assert relative(got.stats[name], value) <= bound.value, name
    for a, b in zip(got_grads, want_grads):
        assert relative_l2(a, b) <= bound.gradient


CHOICES = {
    "kind": KINDS,
    "scale": ("none", "group"),
    "score": ("mean", "sum"),
    "delta": (None, 1.5),
    "beta": (0.0, 0.04),
    "kl": ("k1", "k2", "k3"),
    "entropy_coef": (0.0, 0.01),
    "loss_type": LOSS_TYPES,
    "importance_sampling_level": ("token", "sequence"),
    "num_items_in_batch": (None, 17),
    "dual_clip": (None, 1.2),
    "kl_clamp": (None, 0.05),
    "unbiased_kl": (False, True),
    "entropy_aggregate": ("loss", "tokens"),
    "empty_rows": ("count", "skip"),
    "cispo_bound": ("relative", "absolute"),
}


def possible(options):
    """Take back what the loss refuses: see test_api_errors.py."""
    if options["loss_type"] in ("cispo", "sapo"):
        options |= {"delta": None, "dual_clip": None, "importance_sampling_level": "token"}
    if options["importance_sampling_level"] == "sequence":
        options["unbiased_kl"] = False
    return options


@settings(max_examples=120, deadline=None)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}),
    st.sampled_from([(1, 1, 1), (3, 4, 7), (1, 64, 3), (2, 5, 129)]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10**6),
    st.sampled_from([(), ("old_logps",), ("mask",), ("old_logps", "mask")]),
    st.booleans(),
)
def test_cpu_kernel_matches_the_reference_whatever_the_options(options, shape, dtype, seed, dropped, extras):
    N, G, T = shape
    problem = random_problem(N=N, G=G, T=T, dtype=dtype, seed=seed)
    for name in dropped:
        del problem.tensors[name]
    if extras:
        generator = torch.Generator().manual_seed(seed)
        options["valid"] = torch.rand(N, generator=generator) < 0.6
        options["sampling_ratio"] = torch.rand(N * G, T, generator=generator).to(dtype) + 0.5
        options["judged"] = torch.rand(N, G, generator=generator) < 0.8
        options["weights"] = torch.rand(N, generator=generator).to(dtype)
        options["scores"] = torch.rand(N, G, generator=generator).to(dtype)
    assert_matches(problem, "cpu", epsilon_high=0.28, max_completion_length=19, **possible(options))


@pytest.mark.parametrize("T", [1, 65_537])
def test_short_and_long_responses(T):
    assert_matches(random_problem(N=1, G=2, T=T, V=3, H=2), "cpu", beta=0.04, entropy_coef=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_log_probabilities(dtype):
    problem = random_problem()
    logps = problem.logps.to(dtype).requires_grad_()
    out = grpo_rank_loss(logps, problem.oracle_ranks, beta=0.04, backend="cpu", **problem.tensors)
    out.loss.backward()
    exact = logps.detach().double().requires_grad_()
    tensors = problem.double().tensors
    want = grpo_rank_loss(exact, problem.oracle_ranks, beta=0.04, backend="reference", **tensors)
    want.loss.backward()
    bound = TOLERANCES[dtype]
    assert relative(out.loss, want.loss) <= bound.value
    assert logps.grad.dtype == dtype and relative_l2(logps.grad, exact.grad) <= bound.gradient


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck(backend, level):
    problem = random_problem(N=2, G=3, T=4, dtype=torch.float64, drift=0.1)
    logps, entropy = problem.logps.clone().requires_grad_(), problem.entropy.clone().requires_grad_()

    def loss(logps, entropy):
        return grpo_rank_loss(
            logps,
            problem.oracle_ranks,
            entropy=entropy,
            beta=0.04,
            entropy_coef=0.01,
            epsilon=0.21,
            importance_sampling_level=level,
            backend=backend,
            **problem.tensors,
        ).loss

    assert torch.autograd.gradcheck(loss, (logps, entropy))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_stands_under_the_mask_does_not_count(backend, poison):
    problem = random_problem(seed=3)
    mask = problem.tensors["mask"]
    assert not mask.all()
    options = {"beta": 0.04, "entropy_coef": 0.01, "sampling_ratio": torch.ones_like(problem.logps)}
    clean, clean_grads = evaluate(problem, backend, **options)
    for x in (problem.logps, problem.entropy, *(problem.tensors[k] for k in ("old_logps", "ref_logps"))):
        x[~mask] = poison
    options["sampling_ratio"][~mask] = poison
    dirty, dirty_grads = evaluate(problem, backend, **options)
    assert torch.equal(clean.loss, dirty.loss) and torch.isfinite(dirty.loss)
    assert all(torch.equal(clean.stats[name], dirty.stats[name]) for name in clean.stats)
    for a, b in zip(clean_grads, dirty_grads):
        assert torch.equal(a, b) and (b[~mask] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_that_counts_is_not_swallowed(backend):
    problem = random_problem()
    problem.logps[0, 0] = math.nan
    out, _ = evaluate(problem, backend)
    assert torch.isnan(out.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_ranks_the_others_alike_in_every_backend(kind):
    problem = random_problem()
    problem.tensors["old_logps"][0, 0] = math.nan
    ours, theirs = (evaluate(problem, backend, kind=kind) for backend in ("cpu", "reference"))
    assert ours[0].advantages.isfinite().all()
    assert torch.allclose(ours[0].advantages, theirs[0].advantages, atol=1e-6)
    for name in ("ndcg", "kendall_tau", "top1_agreement", "penalty"):
        assert torch.allclose(ours[0].stats[name], theirs[0].stats[name], atol=1e-6)
    for mine, other in zip(ours[1], theirs[1]):
        assert torch.allclose(mine[1:], other[1:], atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_counts(backend, loss_type):
    """All tokens masked, all groups invalid, no response at all: a loss of 0 and a gradient of 0."""
    problem = random_problem()
    options = {"loss_type": loss_type, "max_completion_length": 7, "beta": 0.04}
    for masked in (
        {"mask": torch.zeros_like(problem.tensors["mask"])},
        {"valid": torch.zeros(3, dtype=torch.bool)},
    ):
        out, grads = evaluate(problem, backend, **options, **masked)
        assert float(out.loss.detach()) == 0.0 and all((g == 0).all() for g in grads)
        assert float(out.stats["tokens"]) == 0
    out = grpo_rank_loss(torch.empty(0, 5), torch.empty(0, 4), backend=backend, **{**options, "beta": 0.0})
    assert float(out.loss) == 0.0 and out.advantages.shape == (0,)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("log_ratio", [100.0, -100.0])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_extreme_ratios_stay_finite(backend, level, log_ratio, kl):
    problem = random_problem()
    old = problem.logps - log_ratio
    options = {"old_logps": old, "ref_logps": old, "beta": 0.04, "kl": kl, "importance_sampling_level": level}
    out, grads = evaluate(problem, backend, **options)
    assert torch.isfinite(out.loss) and all(torch.isfinite(g).all() for g in grads)
    assert all(torch.isfinite(value).all() for value in out.stats.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_a_clamped_kl_is_flat_where_the_reference_policy_rules_a_token_out(backend, kl):
    problem = random_problem(seed=3)
    at = problem.tensors["mask"].nonzero()[0].tolist()
    grads = []
    for value in (-1e4, -math.inf):
        problem.tensors["ref_logps"][tuple(at)] = value
        out, (grad, *_) = evaluate(problem, backend, beta=0.04, kl=kl, kl_clamp=10.0)
        assert torch.isfinite(out.loss) and torch.isfinite(grad).all()
        grads.append(grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_has_no_weight_may_be_infinite(backend):
    problem = random_problem(seed=3)
    at = tuple(problem.tensors["mask"].nonzero()[0].tolist())
    without, (grad, *_) = evaluate(problem, backend, ref_logps=None)
    problem.tensors["ref_logps"][at], problem.entropy[at] = -math.inf, math.nan
    out, (watched, *_) = evaluate(problem, backend, kl="k2")
    assert torch.equal(out.loss, without.loss) and torch.equal(watched, grad)
    assert out.stats["loss/kl"] == 0.0 and out.stats["kl"] == math.inf and out.stats["entropy"].isnan()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_group_of_identical_responses_ties(backend):
    problem = random_problem(N=1, G=4)
    problem.tensors.clear()
    problem.logps[:] = problem.logps[0].clone()
    out, _ = evaluate(problem, backend)
    assert float(out.stats["kendall_tau"]) == 0.0
    assert_matches(problem, "cpu")


def test_invalid_groups_count_in_no_average():
    problem = random_problem(N=4, G=3)
    valid = torch.tensor([True, False, True, True])
    rows = valid.repeat_interleave(3)
    for loss_type, backend in product(LOSS_TYPES, ("cpu", "reference")):
        options = {"loss_type": loss_type, "max_completion_length": 7, "backend": backend}
        got = grpo_rank_loss(problem.logps, problem.oracle_ranks, valid=valid, **problem.tensors, **options)
        kept = {name: x[rows] for name, x in problem.tensors.items()}
        want = grpo_rank_loss(problem.logps[rows], problem.oracle_ranks[valid], **kept, **options)
        assert relative(got.loss, want.loss) <= 1e-6
        assert (got.advantages[~rows] == 0).all()
        assert float(got.stats["no_signal"]) >= 0.25
        for name in ("penalty", "ndcg", "kendall_tau", "top1_agreement", "kl", "ratio_mean"):
            assert relative(got.stats[name], want.stats[name]) <= 1e-6, name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_advantages_of_another_trainer(backend):
    """Ranks and the advantages made of them give one loss; advantages may also be given token by token."""
    problem = random_problem()
    ranked, ranked_grads = evaluate(problem, backend)
    logps = problem.logps.clone().requires_grad_()
    given = grpo_rank_loss(logps, advantages=ranked.advantages, backend=backend, **problem.tensors)
    given.loss.backward()
    torch.testing.assert_close(given.loss, ranked.loss)
    torch.testing.assert_close(logps.grad, ranked_grads[0])
    assert "ndcg" not in given.stats and "ndcg" in ranked.stats
    per_token = ranked.advantages[:, None].expand_as(logps)
    again = grpo_rank_loss(problem.logps, advantages=per_token, backend=backend, **problem.tensors)
    torch.testing.assert_close(again.loss, ranked.loss)
    assert again.advantages.shape == problem.logps.shape


def test_agrees_with_plain_grpo():
    """kind="zscore" is GRPO: reward normalised within the group, the clipped surrogate written out here."""
    torch.manual_seed(0)
    logps, old, rewards = torch.randn(6, 5), torch.randn(6, 5), torch.rand(2, 3)
    A = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(6, 1)
    ratio = (logps - old).exp()
    surrogate = torch.min(ratio * A, ratio.clamp(0.8, 1.2) * A)
    out = grpo_rank_loss(logps, rewards, kind="zscore", old_logps=old)
    torch.testing.assert_close(out.loss, -surrogate.mean(1).mean())


def test_strided_inputs():
    problem = random_problem(N=2, G=3, T=12)
    logps = torch.stack([problem.logps, problem.logps + 1], -1)[..., 0]
    mask = torch.stack([problem.tensors["mask"]] * 2, -1)[..., 1]
    ref = problem.tensors["ref_logps"].t().contiguous().t()
    assert not (logps.is_contiguous() or mask.is_contiguous() or ref.is_contiguous())
    options = {"beta": 0.04, "old_logps": problem.tensors["old_logps"]}
    got = grpo_rank_loss(logps, problem.oracle_ranks, mask=mask, ref_logps=ref, backend="cpu", **options)
    options |= {"mask": mask.contiguous(), "ref_logps": ref.contiguous()}
    want = grpo_rank_loss(logps.contiguous(), problem.oracle_ranks, backend="cpu", **options)
    assert torch.equal(got.loss, want.loss)


def test_flat_ranks_and_0_1_masks_mean_the_same():
    problem = random_problem()
    want = grpo_rank_loss(problem.logps, problem.oracle_ranks, **problem.tensors)
    tensors = {**problem.tensors, "mask": problem.tensors["mask"].long()}
    got = grpo_rank_loss(problem.logps, problem.oracle_ranks.flatten(), group_size=4, **tensors)
    assert torch.equal(got.loss, want.loss)


def test_result_does_not_depend_on_the_number_of_threads():
    problem = random_problem(N=64, G=4, T=300, V=5, H=2)
    threads = torch.get_num_threads()
    losses = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            losses.append(evaluate(problem, "cpu", beta=0.04))
    finally:
        torch.set_num_threads(threads)
    for out, grads in losses[1:]:
        assert torch.equal(out.loss, losses[0][0].loss) and torch.equal(grads[0], losses[0][1][0])


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.complex64]
)
@pytest.mark.parametrize("index", [None, torch.tensor([0, 0])])
def test_ranks_that_pytorch_cannot_compare_are_refused_by_name(dtype, index):
    ranks = torch.tensor([0, 1]).to(dtype)
    with pytest.raises(TypeError, match=f"oracle_ranks must be int, uint8 or float.* got a {dtype} tensor"):
        grpo_rank_loss(torch.zeros(2, 3), ranks if index is not None else ranks[None], group_index=index)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["logps", "old_logps", "mask"])
def test_a_jagged_or_sparse_tensor_is_refused_by_name(name, backend):
    jagged = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged)
    for odd in (jagged, torch.zeros(2, 3).to_sparse()):
        given = {"logps": torch.zeros(2, 3), name: odd}
        with pytest.raises(TypeError, match=rf"{name} must be a plain tensor.*got .* layout {odd.layout}"):
            grpo_rank_loss(oracle_ranks=torch.tensor([[0, 1]]), backend=backend, **given)
