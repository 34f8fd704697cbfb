"""Rollouts: the same tokens from the same draws, stopping, filters, log-probabilities, and the drawing
itself.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from rollout_parts import EOS, assert_same, make_ending_policy

from rlaif_fast.errors import RlaifFastError
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import (
    FAMILIES,
    IDS,
    make_media,
    make_policy,
    make_prompt,
    standard_prompts,
)
from rlaif_fast.rollout.base import Sampler, SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import GroupCache, SharedPrefixSampler


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(family) -> Policy:
    return make_ending_policy(family)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=9, seed=1),
        SamplingParams(max_new_tokens=7, seed=2, temperature=0.6, top_p=0.8, min_new_tokens=3),
        SamplingParams(max_new_tokens=6, seed=3, temperature=1.4, top_k=5, min_new_tokens=0),
        SamplingParams(max_new_tokens=5, temperature=0.0),
        SamplingParams(max_new_tokens=1, seed=4),
    ],
    ids=["plain softmax", "top-p", "top-k", "greedy", "one token"],
)
def test_same_draws_give_the_tokens_of_generate(policy: Policy, family: str, params: SamplingParams) -> None:
    """Prompts of different lengths with no, one and two media, in one batch."""
    prompts = standard_prompts(family)
    ours = SharedPrefixSampler(policy).sample(prompts, 4, params)
    assert_same(ours, PlainSampler(policy).sample(prompts, 4, params))
    assert_same(GraphSampler(policy).sample(prompts, 4, params), ours)
    assert ours.mask.any(1).all()
    if params.temperature:
        assert len(set(ours.texts)) > 4 or params.max_new_tokens == 1


def test_logps_are_those_of_training(policy: Policy, family: str) -> None:
    """So the first update of a rollout needs no pass for old log-probabilities."""
    prompts = standard_prompts(family)
    params = SamplingParams(max_new_tokens=8, seed=5, temperature=0.9, top_p=0.9, top_k=20)
    rollout = SharedPrefixSampler(policy).sample(prompts, 3, params)
    with torch.no_grad():
        logps = policy.response_logps(prompts, rollout.token_ids, rollout.mask.sum(1), temperature=0.9)
    assert rollout.logps.dtype == torch.float32
    torch.testing.assert_close(rollout.logps[rollout.mask], logps, rtol=1e-5, atol=1e-5)
    assert (rollout.logps[~rollout.mask] == 0).all()


def test_responses_end_at_their_first_end_token(policy: Policy, family: str) -> None:
    params = SamplingParams(max_new_tokens=12, seed=6, min_new_tokens=2)
    rollout = SharedPrefixSampler(policy).sample(standard_prompts(family), 6, params)
    lengths = rollout.mask.sum(1)
    assert lengths.min() < lengths.max()  # some ended early while their neighbours went on
    for row, length, finished in zip(rollout.token_ids, lengths.tolist(), rollout.finished.tolist()):
        tokens = row[:length].tolist()
        assert tokens.count(EOS) == int(finished)
        assert finished == (tokens[-1] == EOS)
        assert finished or length == 12
        assert EOS not in tokens[:2]
        assert (row[length:] == policy.pad_token_id).all()
        assert all(policy.token_ids_allowed[t] for t in tokens)


def test_a_response_does_not_depend_on_its_batch(policy: Policy, family: str) -> None:
    """Draws belong to (response, step), so a group sampled alone from the same draws is the same."""
    prompts = standard_prompts(family)
    params = SamplingParams(max_new_tokens=8, seed=7)
    sampler = SharedPrefixSampler(policy)
    together, alone = sampler.sample(prompts, 4, params), sampler.sample(prompts[:1], 4, params)
    width = alone.token_ids.shape[1]
    assert torch.equal(together.token_ids[:4, :width][alone.mask], alone.token_ids[alone.mask])


@pytest.mark.parametrize("sampler", [SharedPrefixSampler, GraphSampler])
def test_a_rollout_cut_to_fit_memory_is_the_same(sampler) -> None:
    policy = make_policy("qwen3_vl")
    prompts = standard_prompts("qwen3_vl")
    params = SamplingParams(max_new_tokens=6, seed=4)
    expected = sampler(policy).sample(prompts, 3, params)
    columns = []
    policy.max_cached_tokens = 130
    cut = sampler(policy)
    make_cache = cut._make_cache
    cut._make_cache = lambda lengths, g, length: (
        columns.append(len(lengths)) or make_cache(lengths, g, length)
    )
    assert_same(cut.sample(prompts, 3, params), expected)
    assert len(columns) > 1 and max(columns) < len(prompts)


def test_a_part_of_a_rollout_frees_its_keys_and_values_before_the_next_has_its_own() -> None:
    """Both were held, twice what `max_cached_tokens` allows."""
    policy = make_policy("qwen3_vl")
    policy.max_cached_tokens = 1  # a prompt at a time
    caches: list[weakref.ref[GroupCache]] = []

    class Watched(SharedPrefixSampler):
        def _make_cache(self, prompt_lengths, num_generations, length):
            assert [cache() for cache in caches] == [None] * len(caches)
            cache = super()._make_cache(prompt_lengths, num_generations, length)
            caches.append(weakref.ref(cache))
            return cache

    prompts = standard_prompts("qwen3_vl")
    Watched(policy).sample(prompts, 3, SamplingParams(max_new_tokens=4, seed=4))
    assert len(caches) == len(prompts) > 1


def test_nothing_to_respond_to_is_refused() -> None:
    for sampler in (SharedPrefixSampler, PlainSampler):
        policy = make_policy("qwen3_vl", shared_prefix=sampler is SharedPrefixSampler)
        with pytest.raises(ValueError, match="prompts"):
            sampler(policy).sample([], 2, SamplingParams())


def test_logits_that_are_not_finite_are_named() -> None:
    policy = make_policy("qwen3_vl")
    with torch.no_grad():
        policy.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(RlaifFastError, match="not finite"):
        SharedPrefixSampler(policy).sample(standard_prompts("qwen3_vl"), 2, SamplingParams(seed=0))


def test_settings_of_the_checkpoint_do_not_reach_the_draws() -> None:
    """Qwen2.5-VL ships a repetition penalty for chat; training log-probs know nothing of it."""
    policy = make_policy("qwen2_5_vl")
    prompts = standard_prompts("qwen2_5_vl")
    params = SamplingParams(max_new_tokens=8, seed=4)
    expected = PlainSampler(policy).sample(prompts, 2, params)
    settings = policy.model.generation_config
    settings.repetition_penalty, settings.min_p, settings.suppress_tokens = 1.5, 0.3, [IDS["word1"]]
    rollout = PlainSampler(policy).sample(prompts, 2, params)
    assert torch.equal(rollout.token_ids, expected.token_ids)
    assert torch.equal(rollout.logps, expected.logps)
    assert policy.model.generation_config is settings


def test_finished_groups_leave_the_cache(monkeypatch) -> None:
    """When half of the groups have ended the cache is compacted, and the others do not notice."""
    policy = make_policy("qwen3_vl")
    policy.forbidden_bias[EOS] += 4.0
    kept = []
    from rlaif_fast.rollout import shared_prefix

    original = shared_prefix.GroupCache.keep
    monkeypatch.setattr(
        shared_prefix.GroupCache,
        "keep",
        lambda self, groups: (kept.append(len(groups)), original(self, groups))[1],
    )
    prompts = [make_prompt("qwen3_vl", before=2 + i, seed=i) for i in range(8)]
    params = SamplingParams(max_new_tokens=16, seed=11)
    ours = SharedPrefixSampler(policy).sample(prompts, 2, params)
    assert kept
    assert kept == sorted(kept, reverse=True)
    assert_same(ours, PlainSampler(policy).sample(prompts, 2, params))


def test_seed_none_follows_the_global_generator(policy: Policy, family: str) -> None:
    prompts = standard_prompts(family)[:2]
    sampler = SharedPrefixSampler(policy)
    rollouts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rollouts.append(sampler.sample(prompts, 3, SamplingParams(max_new_tokens=6)))
    assert torch.equal(rollouts[0].token_ids, rollouts[1].token_ids)
    assert rollouts[0].texts != rollouts[2].texts


def test_sampling_leaves_the_model_as_it_was(policy: Policy, family: str) -> None:
    policy.model.train()
    rollout = SharedPrefixSampler(policy).sample(
        standard_prompts(family), 2, SamplingParams(max_new_tokens=3)
    )
    assert policy.model.training
    assert not rollout.logps.requires_grad
    assert all(p.grad is None for p in policy.model.parameters())
    assert isinstance(SharedPrefixSampler(policy), Sampler)
    assert isinstance(PlainSampler(policy), Sampler)


def test_shared_features_are_used(policy: Policy, family: str) -> None:
    prompts = standard_prompts(family)
    params = SamplingParams(max_new_tokens=5, seed=8)
    features = policy.encode_media(prompts)
    before = policy.vision.calls
    ours = SharedPrefixSampler(policy).sample(prompts, 2, params, features=features)
    assert policy.vision.calls == before
    assert_same(ours, SharedPrefixSampler(policy).sample(prompts, 2, params))


@pytest.mark.parametrize("max_packed_tokens", [16384, 20])
def test_questions_about_one_clip_are_prefilled_together(family: str, max_packed_tokens: int) -> None:
    """Three about one clip, one of them a beginning of another, two about a second, one about none."""
    policy = make_policy(family, max_packed_tokens=max_packed_tokens)
    cat, dog = make_media("cat", (2, 4, 8)), make_media("dog", (1, 4, 4))
    prompts = [
        make_prompt(family, media, after=after)
        for media, after in [((cat,), 5), ((dog,), 2), ((cat,), 3), ((), 4), ((cat,), 9), ((dog,), 7)]
    ]
    seen: list[int] = []
    hook = policy.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    ours = SharedPrefixSampler(policy).sample(prompts, 3, SamplingParams(max_new_tokens=6, seed=4))
    hook.remove()
    assert_same(ours, PlainSampler(policy).sample(prompts, 3, SamplingParams(max_new_tokens=6, seed=4)))
    # A question that begins as another does is a beginning of it: each clip costs its longest prompt.
    longest = [max(len(prompts[i].input_ids) for i in about) for about in ((0, 2, 4), (1, 5), (3,))]
    if max_packed_tokens == 20:
        assert seen[0] == longest[0] > 20  # a group is never cut
    else:
        assert seen[0] == sum(longest)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_new_tokens": 99}, "min_new_tokens"),
    ],
)
def test_bad_settings_are_named(policy: Policy, family: str, change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        SharedPrefixSampler(policy).sample(standard_prompts(family)[:1], 2, SamplingParams(**change))


def test_no_generations_is_refused(policy: Policy, family: str) -> None:
    with pytest.raises(ValueError, match="num_generations"):
        PlainSampler(policy).sample(standard_prompts(family)[:1], 0, SamplingParams())
