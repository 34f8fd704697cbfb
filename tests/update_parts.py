"""Groups that were sampled and ranked, and their update."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.algorithms.group import Group, rank_rollout
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.policy.testing import make_media, make_prompt
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout import PlainSampler, SamplingParams, SharedPrefixSampler
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.rl import update_loss

G = 3


def prompts_about_clips(family: str) -> list:
    """Three questions about one clip, two about another, one about nothing."""
    cat, dog = make_media("cat", (2, 4, 4)), make_media("dog", (1, 4, 8))
    media = [(cat,), (cat,), (cat,), (dog,), (dog,), ()]
    return [make_prompt(family, m, before=2, after=3 + k, seed=0) for k, m in enumerate(media)]


def ranked_groups(policy, prompts) -> list[Group]:
    """Groups as `rank_rollout` makes them, of an oracle that ranks in the order of sampling."""
    sampler = SharedPrefixSampler(policy) if policy.shared_prefix else PlainSampler(policy)
    asked = [
        Prompt(prompt.input_ids, prompt.media, example=Example(id=str(i), question="?", answer="!"))
        for i, prompt in enumerate(prompts)
    ]
    rollout = sampler.sample(asked, G, SamplingParams(max_new_tokens=6, seed=1))
    groups = rank_rollout(asked, rollout, InOrder(), make_algorithm(TrainConfig()))
    advantages = torch.randn(len(groups), G, generator=torch.Generator().manual_seed(2))
    return [replace(group, advantages=row) for group, row in zip(groups, advantages)]


class InOrder:
    name = "in order"

    def rank(self, requests):
        return [Ranking(tuple(range(len(request.responses)))) for request in requests]


def updated(policy, groups, **options):
    """Statistics and gradients of one update."""
    policy.model.zero_grad()
    config = TrainConfig(**{"beta": 0.1} | options)
    run = SimpleNamespace(config=config, policy=policy, world=World(), algorithm=make_algorithm(config))
    stats = {name: float(value) for name, value in update_loss(run, groups, None).items()}
    return stats, {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, expected) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name
