"""Cosines and sines of the decode step in C++: made for many steps at once where that changes nothing."""

from __future__ import annotations

import torch
from rollout_parts import assert_same

from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import make_model, make_policy, standard_prompts
from rlaif_fast.rollout import cpu_decoder
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler


def asked_rotary(policy: Policy, params: SamplingParams) -> int:
    """How often a rollout asks for cosines and sines; it must be that of the modules."""
    prompts = standard_prompts("qwen3_vl")
    modules = SharedPrefixSampler(policy, cpu_decoder=False).sample(prompts, 2, params)
    asked: list[torch.Tensor] = []
    handle = policy.decoder.rotary_emb.register_forward_hook(lambda _, inputs, __: asked.append(inputs[1]))
    ours = SharedPrefixSampler(policy).sample(prompts, 2, params)
    handle.remove()
    assert_same(ours, modules)
    return len(asked)


def test_rotary_positions_are_made_for_many_steps_at_once(monkeypatch) -> None:
    monkeypatch.setattr(cpu_decoder, "STEPS_AHEAD", 5)
    params = SamplingParams(max_new_tokens=14, min_new_tokens=14, seed=3)
    # One of the prefill, one of the first step by the modules, and three tables for thirteen steps.
    assert asked_rotary(make_policy("qwen3_vl"), params) == 5


def test_rotary_positions_that_depend_on_the_longest_are_asked_for_at_each_step() -> None:
    model = make_model("qwen3_vl")
    config = model.config.text_config
    config.max_position_embeddings = 64
    config.rope_parameters |= {"rope_type": "dynamic", "factor": 2.0}
    rotary = model.model.language_model.rotary_emb
    model.model.language_model.rotary_emb = type(rotary)(config)
    params = SamplingParams(max_new_tokens=14, min_new_tokens=14, seed=3)
    assert asked_rotary(make_policy("qwen3_vl", model=model), params) == 15
