"""PPO's critic: a reward model that learns the oracle's order, and a value model that starts as its copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.algorithms.base import GroupAlgorithm, MakeUpdater, Updates
from rlaif_fast.algorithms.group import Appraisal, Group, minibatches
from rlaif_fast.algorithms.scalar_model import Responses, ScalarModel, parts_of
from rlaif_fast.distributed.world import World
from rlaif_fast.loss.actor_critic import (
    bradley_terry_loss,
    clipped_value_loss,
    generalized_advantages,
    whitened,
)
from rlaif_fast.loss.inputs import Padding
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout.base import Rollout


class RewardAndValue:
    """First the reward model learns the oracle's order of the start's responses, then PPO learns from its scores.

    Beside the policy it holds two sets of the trained weights: the reward model's, with its optimizer while it learns,
    and from the first PPO step the value model's, with its optimizer.

    Args:
        policy: The policy at the start of the stage; its modules serve both models.
        world: The processes of the run.
        algorithm: Its options.
        make_updater: Makes the optimizers.

    Attributes:
        first_policy_step: The rollout (from 0) with which PPO begins.
    """

    def __init__(
        self, policy: Policy, world: World, algorithm: GroupAlgorithm, make_updater: MakeUpdater
    ) -> None:
        self.options = options = algorithm.options
        self.first_policy_step = options.reward_model_steps
        self._policy, self._world, self._make_updater = policy, world, make_updater
        self.reward = ScalarModel(policy)
        self.value: ScalarModel | None = None
        end = None if options.reward_model_refresh else options.reward_model_steps
        rate = options.reward_model_learning_rate
        updates = options.reward_model_updates
        self._reward_updates: Updates | None = make_updater(self.reward, rate, end=end, updates=updates)
        self._value_updates: Updates | None = None

    def asks_oracle(self, step: int) -> bool:
        """Whether the oracle ranks the rollout of this step, counted from 0."""
        return step < self.first_policy_step or self.options.reward_model_refresh

    def judge(self, oracle: Oracle, prompts: Sequence[Prompt], rollout: Rollout, step: int) -> Oracle:
        """What ranks the rollout of this step: the run's oracle, or the reward model."""
        return oracle if self.asks_oracle(step) else _RewardModel(self, prompts, rollout)

    @torch.no_grad()
    def scores(self, prompts: Sequence[Prompt], responses: Responses, finished: Sequence[bool]) -> Tensor:
        """(B,) the reward model's score of each response, response after response."""
        with self.reward.in_place():
            return self._scores(prompts, responses, finished)

    def _scores(self, prompts: Sequence[Prompt], responses: Responses, finished: Sequence[bool]) -> Tensor:
        """As `scores`, differentiable; read from the state that draws the end of sequence and so has seen it all."""
        end, done = self._policy.eos_token_ids[0], iter(finished)
        ended = [[tuple(tokens) if next(done) else (*tokens, end) for tokens in group] for group in responses]
        lengths = torch.tensor([len(tokens) for group in ended for tokens in group])
        states = self.reward(prompts, ended)
        return states[(lengths.cumsum(0) - 1).to(states.device)]

    def appraise(self, groups: Sequence[Group], step: int) -> tuple[list[Group], dict[str, float]]:
        """Learn from the oracle if it was asked, and compute what each token of the policy's responses is worth.

        Returns:
            The groups that the policy learns from, with an `Appraisal`; none before the first PPO step. And figures.
        """
        figures = self._learn_order(groups) if self.asks_oracle(step) else {}
        if step < self.first_policy_step:
            return [], figures
        self._begin_ppo()
        if self.asks_oracle(step):
            scores = self._scores_of(groups)
        else:
            given = [score for group in groups for score in group.ranking.scores or ()]
            scores = torch.tensor(given, device=self._policy.device)
        appraised, fit = self._appraised(groups, scores)
        return appraised, figures | fit

    def _learn_order(self, groups: Sequence[Group]) -> dict[str, float]:
        """Update the reward model, each time from a part of the groups; pairs are counted before they are learned."""
        parts = minibatches(groups, self.options.reward_model_updates)
        sums = [self._learn_part(part) for part in parts]
        loss, ordered, pairs, judged = map(sum, zip(*sums))
        if not judged:
            return {}
        return {
            "reward_model/loss": loss / judged,
            "reward_model/accuracy": ordered / pairs if pairs else float("nan"),
            "reward_model/pairs": pairs,
        }

    def _learn_part(self, groups: Sequence[Group]) -> list[float]:
        """One update; returns, over all processes, loss, pairs ordered as preferred, pairs, and groups."""
        (judged,) = self._world.sum(len(groups))
        assert self._reward_updates is not None
        if not judged:
            self._reward_updates.skip()
            return [0.0] * 4
        ordered = pairs = loss = 0.0
        with self.reward.in_place():
            for part in parts_of(groups, self._policy.max_packed_tokens):
                chosen = groups[part]
                scores = self._scores(*_responses_of(chosen)).view(len(chosen), -1)
                weights = None
                if self.options.weight_by_confidence:
                    weights = scores.new_tensor([group.ranking.confidence for group in chosen])
                preferred = preferences(chosen).to(scores.device)
                center = self.options.center_rewards_coefficient
                found = bradley_terry_loss(scores, preferred, center=center, weights=weights)
                self.reward.backward(found.loss * self._world.size / judged)
                loss += found.loss.item()
                ordered, pairs = ordered + found.ordered.item(), pairs + found.pairs.item()
        self._reward_updates.step()
        return [*self._world.sum(loss, ordered, pairs), judged]

    def _begin_ppo(self) -> None:
        """Start the value model as a copy of the reward model, whose optimizer is dropped if it learns no more."""
        if self.value is not None:
            return
        self.value = ScalarModel(self._policy, like=self.reward)
        self._value_updates = self._make_updater(
            self.value, self.options.value_learning_rate, begin=self.first_policy_step
        )
        if not self.options.reward_model_refresh:
            self._reward_updates = None

    def _scores_of(self, groups: Sequence[Group]) -> Tensor:
        if not groups:
            return torch.zeros(0, device=self._policy.device)
        return self.scores(*_responses_of(groups))

    @torch.no_grad()
    def _appraised(self, groups: Sequence[Group], scores: Tensor) -> tuple[list[Group], dict[str, float]]:
        """The groups with advantages, whitened over all processes, and the value model's targets; and figures of how
        well it predicts them."""
        assert self.value is not None
        lengths = torch.tensor([len(tokens) for g in groups for tokens in g.token_ids], dtype=torch.int64)
        padding = Padding(lengths.to(scores.device), int(lengths.sum()))
        values = scores.new_zeros(0)
        if groups:
            prompts, responses, _ = _responses_of(groups)
            with self.value.in_place():
                values = self.value(prompts, responses)
        rewards = torch.zeros_like(values)
        rewards[(lengths.cumsum(0) - 1).to(scores.device)] = scores  # the score comes with the last token
        grids = (padding.pad(rewards), padding.pad(values), padding.mask)
        gamma, lam = self.options.gamma, self.options.lam
        advantages = padding.pack(generalized_advantages(*grids, gamma=gamma, lam=lam))
        returns = advantages + values
        wide = advantages.double()
        figures = self._fit(values, returns, scores)
        totals = self._world.sum(wide.sum().item(), wide.square().sum().item(), len(wide))
        advantages = whitened(advantages, *totals)
        sizes = [group.tokens for group in groups]
        pieces = zip(*(x.split(sizes) for x in (advantages, values, returns)))
        return [replace(group, appraisal=Appraisal(*piece)) for group, piece in zip(groups, pieces)], figures

    def _fit(self, values: Tensor, returns: Tensor, scores: Tensor) -> dict[str, float]:
        """The mean score, and the share of the variance of the returns that the values explain."""
        error, wide = (returns - values).double(), returns.double()
        missed, square, total, count, score, responses = self._world.sum(
            error.square().sum().item(),
            wide.square().sum().item(),
            wide.sum().item(),
            len(wide),
            scores.double().sum().item(),
            len(scores),
        )
        spread = square - total**2 / max(count, 1)
        explained = 1 - missed / spread if spread > 0 else float("nan")
        return {"reward_model/score": score / max(responses, 1), "value/explained": explained}

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """One update of the value model from appraised groups; all processes call it together."""
        (tokens,) = self._world.sum(sum(group.tokens for group in groups))
        if not tokens:
            if self._value_updates is not None:
                self._value_updates.skip()
            return {}
        assert self.value is not None and self._value_updates is not None
        loss = clipped = 0.0
        with self.value.in_place():
            for part in parts_of(groups, self._policy.max_packed_tokens):
                prompts, responses, _ = _responses_of(groups[part])
                told = [group.appraisal for group in groups[part] if group.appraisal is not None]
                old = torch.cat([one.values for one in told])
                returns = torch.cat([one.returns for one in told])
                clip = self.options.cliprange_value
                costs, outside = clipped_value_loss(self.value(prompts, responses), old, returns, clip=clip)
                self.value.backward(costs.sum() * self._world.size / tokens)
                loss, clipped = loss + costs.sum().item(), clipped + outside.sum().item()
        self._value_updates.step()
        loss, clipped = self._world.sum(loss, clipped)
        return {"value/loss": loss / tokens, "value/clipped": clipped / tokens}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue: both models and their optimizers, as far as they exist."""

        def state(part: Any) -> dict[str, Any] | None:
            return None if part is None else part.state_dict()

        return {
            "reward": state(self.reward),
            "reward_updates": state(self._reward_updates),
            "value": state(self.value),
            "value_updates": state(self._value_updates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.reward.load_state_dict(state["reward"])
        if state["value"] is not None:
            self._begin_ppo()
            assert self.value is not None and self._value_updates is not None
            self.value.load_state_dict(state["value"])
            self._value_updates.load_state_dict(state["value_updates"])
        if self._reward_updates is not None:
            self._reward_updates.load_state_dict(state["reward_updates"])


class _RewardModel:
    """The reward model in place of the oracle, for one rollout: it reads tokens, not the request's text."""

    name = "reward_model"
    gives_scores = True

    def __init__(self, critic: RewardAndValue, prompts: Sequence[Prompt], rollout: Rollout) -> None:
        g = rollout.num_generations
        lengths = rollout.mask.sum(1).tolist()
        rows = [ids[:n] for ids, n in zip(rollout.token_ids.tolist(), lengths)]
        responses = [rows[start : start + g] for start in range(0, len(rows), g)]
        self._scores = critic.scores(prompts, responses, rollout.finished.tolist()).view(-1, g).tolist()

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank by the scores, for the groups of the rollout."""
        return [Ranking(ranks_from_scores(row, 0.0), scores=tuple(row)) for row in self._scores]


def preferences(groups: Sequence[Group]) -> Tensor:
    """(N, G, G) bool: [n, i, j] is true if the oracle ranks response i of group n before j and the two differ."""
    ranks = torch.tensor([[-1 if rank is None else rank for rank in g.ranking.ranks] for g in groups])
    texts = [{tokens: k for k, tokens in enumerate(g.token_ids)} for g in groups]
    which = torch.tensor([[own[tokens] for tokens in g.token_ids] for own, g in zip(texts, groups)])
    judged = ranks >= 0
    better = ranks[:, :, None] < ranks[:, None, :]
    return better & judged[:, :, None] & judged[:, None, :] & (which[:, :, None] != which[:, None, :])


def _responses_of(groups: Sequence[Group]) -> tuple[list[Prompt], Responses, list[bool]]:
    """The prompts, the tokens of the responses to each, and which responses are finished."""
    return (
        [group.prompt for group in groups],
        [group.token_ids for group in groups],
        [done for group in groups for done in group.finished],
    )
