"""A run on the simulated GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")
from simulated_gpu import DeviceTensor, put

from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.policy.testing import make_media, make_model, make_policy, make_prompt
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.trainer.options import TrainConfig

G = 3


def make_run(family: str, **options):
    """A bfloat16 policy on the device with what an update needs, and prompts whose pixels are there already."""
    policy = make_policy(family, model=put(make_model(family, dtype=torch.bfloat16)), **options)
    assert isinstance(policy.head_weight, DeviceTensor) and policy.device.type == "cuda"
    config = TrainConfig(num_generations=G, beta=0.04)
    run = SimpleNamespace(
        config=config,
        policy=policy,
        world=World(),
        algorithm=make_algorithm(config),
        sampler=GraphSampler(policy),
    )
    media = [make_media("a", (2, 4, 4)), make_media("b", (1, 4, 8))]
    media = [on_device(m) for m in media]
    prompts = [make_prompt(family, (media[i],), after=3 + i, seed=i) for i in (0, 0, 1)]
    run.prompts = [
        Prompt(p.input_ids, p.media, example=Example(id=str(i), question="?", answer="!"))
        for i, p in enumerate(prompts)
    ]
    return run


def on_device(media):
    return replace(media, patches=media.patches.to("cuda", torch.bfloat16))
