"""Hooks called as the trainers' documents say, against the formula in plain PyTorch, with no trainer installed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch

from rlaif_fast import rank_advantages
from rlaif_fast.adapters import ms_swift, openrlhf, prime_rl, rllm, skyrl, slime, verl
from rlaif_fast.adapters.ranking import RowRanker
from rlaif_fast.oracle import ReferenceOracle, as_reward

B, T = 4, 6
LENGTHS = torch.tensor([6, 2, 0, 4])


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = (torch.arange(T) < LENGTHS[:, None]).double()
    logps = (-torch.rand(B, T, dtype=torch.float64)).requires_grad_()
    old = logps.detach() + 0.5 * torch.randn(B, T, dtype=torch.float64)
    return SimpleNamespace(logps=logps, old=old, advantages=torch.randn(B, T, dtype=torch.float64), mask=mask)


def clipped(batch, low=0.2, high=0.2, dual=None):
    """(B, T) loss of each token."""
    ratio = (batch.logps - batch.old).exp()
    bounded = ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(-ratio * batch.advantages, -bounded * batch.advantages)
    if dual is not None:
        loss = torch.where(batch.advantages < 0, torch.minimum(loss, -dual * batch.advantages), loss)
    return loss * batch.mask


def same(actual, expected, batch):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(loss, batch.logps, retain_graph=True)[0] for loss in (actual, expected)]
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("info", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 10}])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_verl(batch, mode, info):
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28, clip_ratio_c=1.5, global_batch_info=info
    )
    weights = torch.rand(B, T, dtype=torch.float64) + 0.5
    loss, metrics = verl.policy_loss(
        old_log_prob=batch.old, log_prob=batch.logps, advantages=batch.advantages, response_mask=batch.mask,
        loss_agg_mode=mode, config=config, rollout_is_weights=weights,
    )  # fmt: skip
    tokens = clipped(batch, high=0.28, dual=1.5) * weights
    rows = {"token-mean": tokens.sum(1), "seq-mean-token-sum": tokens.sum(1)}
    rows["seq-mean-token-mean"] = tokens.sum(1) / LENGTHS.clamp(min=1)
    count = LENGTHS.sum() if mode == "token-mean" else (LENGTHS > 0).sum()
    if info:
        count = info["batch_num_tokens" if mode == "token-mean" else "global_batch_size"] / info["dp_size"]
    same(loss, rows[mode].sum() / count, batch)
    assert 0.0 < metrics["actor/pg_clipfrac"] < 1.0
    kl = ((batch.old - batch.logps) * batch.mask).sum() / LENGTHS.sum()
    assert metrics["actor/ppo_kl"] == pytest.approx(kl.item(), rel=1e-9)


def test_verl_refuses_what_it_does_not_know(batch):
    arguments = (batch.old, batch.logps, batch.advantages, batch.mask)
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of .* got 'seq-mean-token-sum-norm'"):
        verl.policy_loss(*arguments, "seq-mean-token-sum-norm", SimpleNamespace(clip_ratio=0.2))
    with pytest.raises(ValueError, match="config must be"):
        verl.policy_loss(*arguments)
    for mode, missing, other in (
        ("token-mean", "batch_num_tokens", "global_batch_size"),
        ("seq-mean-token-sum", "global_batch_size", "batch_num_tokens"),
    ):
        config = SimpleNamespace(clip_ratio=0.2, global_batch_info={"dp_size": 2, other: 10})
        with pytest.raises(ValueError, match=f"must have {missing} where dp_size is above 1"):
            verl.policy_loss(*arguments, mode, config)


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("whole", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 10}])
def test_openrlhf(batch, token_level, whole):
    loss_fn = openrlhf.PolicyLoss(0.1, 0.3, dual_clip=2.0, token_level_loss=token_level)
    loss, clip, kl, sampler, left_out = loss_fn(
        batch.logps, batch.old, batch.advantages, batch.mask, rollout_log_probs=batch.old + 0.25, **whole
    )
    tokens = clipped(batch, 0.1, 0.3, 2.0)
    rows = tokens.sum(1) if token_level else tokens.sum(1) / LENGTHS.clamp(min=1)
    count = LENGTHS.sum() if token_level else (LENGTHS > 0).sum()
    if whole:
        count = 20 if token_level else 5
    same(loss, rows.sum() / count, batch)
    assert 0.0 < clip < 1.0
    torch.testing.assert_close(kl, ((batch.old - batch.logps) * batch.mask).sum() / LENGTHS.sum())
    assert sampler.item() == pytest.approx(0.25) and left_out.item() == 0.0
    missing = "batch_num_tokens" if token_level else "global_batch_size"
    counts = {"batch_num_tokens": 40, "global_batch_size": 10, missing: None}
    with pytest.raises(ValueError, match=f"{missing} must be given where dp_size is above 1"):
        loss_fn(batch.logps, batch.old, batch.advantages, batch.mask, dp_size=2, **counts)


def test_skyrl(batch):
    correction = SimpleNamespace(tis_ratio_type=None)
    config = SimpleNamespace(eps_clip_low=0.1, eps_clip_high=0.3, off_policy_correction=correction)
    arguments = (batch.logps, batch.old, batch.advantages, config, batch.mask, batch.old)
    loss, metrics = skyrl.policy_loss(*arguments)
    same(loss, clipped(batch, 0.1, 0.3).sum(), batch)
    assert 0.0 < metrics["clip_ratio"] < 1.0
    correction.tis_ratio_type = "token"
    with pytest.raises(ValueError, match="tis_ratio_type must be null"):
        skyrl.policy_loss(*arguments)


def test_prime_rl(batch):
    sample = SimpleNamespace(
        trainer_logprobs=batch.logps[0], inference_logprobs=batch.old[0], ref_logprobs=batch.old[0] + 0.1,
        advantages=batch.advantages[0], loss_mask=batch.mask[0].bool(), loss_weights=None,
    )  # fmt: skip
    loss, stats = prime_rl.summed(sample, beta=0.1)
    gap = sample.ref_logprobs - sample.trainer_logprobs
    same(loss, clipped(batch)[0].sum() + 0.1 * (gap.exp() - gap - 1).sum(), batch)
    assert stats["tokens"] == T
    sample.loss_weights = batch.mask[0]
    with pytest.raises(ValueError, match="loss_weights must be None"):
        prime_rl.summed(sample)


def trace(group, text, logps):
    """What of a trace of verifiers' the algorithm reads."""
    asked = SimpleNamespace(
        sampled=False, logprobs=[], message=SimpleNamespace(role="user", content=f"question {group}")
    )
    said = SimpleNamespace(
        sampled=True, logprobs=logps, message=SimpleNamespace(role="assistant", content=text)
    )
    nodes = [asked, said]
    return SimpleNamespace(
        nodes=nodes, branches=[SimpleNamespace(nodes=nodes)], info={"answer": "7"},
        task=SimpleNamespace(data=SimpleNamespace()),
    )  # fmt: skip


def one_group():
    """Texts, log-probabilities, and the advantages that belong to them."""
    texts, logps = ["8", "7", "none"], [[-0.1, -0.3], [-0.5], [-0.4, -0.4, -0.7]]
    scores = torch.tensor([sum(row) / len(row) for row in logps])
    return texts, logps, rank_advantages(scores[None], torch.tensor([[1, 0, 2]])).advantages[0]


def test_prime_rl_credit_of_a_group():
    texts, logps, expected = one_group()
    traces = [trace(0, *x) for x in zip(texts, logps)]
    credit = prime_rl.advantages(RowRanker(ReferenceOracle()), traces)
    assert credit == pytest.approx(expected.tolist(), abs=1e-6)
    assert credit[1] > 0 > min(credit)


def test_rllm():
    texts, logps, expected = one_group()
    trajectories = [
        SimpleNamespace(
            task={"ground_truth": "7"},
            steps=[
                SimpleNamespace(
                    chat_completions=[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}],
                    model_response=text, logprobs=row, response_ids=[1] * len(row),
                )
            ],
        )
        for text, row in zip(texts, logps)
    ]  # fmt: skip
    groups = [SimpleNamespace(trajectories=trajectories), SimpleNamespace(trajectories=trajectories[:2])]
    advantages, returns = rllm.estimator(ReferenceOracle())([], None, traj_groups=groups, more=1)
    assert [len(group) for group in advantages] == [3, 2]
    assert advantages is returns
    torch.testing.assert_close(torch.tensor(advantages[0]).float(), expected)
    trajectories[0].steps[0].logprobs = []
    with pytest.raises(ValueError, match="these steps have no logprobs"):
        rllm.estimator(ReferenceOracle())([], None, traj_groups=groups)
    rllm.estimator(ReferenceOracle(), kind="oracle")([], None, traj_groups=groups)


def samples():
    """Two groups, their rows mixed."""
    answers = (("7", 0), ("4", 1), ("8", 0), ("5", 1), ("none", 0), ("none", 1))
    return [
        SimpleNamespace(
            prompt=f"question {group}", response=text, label=("7", "5")[group], group_index=group,
            rollout_log_probs=[-0.1 * (row + 1), -0.2], loss_mask=None,
        )
        for row, (text, group) in enumerate(answers)
    ]  # fmt: skip


def test_slime_rewards_of_a_group():
    group = [sample for sample in samples() if sample.group_index == 0]
    rewards = asyncio.run(slime.group_rewards(ReferenceOracle())(None, group))
    assert rewards == as_reward(ReferenceOracle())(["q"] * 3, ["7", "8", "none"], reference=["7"] * 3)
    assert rewards[0] > rewards[1] > rewards[2]


def test_slime_advantages_of_a_rollout():
    raw, advantages = slime.ranked_advantages(ReferenceOracle(), scale="group")(None, samples())
    rows = torch.tensor([[0, 2, 4], [1, 3, 5]])
    scores = torch.tensor([sum(s.rollout_log_probs) / 2 for s in samples()])
    ranks = torch.tensor([[0, 1, 2], [1, 0, 2]])
    expected = rank_advantages(scores[rows], ranks, scale="group").advantages
    torch.testing.assert_close(torch.tensor(advantages)[rows], expected, rtol=1e-6, atol=1e-6)
    assert raw[0] == raw[3] == 1.0


def test_ms_swift_orm():
    class Base:
        pass

    orm = ms_swift.orm_class(ReferenceOracle(), Base, reference="solution")()
    assert isinstance(orm, Base)
    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": x}] for x in ("7", "no")]
    rewards = orm(["7", "no"], messages=messages, solution=["7", "7"])
    assert rewards == as_reward(ReferenceOracle())(["q"] * 2, ["7", "no"], reference=["7"] * 2)
    assert rewards[0] > rewards[1]
