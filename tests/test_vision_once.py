"""The vision tower: once a medium, once a step, remembered while frozen, one gradient."""

from __future__ import annotations

import pytest
import torch

from rlaif_fast.policy.features import VisionEncoder
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import (
    FAMILIES,
    make_media,
    make_model,
    make_policy,
    make_prompt,
    make_responses,
    standard_prompts,
)
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler


def count_patches(policy: Policy) -> list[int]:
    """Patches of each later call of the tower."""
    calls: list[int] = []
    policy.vision.tower.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_encodes_each_medium_once(family: str) -> None:
    """Rollout, old, policy and reference passes of five prompts with three distinct media."""
    policy = make_policy(family)
    policy.vision.tower.requires_grad_(False)
    policy.freeze_reference()
    calls = count_patches(policy)
    prompts = standard_prompts(family)
    rollout = SharedPrefixSampler(policy).sample(prompts, 2, SamplingParams(max_new_tokens=4, seed=0))
    lengths = rollout.mask.sum(1)
    with torch.no_grad():
        policy.response_logps(prompts, rollout.token_ids, lengths)
    policy.response_logps(prompts, rollout.token_ids, lengths).sum().backward()
    policy.reference_logps(prompts, rollout.token_ids, lengths)
    assert calls == [32 + 96 + 32]  # a, b and the picture


@pytest.mark.parametrize("family", FAMILIES)
def test_features_match_a_medium_encoded_alone(family: str) -> None:
    policy = make_policy(family)
    prompts = standard_prompts(family)
    features = policy.encode_media(prompts)
    for prompt in prompts:
        if prompt.media:
            gathered = features.gather([prompt])
            alone = VisionEncoder(policy.vision.tower, 0)([prompt]).gather([prompt])
            assert len(gathered) == len(alone) == (2 if family == "qwen3_vl" else 1)
            for a, b in zip(gathered, alone):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_training_tower_gets_its_gradient_in_one_pass() -> None:
    """Two backward passes over halves of the batch, one through the tower, equal one pass over all of it."""
    model = make_model("qwen3_vl")
    policy = make_policy("qwen3_vl", model=model)
    prompts = standard_prompts("qwen3_vl")
    ids, lengths = make_responses([5, 3, 4, 2, 6, 4, 3, 2, 5, 1])
    policy.response_logps(prompts, ids, lengths).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    calls = count_patches(policy)
    features = policy.encode_media(prompts)
    leaves = features.leaves()
    for part in (slice(0, 2), slice(2, 5)):
        rows = slice(part.start * 2, part.stop * 2)
        logps = policy.response_logps(prompts[part], ids[rows], lengths[rows], features=leaves)
        logps.sum().backward()
    assert model.model.visual.patch_embed.proj.weight.grad is None
    features.backward_from(leaves)
    assert len(calls) == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not features.detach().levels[0].requires_grad


def test_frozen_features_are_remembered_within_the_budget() -> None:
    policy = make_policy("qwen3_vl")
    policy.vision.tower.requires_grad_(False)
    media = [make_media(key, (2, 4, 4)) for key in "abc"]
    prompts = [make_prompt("qwen3_vl", (m,)) for m in media]
    calls = count_patches(policy)
    first = policy.encode_media(prompts)
    again = policy.encode_media(prompts[1:])
    assert calls == [96]
    torch.testing.assert_close(again.gather(prompts[2:]), first.gather(prompts[2:]), rtol=0, atol=0)

    size = sum(level[:8].numel() * 4 for level in first.levels)
    small = VisionEncoder(policy.vision.tower, 2 * size)
    small(prompts)  # c and b fit, a is the oldest
    assert small.calls == 3
    small(prompts[1:])
    assert small.calls == 3
    small(prompts[:1])
    assert small.calls == 4


def test_a_changed_tower_forgets() -> None:
    policy = make_policy("qwen3_vl")
    prompts = standard_prompts("qwen3_vl")
    policy.vision.tower.requires_grad_(False)
    calls = count_patches(policy)
    with torch.no_grad():
        before = policy.encode_media(prompts)
        policy.encode_media(prompts)
        assert len(calls) == 1
        policy.vision.tower.merger.linear_fc2.bias.add_(1.0)
        after = policy.encode_media(prompts)
    assert len(calls) == 2
    torch.testing.assert_close(after.levels[0], before.levels[0] + 1.0)


def test_a_training_tower_is_never_served_from_memory() -> None:
    policy = make_policy("qwen3_vl")
    prompts = standard_prompts("qwen3_vl")
    with torch.no_grad():
        assert not policy.encode_media(prompts).levels[0].requires_grad
    assert policy.encode_media(prompts).levels[0].requires_grad


def test_a_fused_optimizer_step_is_seen() -> None:
    policy = make_policy("qwen3_vl")
    prompts = standard_prompts("qwen3_vl")
    with torch.no_grad():
        before = policy.encode_media(prompts).levels[0].clone()
    policy.encode_media(prompts).levels[0].sum().backward()
    torch.optim.AdamW(policy.vision.tower.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        after = policy.encode_media(prompts).levels[0]
    assert (after - before).abs().max() > 1e-2


def test_what_a_tower_gave_before_it_trained_is_forgotten() -> None:
    policy = make_policy("qwen3_vl")
    tower, prompts = policy.vision.tower.requires_grad_(False), standard_prompts("qwen3_vl")
    before = policy.encode_media(prompts).levels[0].clone()
    tower.requires_grad_(True)
    policy.encode_media(prompts).levels[0].sum().backward()
    torch.optim.AdamW(tower.parameters(), lr=0.1, fused=True).step()
    tower.requires_grad_(False)
    assert (policy.encode_media(prompts).levels[0] - before).abs().max() > 1e-2


def test_text_only_prompts_have_no_features() -> None:
    assert make_policy("qwen3_vl").encode_media([make_prompt("qwen3_vl")]) is None
