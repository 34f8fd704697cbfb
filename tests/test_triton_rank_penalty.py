"""The Triton rank penalty against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_cases import DEVICE, LOSS, round_as_compiled, uninitialised_memory_is_nan

from rlaif_fast.loss import reference
from rlaif_fast.loss.inputs import RankInputs
from rlaif_fast.loss.options import KINDS, RankOptions
from rlaif_fast_kernels.rank_penalty import rank_penalty, supports

poison = pytest.fixture(autouse=True)(uninitialised_memory_is_nan)


def check(
    scores: Tensor,
    ranks: Tensor,
    options: RankOptions,
    judged: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    result = rank_penalty(RankInputs(scores, ranks, judged, weights), options)
    wide = RankInputs(scores.double(), ranks.double(), judged, weights)
    expected = reference.rank_penalty(wide, options)
    for got, want in zip(result, expected):
        torch.testing.assert_close(got.to(want.dtype), want, rtol=LOSS[torch.float32], atol=1e-6)


def groups(N: int, G: int, levels: int = 1 << 20) -> tuple[Tensor, Tensor]:
    """Return scores and ranks (N, G); few levels make ties."""
    random = torch.Generator().manual_seed(G)
    scores = torch.randint(levels, (N, G), generator=random) / levels - 2.0
    ranks = torch.randint(min(G, levels), (N, G), generator=random).float()
    return scores.to(DEVICE), ranks.to(DEVICE)


@pytest.mark.parametrize("G", [1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 63, 64])
def test_group_sizes(G: int) -> None:
    check(*groups(2, G), RankOptions())


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_with_ties(kind: str, scale: str) -> None:
    scores, ranks = groups(4, 6, levels=3)
    judged = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0] * 6], device=DEVICE
    )
    scores[~judged.bool()] = float("nan")  # whatever stands there
    options = RankOptions(kind=kind, scale=scale, penalty_weight=0.5)
    check(scores, ranks, options, judged.bool(), torch.tensor([1.0, 0.25, 2.0, 3.0], device=DEVICE))


@pytest.mark.parametrize("G", [7, 43, 49])  # in float32 the mean of 43 or 49 equal gains is another number
@pytest.mark.parametrize("kind", ["directed", "oracle", "zscore"])
def test_all_tied_is_exactly_zero(kind: str, G: int) -> None:
    scores, ranks = groups(1, G)
    result = rank_penalty(
        RankInputs(scores, torch.full_like(ranks, 3.0)), RankOptions(kind=kind, scale="group")
    )
    assert not result.advantages.any()
    assert not result.has_signal.any()


def test_zscores_do_not_inherit_the_rounding_of_their_mean() -> None:
    rewards = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE) + 10
    options = RankOptions(kind="zscore")
    got = rank_penalty(RankInputs(rewards, rewards), options).advantages
    want = reference.rank_penalty(RankInputs(rewards.double(), rewards.double()), options).advantages
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    middle = torch.tensor([[0.9, 0.1, 0.5, 0.5]], device=DEVICE)  # 0.5 is their mean in float32 alone
    assert not rank_penalty(RankInputs(middle, middle), options).advantages[0, 2:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_division_makes_no_advantages_of_agreement(kind: str, monkeypatch) -> None:
    round_as_compiled(monkeypatch, every=2)
    for G in (2, 3, 5, 8, 32, 64):
        order = torch.randperm(G, generator=torch.Generator().manual_seed(G))[None].float().to(DEVICE)
        check(-order, order, RankOptions(kind=kind, scale="group"))


def test_agreement_is_exactly_one(monkeypatch) -> None:
    round_as_compiled(monkeypatch, every=1)
    for G in (2, 3, 5, 7, 33, 64):
        order = (torch.arange(G) // 2)[None].float().to(DEVICE)  # best is shared by two
        result = rank_penalty(RankInputs(-order, order), RankOptions())
        assert (result.ndcg == 1).all() and (result.top1_agreement == 1).all()
        assert (result.kendall_tau == (G > 2)).all()  # two that tie have no order


def test_a_rounded_division_leaves_a_reward_at_the_mean_where_it_is(monkeypatch) -> None:
    round_as_compiled(monkeypatch, every=1)
    rewards = torch.tensor([[1.0, 2.0, 3.0, 2.0, 2.0]], device=DEVICE)
    advantages = rank_penalty(RankInputs(rewards, rewards), RankOptions(kind="zscore")).advantages
    assert not advantages[0, [1, 3, 4]].any()


def test_only_the_order_counts() -> None:
    scores, ranks = groups(3, 6)
    result = rank_penalty(RankInputs(scores, ranks), RankOptions())
    again = rank_penalty(RankInputs(scores * 5 - 3, ranks * 10 + 7), RankOptions())
    assert torch.equal(result.advantages, again.advantages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_scores(dtype: torch.dtype) -> None:
    scores, ranks = groups(3, 6)
    result = rank_penalty(RankInputs(scores.to(dtype), ranks.to(dtype)), RankOptions())
    expected = reference.rank_penalty(RankInputs(scores.to(dtype).double(), ranks.double()), RankOptions())
    assert result.advantages.dtype == dtype
    torch.testing.assert_close(result.advantages.double(), expected.advantages, rtol=1e-2, atol=1e-3)


def test_strided_and_empty() -> None:
    scores, ranks = groups(4, 6)
    check(scores[::2, 1::2], ranks[::2, 1::2], RankOptions())
    assert rank_penalty(RankInputs(scores[:0], ranks[:0]), RankOptions()).advantages.shape == (0, 6)


def test_refusals_name_the_reason() -> None:
    assert supports("rank_penalty", DEVICE, torch.float32, 64) is None
    assert "65" in (supports("rank_penalty", DEVICE, torch.float32, 65) or "")
