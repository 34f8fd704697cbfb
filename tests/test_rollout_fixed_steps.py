"""Decode steps of fixed shape, as a CUDA graph captures them: kept, checked, and the same tokens."""

from __future__ import annotations

import pytest
import torch
from rollout_parts import assert_same, make_ending_policy

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prefix_decode import refuses_prefix_decode
from rlaif_fast.policy.testing import FAMILIES, make_model, make_policy, standard_prompts
from rlaif_fast.rollout import make_sampler
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.graphs import (
    CHECKED_STEPS,
    LENGTH_STEP,
    MAX_STEPS,
    FixedStep,
    GraphSampler,
    check_graphs,
)
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(family) -> Policy:
    return make_ending_policy(family)


def test_fixed_steps_are_kept_between_rollouts(policy: Policy, family: str) -> None:
    """Buffers hold the last rollout's keys; a rollout of other prompts and the same sizes must not see them."""
    sampler, params = GraphSampler(policy), SamplingParams(max_new_tokens=6, seed=3)
    prompts = standard_prompts(family)
    sampler.sample(prompts, 3, params)
    step = sampler._step
    assert_same(
        sampler.sample(prompts[::-1], 3, params), SharedPrefixSampler(policy).sample(prompts[::-1], 3, params)
    )
    assert sampler._step is step
    assert step.shape[2] % LENGTH_STEP == 0
    assert_same(
        sampler.sample(prompts[:2], 3, params), SharedPrefixSampler(policy).sample(prompts[:2], 3, params)
    )
    assert sampler._step is not step


def test_a_few_fixed_steps_are_kept_and_the_oldest_goes_first(policy: Policy, family: str) -> None:
    sampler, prompts = GraphSampler(policy), standard_prompts(family)
    params = SamplingParams(max_new_tokens=3, seed=3)
    steps = []
    for count in (1, 2, 3, 1, 4):
        sampler.sample(prompts[:count], 2, params)
        steps.append(sampler._step)
    assert steps[3] is steps[0]  # kept across two others
    assert [step.shape[0] for step in sampler._steps.values()] == [3, 1, 4][-MAX_STEPS:]


def test_fixed_steps_by_the_decode_kernel_draw_the_same_tokens(policy: Policy, family: str) -> None:
    if refuses_prefix_decode(policy.device.type, torch.float32, 32) is not None:
        pytest.skip("Triton's interpreter is off, and there is no GPU")
    prompts, params = standard_prompts(family), SamplingParams(max_new_tokens=4, seed=5)
    sampler = GraphSampler(policy, attention="kernel")
    assert_same(sampler.sample(prompts, 3, params), SharedPrefixSampler(policy).sample(prompts, 3, params))
    assert sampler._step._bias is None


def test_the_attention_of_fixed_steps_is_named_or_refused(family: str) -> None:
    policy = make_policy(family)
    with pytest.raises(ValueError, match="expected auto, kernel or sdpa, got 'flash'"):
        GraphSampler(policy, attention="flash").sample(standard_prompts(family), 2, SamplingParams(2))
    policy.model.double()
    with pytest.raises(ValueError, match="the prefix_decode kernel cannot run here"):
        GraphSampler(policy, attention="kernel").sample(standard_prompts(family), 2, SamplingParams(2))


def test_the_check_of_captured_steps_passes_and_fails(family: str, monkeypatch) -> None:
    policy = make_policy(family)
    assert check_graphs(policy) is None
    runs = iter((*[1.0] * CHECKED_STEPS, 1.5))
    run = FixedStep._run
    monkeypatch.setattr(FixedStep, "_run", lambda step: run(step) * next(runs))
    assert "is off by" in check_graphs(policy)
    assert check_graphs(policy) == "StopIteration"


@pytest.mark.parametrize("kind", [GraphSampler, SharedPrefixSampler])
def test_steps_see_new_weights(family: str, kind) -> None:
    policy, params = make_policy(family), SamplingParams(max_new_tokens=6, seed=2)
    prompts = standard_prompts(family)
    sampler = kind(policy)
    before = sampler.sample(prompts, 2, params)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.3)
    after = sampler.sample(prompts, 2, params)
    assert_same(after, SharedPrefixSampler(policy, cpu_decoder=False).sample(prompts, 2, params))
    assert not torch.equal(after.token_ids, before.token_ids)
    assert sampler.decodes_in_cpp == (kind is SharedPrefixSampler)


def test_samplers_by_name(tmp_path, monkeypatch) -> None:
    policy, plain = make_policy("qwen3_vl"), make_policy("qwen3_vl", shared_prefix=False)
    assert type(make_sampler(policy)) is SharedPrefixSampler
    assert type(make_sampler(policy, "plain")) is type(make_sampler(plain)) is PlainSampler
    with pytest.raises(UsageError, match="cuda_graphs needs a model on a GPU, this one is on cpu"):
        make_sampler(policy, "cuda_graphs")
    with pytest.raises(UsageError, match="shared_prefix needs shared_prefix: true"):
        make_sampler(plain, "shared_prefix")
    with pytest.raises(UsageError, match="unknown sampler 'vlm'"):
        make_sampler(policy, "vlm")
    meta = tmp_path / "echo-1.0.dist-info"
    meta.mkdir()
    (tmp_path / "echo_sampler.py").write_text("def make(policy):\n    return 'echo', policy\n")
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: echo\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[rlaif_fast.samplers]\necho = echo_sampler:make\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_sampler(policy, "echo") == ("echo", policy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_gives_the_same_tokens(family: str) -> None:
    policy = make_policy(family, model=make_model(family).to("cuda"))
    prompts, sampler = standard_prompts(family), GraphSampler(policy)
    for seed in (1, 2):  # captured, then replayed from its first step
        params = SamplingParams(max_new_tokens=9, seed=seed)
        assert_same(
            sampler.sample(prompts, 4, params), SharedPrefixSampler(policy).sample(prompts, 4, params)
        )
    assert sampler._step._graph is not None
