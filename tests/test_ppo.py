"""PPO on a reward model: its losses against their formulas, what the critic learns, and runs that go on as before."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax, logsigmoid

from rlaif_fast.algorithms import AlgorithmOptions, make_algorithm
from rlaif_fast.algorithms.critic import RewardAndValue, preferences
from rlaif_fast.algorithms.group import Group, rank_rollout
from rlaif_fast.algorithms.scalar_model import ScalarModel
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.loss.actor_critic import (
    bradley_terry_loss,
    clipped_value_loss,
    generalized_advantages,
    whitened,
)
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.policy.testing import make_media, make_policy, make_prompt
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout import SamplingParams, SharedPrefixSampler
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.rl import make_updater

G = 4


# --- the losses -------------------------------------------------------------------------------------------------


def pairs_of(ranks):
    """(N, G, G) bool, which response is ranked before which."""
    return ranks[:, :, None] < ranks[:, None, :]


def test_bradley_terry_is_the_mean_over_the_pairs_of_each_group():
    scores = torch.randn(3, G, dtype=torch.float64, requires_grad=True)
    ranks = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1], [2, 2, 2, 2]])
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    found = bradley_terry_loss(scores, pairs_of(ranks), center=0.1, weights=weights)
    expected, ordered, pairs = scores.new_zeros(()), 0, 0
    for row, order, weight in zip(scores, ranks.tolist(), weights):
        costs = [
            -logsigmoid(row[i] - row[j]) + 0.1 * (row[i] + row[j]) ** 2
            for i in range(G)
            for j in range(G)
            if order[i] < order[j]
        ]
        ordered += sum(int(row[i] > row[j]) for i in range(G) for j in range(G) if order[i] < order[j])
        pairs += len(costs)
        expected = expected + (weight * torch.stack(costs).mean() if costs else 0.0)
    torch.testing.assert_close(found.loss, expected)
    assert (found.ordered, found.pairs) == (ordered, pairs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in (found.loss, expected)))
    assert torch.autograd.gradcheck(
        lambda s: bradley_terry_loss(s, pairs_of(ranks), center=0.1).loss, [scores]
    )


def test_bradley_terry_is_trl_s_for_single_pairs():
    reward_trainer = pytest.importorskip("trl").RewardTrainer
    scores = torch.randn(6, 2, dtype=torch.float64)
    trainer = SimpleNamespace(
        args=SimpleNamespace(center_rewards_coefficient=0.01),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        model=SimpleNamespace(training=False),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"eval": _Lists()},
    )
    logits = torch.cat([scores[:, :1], scores[:, 1:]])
    theirs = reward_trainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), {})
    preferred = pairs_of(torch.tensor([[0, 1]]).expand(6, 2))
    torch.testing.assert_close(bradley_terry_loss(scores, preferred, center=0.01).loss / 6, theirs)


class _Lists(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.9, 1.0)])
def test_advantages_are_the_discounted_sums_of_the_errors(gamma, lam):
    torch.manual_seed(0)
    lengths, T = [5, 1, 3], 5
    rewards, values = torch.randn(2, 3, T, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    found = generalized_advantages(rewards, values.where(mask, torch.nan), mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), 0.0]
        errors = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length))
            assert found[row, t].item() == pytest.approx(expected)
    assert found[~mask].eq(0).all()
    if lam == 1.0:  # then no value but the own one counts
        discounted = sum(gamma**t * rewards[0, t].item() for t in range(T))
        assert found[0, 0].item() == pytest.approx(discounted - values[0, 0].item())


def test_value_loss_is_clipped_where_that_costs_more():
    values = torch.tensor([0.0, 1.0, -1.0, 0.1], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, 1.0, 1.0, 0.0]).double()
    costs, clipped = clipped_value_loss(values, old, returns, clip=0.2)
    assert costs.tolist() == pytest.approx([0.5, 0.32, 2.0, 0.005])  # 0.5 max(0, 0.8^2), 0.5 max(2^2, 1.2^2)
    assert clipped.tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(costs.sum(), values)
    assert gradient.tolist() == pytest.approx([-1.0, 0.0, -2.0, 0.1])


def test_whitening_by_sums_is_that_of_the_batch():
    x = 3 + 2 * torch.randn(50, dtype=torch.float64)
    found = whitened(x[:20], x.sum().item(), x.square().sum().item(), 50)
    torch.testing.assert_close(found, ((x - x.mean()) / (x.var() + 1e-8).sqrt())[:20])


def test_the_policy_loss_is_ppo_s_with_an_advantage_for_each_token():
    torch.manual_seed(0)
    algorithm = make_algorithm(
        AlgorithmOptions(algorithm="ppo_rm", beta=0.2, loss_type="dapo", backend="reference")
    )
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4)
    ids, advantages = torch.tensor([0, 3, 6, 2, 2]), torch.randn(5)
    old, ref = -2 + 0.3 * torch.randn(2, 5)
    output = algorithm.loss(
        *(hidden, weight, ids),
        **algorithm.loss_inputs(None),
        advantages=advantages,
        lengths=torch.tensor([2, 3]),
        old_logps=old,
        ref_logps=ref,
    )
    logps = log_softmax(hidden @ weight.T, -1)[torch.arange(5), ids]
    ratio, gap = (logps - old).exp(), ref - logps
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    expected = -(gain - 0.2 * (gap.exp() - gap - 1)).mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (output.loss, expected)))


# --- the critic -------------------------------------------------------------------------------------------------


class ByFirstToken:
    """Prefers responses whose first word comes first, an order that tokens show."""

    name, asked = "by first token", 0

    def rank(self, requests):
        type(self).asked += len(requests)
        firsts = [[text.split()[:1] for text in request.responses] for request in requests]
        return [Ranking(tuple(sorted(map(str, row)).index(str(x)) for x in row)) for row in firsts]


def sampled(policy, critic=None, step=0, seed=1):
    """Prompts about two clips and one about nothing, ranked as a step of the loop ranks them."""
    cat, dog = make_media("cat", (2, 4, 4)), make_media("dog", (1, 4, 8))
    prompts = [
        Prompt(p.input_ids, p.media, example=Example(id=str(k), question="?", answer="!"))
        for k, media in enumerate([(cat,), (dog,), ()])
        for p in [make_prompt("qwen3_vl", media, before=2, after=3 + k, seed=0)]
    ]
    rollout = SharedPrefixSampler(policy).sample(prompts, G, SamplingParams(max_new_tokens=5, seed=seed))
    judge = ByFirstToken() if critic is None else critic.judge(ByFirstToken(), prompts, rollout, step)
    return rank_rollout(prompts, rollout, judge, make_algorithm(TrainConfig(algorithm="ppo_rm")))


def make_critic(policy, **options):
    config = TrainConfig(
        algorithm="ppo_rm", max_steps=90, warmup_steps=0, learning_rate=3e-3, max_packed_tokens=60, **options
    )

    def updater(*args, **kwargs):
        return make_updater(config, World(), *args, **kwargs)

    return RewardAndValue(policy, World(), make_algorithm(config), updater)


def weights_of(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def test_a_scalar_model_leaves_the_policy_as_it_is_and_its_gradient_is_its_own():
    policy = make_policy("qwen3_vl")
    groups, before = sampled(policy), weights_of(policy)
    model = ScalarModel(policy)
    nn.init.normal_(model.head)
    inputs = [g.prompt for g in groups], [g.token_ids for g in groups]
    with model.in_place():
        states = model(*inputs)
        model.backward(states.square().sum())
    assert states.shape == (sum(g.tokens for g in groups),)
    own = dict(policy.model.named_parameters())
    assert all(p.grad is None and p.equal(before[name]) for name, p in own.items())
    # The same numbers and gradients as from a policy that simply has these weights.
    rows = policy.response_hidden(inputs[0], *_padded(groups), group_sizes=torch.tensor([G] * len(groups)))
    plain = rows.float() @ model.head
    torch.testing.assert_close(states, plain, atol=1e-5, rtol=1e-5)
    expected = torch.autograd.grad(plain.square().sum(), list(own.values()), allow_unused=True)
    for found, wanted in zip([w.grad for w in model.weights], expected):
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def _padded(groups):
    rows = [list(tokens) for g in groups for tokens in g.token_ids]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return padded, torch.tensor([len(row) for row in rows])


def test_the_reward_model_learns_the_oracle_s_order_and_orders_in_its_place():
    policy = make_policy("qwen3_vl")
    critic, before = make_critic(policy, reward_model_steps=40), weights_of(policy)
    figures = [critic.appraise(sampled(policy, critic, step, seed=step % 2), step) for step in range(40)]
    assert all(groups == [] for groups, _ in figures)  # the policy learns from none of them
    accuracy = [numbers["reward_model/accuracy"] for _, numbers in figures]  # before it learns from the pairs
    assert accuracy[0] == 0.5  # a head of zeros
    assert accuracy[1] < 0.9 and accuracy[-2:] == [1.0, 1.0]  # fresh pairs, and those of the 20th round
    asked = ByFirstToken.asked
    (first, *_) = groups = sampled(policy, critic, 40, seed=99)
    assert ByFirstToken.asked == asked  # PPO asks no oracle
    scores = critic.scores(
        [g.prompt for g in groups], [g.token_ids for g in groups], [f for g in groups for f in g.finished]
    ).view(-1, G)
    assert first.ranking.scores == tuple(scores[0].tolist())
    assert first.ranking.ranks[int(scores[0].argmax())] == 0
    assert all(p.equal(before[name]) for name, p in policy.model.named_parameters())


def test_appraisals_are_the_score_at_the_end_seen_from_each_token():
    policy = make_policy("qwen3_vl")
    critic = make_critic(policy, reward_model_steps=2, gamma=1.0, lam=1.0)
    for step in range(2):
        critic.appraise(sampled(policy, critic, step, seed=step), step)
    groups = sampled(policy, critic, 2, seed=7)
    found, figures = critic.appraise(groups, 2)
    for group in found:
        scores = group.ranking.scores
        told = zip(scores, *(x.split([len(t) for t in group.token_ids]) for x in _fields(group)))
        for score, _, values, returns in told:
            # no discount, no value behind
            torch.testing.assert_close(returns, torch.full_like(returns, score))
            assert values[-1].item() == pytest.approx(score, abs=1e-5) or not all(group.finished)
    advantages = torch.cat([group.appraisal.advantages for group in found])
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.var().item() == pytest.approx(1, rel=1e-3)
    assert figures["reward_model/score"] == pytest.approx(
        sum(s for g in groups for s in g.ranking.scores) / (len(groups) * G), abs=1e-6
    )
    losses = [critic.update(found)["value/loss"] for _ in range(12)]
    assert losses[-1] < losses[0]


def _fields(group):
    return group.appraisal.advantages, group.appraisal.values, group.appraisal.returns


def test_a_refreshed_reward_model_asks_the_oracle_at_every_step():
    policy = make_policy("qwen3_vl")
    critic = make_critic(policy, reward_model_steps=1, reward_model_refresh=True)
    critic.appraise(sampled(policy, critic, 0), 0)
    asked = ByFirstToken.asked
    groups, figures = critic.appraise(sampled(policy, critic, 1, seed=2), 1)
    assert ByFirstToken.asked == asked + len(groups)
    assert figures["reward_model/pairs"] > 0 and groups[0].appraisal is not None
    assert groups[0].ranking.scores is None  # the ranks stay the oracle's


def test_equal_responses_and_those_not_judged_are_in_no_pair():
    blank = Group(
        *(None, ("a", "b", "a", "c"), ((1,), (2,), (1,), (3,)), (True,) * 4, torch.zeros(4), None),
        ranking=Ranking((0, 1, 2, None)),
        has_signal=True,
        scores=torch.zeros(4),
        advantages=torch.zeros(4),
        agreement=torch.zeros(2),
    )
    assert preferences([blank]).nonzero().tolist() == [[0, 0, 1], [0, 1, 2]]
    tied = replace(blank, ranking=Ranking((0, 0, 0, 0)))
    assert not preferences([tied]).any()


class Twins(World):
    """Two processes that hold the same."""

    def sum(self, *values):
        return [2 * value for value in values]


def step_of_a_critic(world=None, **options):
    """What a refreshed critic makes of one PPO step, with its gradients left in place; and the rates of its parts."""
    config = TrainConfig(
        algorithm="ppo_rm", reward_model_refresh=True, reward_model_updates=1, max_packed_tokens=60, **options
    )
    policy, rates = make_policy("qwen3_vl"), []

    def updater(model, rate, **span):
        rates.append(rate)
        return SimpleNamespace(step=lambda: None)

    critic = RewardAndValue(policy, world or World(), make_algorithm(config), updater)
    nn.init.normal_(critic.reward.head, generator=torch.Generator().manual_seed(0))
    groups = [
        replace(group, ranking=replace(group.ranking, confidence=sure))
        for group, sure in zip(sampled(policy), (0.25, 0.5, 1.0))
    ]
    found, figures = critic.appraise(groups, config.reward_model_steps)
    with torch.no_grad():
        critic.value.head.mul_(1.1)
    return critic, found, figures | critic.update(found), rates


def test_a_critic_s_figures_and_rates_are_those_of_its_options():
    critic, groups, figures, rates = step_of_a_critic(
        weight_by_confidence=True,
        center_rewards_coefficient=0.5,
        cliprange_value=0.05,
        reward_model_learning_rate=1e-4,
        value_learning_rate=2e-4,
    )
    assert rates == [1e-4, 2e-4]
    prompts, responses = [g.prompt for g in groups], [g.token_ids for g in groups]
    scores = critic.scores(prompts, responses, [f for g in groups for f in g.finished]).view(-1, G)
    weights = torch.tensor([g.ranking.confidence for g in groups])
    order = bradley_terry_loss(scores, preferences(groups), center=0.5, weights=weights)
    assert figures["reward_model/loss"] == pytest.approx(order.loss.item() / len(groups))
    _, old, returns = map(torch.cat, zip(*map(_fields, groups)))
    missed = (returns - old).square().mean() / returns.var(unbiased=False)
    assert figures["value/explained"] == pytest.approx(1 - missed.item(), rel=1e-4)
    costs, outside = clipped_value_loss(1.1 * old, old, returns, clip=0.05)
    assert figures["value/loss"] == pytest.approx(costs.mean().item(), rel=1e-4)
    assert figures["value/clipped"] == pytest.approx(outside.float().mean().item())
    assert 0 < figures["value/clipped"] < 1


def test_processes_with_the_same_groups_learn_as_one_does():
    alone, _, figures, _ = step_of_a_critic()
    twin, _, of_two, _ = step_of_a_critic(Twins(size=2))
    assert of_two == pytest.approx(figures | {"reward_model/pairs": 2 * figures["reward_model/pairs"]})
    for one, other in ((alone.reward, twin.reward), (alone.value, twin.value)):
        torch.testing.assert_close(one.head.grad, other.head.grad)


def test_a_critic_goes_on_from_its_state():
    policy = make_policy("qwen3_vl")
    critic, resumed = (make_critic(policy, reward_model_steps=1, reward_model_refresh=True) for _ in range(2))
    critic.appraise(sampled(policy, critic, 0), 0)
    groups = sampled(policy, critic, 1, seed=2)
    critic.update(critic.appraise(groups, 1)[0])
    resumed.load_state_dict(deepcopy(critic.state_dict()))
    for one in (critic, resumed):
        one.update(one.appraise(groups, 2)[0])
    assert critic.reward.head.equal(resumed.reward.head)
    assert critic.value.head.equal(resumed.value.head)
