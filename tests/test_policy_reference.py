"""The reference policy: the policy as a stage began, with LoRA and without."""

from __future__ import annotations

import copy

import pytest
import torch
from shared_prefix_parts import assert_same, distance, standard_case
from torch import Tensor

from rlaif_fast.policy.testing import FAMILIES, make_model, make_policy


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_and_its_reference(family: str) -> None:
    peft = pytest.importorskip("peft")
    base = make_model(family)
    untouched = make_policy(family, model=copy.deepcopy(base), shared_prefix=False)
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)", init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    ours, plain = make_policy(family, model=model), make_policy(family, model=model, shared_prefix=False)
    case = standard_case(family)
    assert_same(ours, plain, case)
    prompts, ids, lengths, sizes = case
    expected = untouched.response_logps(prompts, ids, lengths, group_sizes=sizes)
    features = ours.encode_media(prompts)
    for policy in (ours, plain):
        reference = policy.reference_logps(prompts, ids, lengths, group_sizes=sizes, features=features)
        assert distance(reference, expected) < 1e-5
        assert not reference.requires_grad
    assert distance(ours.response_logps(prompts, ids, lengths, group_sizes=sizes), expected) > 1e-3


def test_lora_in_the_vision_tower_does_not_leak_into_the_reference() -> None:
    peft = pytest.importorskip("peft")
    base = make_model("qwen3_vl")
    untouched = make_policy("qwen3_vl", model=copy.deepcopy(base))
    config = peft.LoraConfig(r=4, target_modules=r".*visual.*\.(qkv|linear_fc1)", init_lora_weights=False)
    ours = make_policy("qwen3_vl", model=peft.get_peft_model(base, config))
    prompts, ids, lengths, sizes = standard_case("qwen3_vl")
    expected = untouched.response_logps(prompts, ids, lengths, group_sizes=sizes)
    features = ours.encode_media(prompts)
    reference = ours.reference_logps(prompts, ids, lengths, group_sizes=sizes, features=features)
    assert distance(reference, expected) < 1e-5


@pytest.mark.parametrize("frozen_tower", [True, False])
def test_reference_copy_stays_where_the_policy_was(frozen_tower: bool) -> None:
    policy = make_policy("qwen3_vl")
    policy.vision.tower.requires_grad_(not frozen_tower)
    prompts, ids, lengths, sizes = standard_case("qwen3_vl")
    with pytest.raises(RuntimeError, match="freeze_reference"):
        policy.reference_logps(prompts, ids, lengths, group_sizes=sizes)
    policy.freeze_reference()
    before = policy.response_logps(prompts, ids, lengths, group_sizes=sizes).detach()
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.05)
    policy.response_logps(prompts, ids, lengths, group_sizes=sizes).sum().backward()
    optimizer.step()
    features = policy.encode_media(prompts)
    calls = []
    policy.vision.tower.register_forward_pre_hook(lambda *_: calls.append(1))
    reference = policy.reference_logps(prompts, ids, lengths, group_sizes=sizes, features=features)
    assert len(calls) == (0 if frozen_tower else 1)
    assert distance(reference, before) < 1e-6
    assert distance(policy.response_logps(prompts, ids, lengths, group_sizes=sizes).detach(), before) > 1e-3


def test_reference_of_a_trained_adapter_is_where_rl_starts() -> None:
    """An adapter that supervised fine-tuning has moved is part of the reference; so are other weights that train."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["visual.merger"])
    policy = make_policy("qwen3_vl", model=peft.get_peft_model(make_model("qwen3_vl"), config))
    case = standard_case("qwen3_vl")
    prompts, ids, lengths, sizes = case

    def logps(features=None) -> Tensor:
        return policy.response_logps(prompts, ids, lengths, group_sizes=sizes, features=features).detach()

    def reference() -> Tensor:
        features = policy.encode_media(prompts)
        return policy.reference_logps(prompts, ids, lengths, group_sizes=sizes, features=features)

    def train() -> None:
        policy.response_logps(prompts, ids, lengths, group_sizes=sizes).sum().backward()
        for parameter in policy.model.parameters():
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=0.02)
                parameter.grad = None

    untrained = logps()
    train()
    started = logps()
    assert distance(started, untrained) > 1e-2
    policy.freeze_reference()
    assert distance(reference(), started) < 1e-6
    train()
    assert distance(logps(), started) > 1e-2
    assert distance(reference(), started) < 1e-6
    assert distance(logps(), started) > 1e-2  # the policy has its own weights back


def test_reference_of_a_new_adapter_costs_nothing() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    policy = make_policy("qwen3_vl", model=peft.get_peft_model(make_model("qwen3_vl"), config))
    policy.freeze_reference()
    assert policy._reference is None
