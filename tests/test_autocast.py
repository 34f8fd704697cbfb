"""Under autocast, weights of float32 compute in 16 bits: in rollouts and in training passes alike."""

from __future__ import annotations

import pytest
import torch
from rollout_parts import assert_same

from rlaif_fast.loss.testing import relative_l2
from rlaif_fast.policy import cpu_attention
from rlaif_fast.policy.testing import FAMILIES, IDS, make_policy, make_responses, standard_prompts
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler

# of a log-probability: 8 and 11 bits, added up in another order
BOUND = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampler", [SharedPrefixSampler, GraphSampler, PlainSampler])
def test_a_rollout_and_training_agree(sampler, family: str, dtype: torch.dtype) -> None:
    """Also where the sampler was used without autocast before, and is afterwards."""
    policy = make_policy(family)
    policy.forbidden_bias[IDS["word1"]] += 3.0
    prompts, params = standard_prompts(family), SamplingParams(max_new_tokens=6, seed=1)
    ours = sampler(policy)
    before = ours.sample(prompts, 3, params)
    with torch.autocast("cpu", dtype), torch.no_grad():
        rollout = ours.sample(prompts, 3, params)
        logps = policy.response_logps(prompts, rollout.token_ids, rollout.mask.sum(1))
    torch.testing.assert_close(rollout.logps[rollout.mask], logps, rtol=0, atol=BOUND[dtype])
    assert not torch.equal(rollout.logps, before.logps)
    assert_same(ours.sample(prompts, 3, params), before)
    if sampler is SharedPrefixSampler:
        assert ours.decodes_in_cpp


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_in_two_parts(family: str, monkeypatch) -> None:
    """The norms of Qwen3's heads leave queries and keys in float32, beside values of 16 bits."""
    monkeypatch.setattr(cpu_attention, "MIN_NODES", 1)
    monkeypatch.setattr(cpu_attention, "MIN_GAIN", 0.0)
    policy = make_policy(family)
    prompts, (token_ids, lengths) = standard_prompts(family), make_responses([9] * 20)

    def gradients() -> torch.Tensor:
        policy.model.zero_grad()
        policy.response_logps(prompts, token_ids, lengths).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    assert found.dtype == torch.float32
    assert relative_l2(found, expected) < 5e-2


def test_features_of_a_frozen_tower_are_not_mixed() -> None:
    """Those made under autocast were taken for exact ones afterwards, and the other way round."""
    policy = make_policy("qwen3_vl")
    policy.vision.tower.requires_grad_(False)
    prompts = standard_prompts("qwen3_vl")
    exact = policy.encode_media(prompts).levels[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = policy.encode_media(prompts).levels[0]
        calls = policy.vision.calls
        assert torch.equal(policy.encode_media(prompts).levels[0], rounded) and policy.vision.calls == calls
    assert not torch.equal(rounded.float(), exact)
    assert torch.equal(policy.encode_media(prompts).levels[0], exact)
