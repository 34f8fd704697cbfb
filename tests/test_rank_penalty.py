"""Ranks, gains, penalties and advantages: reference, kernels, and the properties that the maths promises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_fast import RankAdvantages, grpo_rank_loss, rank_advantages
from rlaif_fast.loss import backends
from rlaif_fast.loss.options import KINDS
from rlaif_fast.loss.testing import TOLERANCES, relative

DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
CUDA = torch.cuda.is_available()  # Triton's interpreter has its own tests, test_triton_rank_penalty.py
BACKENDS = [
    pytest.param(row.name, marks=pytest.mark.gpu) if DEVICE[row.name] == "cuda" else row.name
    for row in backends.rows("rank_penalty")
    if row.name != "reference" and row.unavailable() is None and (row.name != "triton" or CUDA)
]


def groups(N: int, G: int, seed: int = 0, dtype: torch.dtype = torch.float32, ties: bool = True):
    """Draw scores and ranks (N, G), both with ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, max(2, G if ties else 10**6), (N, G), generator=generator).to(dtype) / 4 - 3
    ranks = torch.randint(0, max(2, G), (N, G), generator=generator)
    return scores, ranks


def test_a_backend_is_there_to_be_tested():
    assert "cpu" in BACKENDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_match_the_reference(backend, kind, scale):
    for G in (1, 2, 3, 5, 8, 31, 32, 33, 63, 64):
        scores, ranks = groups(11, G, seed=G)
        valid = torch.arange(11) % 4 != 1
        options = {"kind": kind, "scale": scale, "penalty_weight": 0.7}
        want = rank_advantages(scores.double(), ranks, valid=valid, backend="reference", **options)
        device = DEVICE[backend]
        got = rank_advantages(
            scores.to(device), ranks.to(device), valid=valid.to(device), backend=backend, **options
        )
        for name, x, y in zip(RankAdvantages._fields, got, want):
            assert x.dtype == (torch.bool if name == "has_signal" else scores.dtype)
            assert relative(x.cpu(), y) <= TOLERANCES[torch.float32].value, (G, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_cpu_kernel_takes_every_float_dtype(dtype):
    scores, ranks = groups(5, 8, dtype=dtype)
    got = rank_advantages(scores, ranks, backend="cpu")
    want = rank_advantages(scores.double(), ranks, backend="reference")
    bound = {torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert got.advantages.dtype == dtype
    assert relative(got.advantages, want.advantages) <= bound


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_and_strided_inputs(backend):
    empty = rank_advantages(torch.empty(0, 4), torch.empty(0, 4), backend=backend)
    assert empty.advantages.shape == (0, 4) and empty.ndcg.shape == (0,)
    scores, ranks = groups(12, 10)
    got = rank_advantages(scores[::2, 1::2], ranks[::2, 1::2], backend=backend)
    want = rank_advantages(scores[::2, 1::2].contiguous(), ranks[::2, 1::2].contiguous(), backend=backend)
    assert torch.equal(got.advantages, want.advantages)
    scores, ranks = scores[:10].t(), ranks[:10].t()
    got = rank_advantages(scores, ranks, backend=backend)
    want = rank_advantages(scores.contiguous(), ranks.contiguous(), backend=backend)
    assert torch.equal(got.advantages, want.advantages)


def test_gain_of_each_position():
    ranks = torch.arange(5)[None]
    got = rank_advantages(torch.zeros(1, 5).double(), ranks, kind="oracle", backend="reference").advantages
    gains = torch.tensor([1 / ((1 + k) * math.log2(2 + k)) for k in range(5)], dtype=torch.float64)
    torch.testing.assert_close(got[0], gains - gains.mean(), rtol=1e-12, atol=1e-12)


def test_the_penalties_of_the_description():
    """With G = 5, taking the best for the second costs 0.685 and the fourth for the fifth 0.281."""
    ranks = torch.arange(5)[None]
    swapped_top = rank_advantages(torch.tensor([[4.0, 5.0, 3.0, 2.0, 1.0]]), ranks).penalties[0]
    assert float(swapped_top[0]) == pytest.approx(0.685, abs=5e-4)
    swapped_bottom = rank_advantages(torch.tensor([[5.0, 4.0, 3.0, 1.0, 2.0]]), ranks).penalties[0]
    assert float(swapped_bottom[4]) == pytest.approx(0.281, abs=5e-4)
    reversed_order = rank_advantages(
        torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), ranks, kind="paper"
    ).penalties[0]
    assert float(reversed_order.min()) == pytest.approx(-11.9, abs=0.05)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_agreement_statistics(backend):
    ranks = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [1, 1, 1, 1], [0, 0, 1, 2]])
    scores = torch.tensor([[4.0, 3, 2, 1], [1.0, 2, 3, 4], [1.0, 2, 3, 4], [4.0, 3, 2, 1]])
    result = rank_advantages(scores, ranks, backend=backend)
    assert result.kendall_tau[:3].tolist() == pytest.approx([1.0, -1.0, 0.0])
    assert float(result.kendall_tau[3]) == pytest.approx(5 / math.sqrt(6 * 5))
    assert float(result.ndcg[0]) == pytest.approx(1.0) and float(result.ndcg[1]) < 0.8
    assert result.top1_agreement.tolist() == pytest.approx([1.0, 0.0, 0.25, 0.5])
    assert result.has_signal.tolist() == [True, True, False, True]


def test_the_paper_s_literal_advantage_has_no_direction():
    """A best response that the policy ranks last gets the most negative advantage: documented, not the
    default.
    """
    ranks, scores = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert rank_advantages(scores, ranks, kind="paper").advantages[0, 0] < 0
    assert rank_advantages(scores, ranks, kind="directed").advantages[0, 0] > 0


group = st.integers(2, 64).flatmap(
    lambda G: st.tuples(
        st.lists(st.integers(0, G), min_size=G, max_size=G),
        st.lists(st.integers(0, G), min_size=G, max_size=G),
    )
)


@settings(max_examples=150, deadline=None)
@given(group, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["cpu", "reference"]))
def test_directed_advantages_keep_their_promises(keys, weight, backend):
    """sum A = 0, |A| <= 2 + w, the untied best gains and the untied worst loses, all-tied is exactly 0."""
    scores, ranks = (torch.tensor([x], dtype=torch.float64) for x in keys)
    A = rank_advantages(scores, ranks, penalty_weight=weight, backend=backend).advantages[0]
    order = ranks[0]
    assert abs(float(A.sum())) <= 1e-12 * len(A)
    assert float(A.abs().max()) <= 2 + weight
    if (order == order[0]).all():
        assert (A == 0).all()
    if (order == order.min()).sum() == 1:
        assert A[order.argmin()] > 0
    if (order == order.max()).sum() == 1:
        assert A[order.argmax()] < 0


@settings(max_examples=60, deadline=None)
@given(
    group, st.sampled_from(KINDS), st.randoms(use_true_random=False), st.sampled_from(["cpu", "reference"])
)
def test_relabelling_the_responses_permutes_the_advantages(keys, kind, random, backend):
    scores, ranks = (torch.tensor([x], dtype=torch.float64) for x in keys)
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    A = rank_advantages(scores, ranks, kind=kind, backend=backend).advantages
    B = rank_advantages(scores[:, order], ranks[:, order], kind=kind, backend=backend).advantages
    torch.testing.assert_close(B, A[:, order], rtol=1e-12, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(group, st.sampled_from(["directed", "oracle", "paper", "paper_swapped"]))
def test_only_the_order_of_the_ranks_counts(keys, kind):
    scores, ranks = (torch.tensor([x], dtype=torch.float64) for x in keys)
    spread = ranks.exp() * 7 + 1
    A = rank_advantages(scores, ranks, kind=kind).advantages
    assert torch.equal(A, rank_advantages(scores, spread, kind=kind).advantages)


@pytest.mark.parametrize("G", [2, 3, 5, 8, 16])
def test_a_larger_error_weighs_more(G):
    """The further down the policy puts the best response, the larger its advantage."""
    ranks = torch.arange(G)[None]
    seen = []
    for place in range(G):
        order = [*range(1, place + 1), 0, *range(place + 1, G)]  # responses from likeliest to least likely
        scores = torch.empty(1, G, dtype=torch.float64)
        scores[0, order] = -torch.arange(G, dtype=torch.float64)
        seen.append(float(rank_advantages(scores, ranks).advantages[0, 0].abs()))
    assert all(near < far for near, far in pairwise(seen))


@pytest.mark.parametrize("kind", ["directed", "oracle", "zscore"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_all_tied_groups_are_exactly_zero(kind, backend):
    ranks = torch.full((3, 7), 0.1)
    scores, _ = groups(3, 7)
    for scale in ("none", "group"):
        A = rank_advantages(scores, ranks, kind=kind, scale=scale, backend=backend).advantages
        assert (A == 0).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_zscores_do_not_inherit_the_rounding_of_their_mean(backend):
    device = DEVICE.get(backend, "cpu")
    rewards = (torch.rand(64, 16, generator=torch.Generator().manual_seed(0)) + 10).to(device)
    got = rank_advantages(rewards, rewards, kind="zscore", backend=backend).advantages
    want = rank_advantages(rewards.double(), rewards.double(), kind="zscore", backend="reference").advantages
    assert relative(got, want) <= 2e-6  # 5e-6 without
    middle = torch.tensor([[0.9, 0.1, 0.5, 0.5]], device=device)  # 0.5 is their mean in float32 alone
    got = rank_advantages(middle, middle, kind="zscore", backend=backend).advantages
    assert (got[0, 2:] == 0).all() and got[0, 0] > 1


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([[1e8, 1e8 + 8]]),
        torch.tensor([[-1e8, -1e8 - 8, -1e8 - 8, -1e8]]),
        torch.tensor([[2**40 + 1, 2**40, 2**40 + 3]]),
        torch.tensor([[1e9, 1e9 + 0.25, 1e9 + 1]], dtype=torch.float64),
    ],
)
def test_zscores_do_not_depend_on_what_rewards_have_in_common(rewards, backend):
    rewards = rewards.to(DEVICE.get(backend, "cpu"))
    exact = rewards.double()
    centred = exact - exact[0, 0]
    centred = centred - centred.mean()
    want = (centred / (centred.square().sum() / (centred.numel() - 1)).sqrt().add(1e-4)).float()
    scores = torch.zeros_like(rewards, dtype=torch.float32)
    got = rank_advantages(scores, rewards, kind="zscore", backend=backend)
    torch.testing.assert_close(got.advantages, want, rtol=1e-5, atol=0)
    assert got.has_signal.all()
    by_loss = grpo_rank_loss(scores.view(-1, 1), rewards, kind="zscore").advantages
    torch.testing.assert_close(by_loss, want[0], rtol=1e-5, atol=0)
    beside = torch.nn.functional.pad(exact, (0, 1), value=math.nan)
    judged = ~beside.isnan()
    scores = torch.zeros_like(beside, dtype=torch.float32)
    partly = rank_advantages(scores, beside, judged=judged, kind="zscore", backend=backend).advantages
    torch.testing.assert_close(partly[judged], want[0], rtol=1e-5, atol=0)


def test_rewards_whose_squares_overflow_are_refused():
    with pytest.raises(ValueError, match=r"oracle_ranks must be within \+-1.2e\+18 as rewards; got 1"):
        rank_advantages(torch.zeros(1, 2), torch.tensor([[1e20, 2e20]]), kind="zscore")
    wide = torch.tensor([[1e20, 2e20]], dtype=torch.float64)
    assert rank_advantages(wide, wide, kind="zscore").advantages.abs().min() > 0.7


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_invalid_groups_are_zero_whatever_they_hold(backend):
    scores, ranks = groups(4, 5)
    ranks = ranks.float()
    ranks[2], scores[2] = math.nan, math.nan
    valid = torch.tensor([True, True, False, True])
    got = rank_advantages(scores, ranks, valid=valid, backend=backend)
    assert (got.advantages[2] == 0).all() and (got.penalties[2] == 0).all() and not got.has_signal[2]
    want = rank_advantages(scores[valid], ranks[valid], backend=backend)
    assert torch.equal(got.advantages[valid], want.advantages)


def test_scores_are_ignored_where_the_kind_says_so():
    scores, ranks = groups(4, 6)
    for kind in ("oracle", "zscore"):
        clean = rank_advantages(scores, ranks, kind=kind).advantages
        dirty = rank_advantages(scores.fill_(math.nan), ranks, kind=kind).advantages
        assert torch.equal(clean, dirty)


def test_cpu_result_does_not_depend_on_the_number_of_threads():
    scores, ranks = groups(5000, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rank_advantages(scores, ranks, backend="cpu")
        torch.set_num_threads(2)
        two = rank_advantages(scores, ranks, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_judged_responses_are_a_smaller_group(backend, kind):
    """The rest gets 0 whatever stands there; weights multiply a group; a lone verdict says nothing."""
    scores, ranks = groups(3, 5)
    ranks = ranks.float()
    judged = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
    scores[~judged] = ranks[~judged] = math.nan
    weights, device = torch.tensor([0.25, 2.0, 3.0]), DEVICE.get(backend, "cpu")
    inputs = (scores, ranks, judged, weights)
    s, r, j, w = (x.to(device) for x in inputs)
    options = {"kind": kind, "scale": "group", "backend": backend}
    got = rank_advantages(s, r, judged=j, weights=w, **options)
    for n, members in enumerate(judged):
        if members.sum() < 2:
            assert not got.has_signal[n] and all(not x[n].any() for x in got)
            continue
        part = rank_advantages(s[n : n + 1, members], r[n : n + 1, members], **options)
        want = part._replace(advantages=part.advantages * weights[n].to(device))
        for name, x, y in zip(RankAdvantages._fields, got, want):
            x = x[n : n + 1, members] if x.dim() == 2 else x[n : n + 1]
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)
        assert (got.advantages[n, ~members] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_groups_of_any_order_and_unequal_size(backend):
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([7, 2, 7, 9, 2, 7, 7, 9, 2])
    scores, ranks = torch.rand(9, generator=generator), torch.randint(0, 4, (9,), generator=generator)
    judged = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
    weights = torch.tensor([1.0, 0.5, 2.0])
    got = rank_advantages(scores, ranks, group_index=index, judged=judged, weights=weights, backend=backend)
    assert got.advantages.shape == (9,) and got.ndcg.shape == (3,)
    for n, name in enumerate((2, 7, 9)):
        rows = index == name
        one = rank_advantages(
            scores[rows][None], ranks[rows][None], judged=judged[rows][None], backend=backend
        )
        torch.testing.assert_close(got.advantages[rows], one.advantages[0] * weights[n])
        torch.testing.assert_close(got.kendall_tau[n], one.kendall_tau[0])


def test_group_index_is_checked():
    scores, ranks = torch.rand(4), torch.arange(4)
    with pytest.raises(ValueError, match="group_index must be"):
        rank_advantages(scores, ranks, group_index=torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match="group_index must be int64 or int32"):
        rank_advantages(scores, ranks, group_index=torch.zeros(4))
    with pytest.raises(TypeError, match="judged must be bool"):
        rank_advantages(scores[None], ranks[None], judged=torch.ones(1, 4))


def test_values_are_not_looked_at_without_validate():
    scores, ranks = torch.rand(1, 3), torch.tensor([[0.0, -1.0, 2.0]])
    with pytest.raises(ValueError, match="at least 0"):
        rank_advantages(scores, ranks)
    assert rank_advantages(scores, ranks, validate=False).advantages[0, 1] > 0
