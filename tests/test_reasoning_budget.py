"""The bound on reasoning: where it is closed, by every sampler alike, and that the loss leaves those tokens out."""

from __future__ import annotations

from dataclasses import replace

import family_checkpoints
import pytest
import torch
from test_families_packed import make_encoder, make_prompts
from test_thinking import CLOSED, PLAIN, THINKING, encoder_of
from update_parts import G, assert_same_gradients, prompts_about_clips, ranked_groups, updated

from rlaif_fast.algorithms.group import policy_scores
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import make_policy
from rlaif_fast.rollout.base import Rollout, SamplingParams, concat_rollouts
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.reasoning import closing_tokens
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler
from rlaif_fast.rollout.vllm.requests import sampling_options
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.setup import for_reasoning

BUDGET, LONGEST = 3, 9


@pytest.fixture(scope="module")
def thinker():
    """A policy that closes its reasoning now and then, and some prompts."""
    model, tokenizer = family_checkpoints.make_model("qwen3_vl")
    tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    policies = []
    for shared in (True, False):
        policy = Policy(model, tokenizer, shared_prefix=shared)
        policy.forbidden_bias[closing_tokens(tokenizer)[0]] += 4.0
        policies.append(policy)
    return policies, make_prompts(make_encoder("qwen3_vl", tokenizer, model.config))


def sampled(thinker, sampler: type, **options) -> Rollout:
    (shared, plain), prompts = thinker
    params = SamplingParams(max_new_tokens=LONGEST, seed=2, max_reasoning_tokens=BUDGET, **options)
    return sampler(plain if sampler is PlainSampler else shared).sample(prompts, 4, params)


@pytest.mark.parametrize("sampler", [PlainSampler, SharedPrefixSampler, GraphSampler])
def test_reasoning_is_closed_behind_its_budget(thinker, sampler) -> None:
    rollout = sampled(thinker, sampler)
    closing = closing_tokens(thinker[0][0].tokenizer)
    assert len(closing) == 3  # the mark and two line ends
    assert rollout.forced is not None
    kinds = set()
    for ids, mask, forced in zip(rollout.token_ids.tolist(), rollout.mask, rollout.forced):
        length, places = int(mask.sum()), forced.nonzero()[:, 0].tolist()
        if length <= BUDGET or closing[0] in ids[:BUDGET]:
            kinds.add("its own")
            assert not places
        else:
            kinds.add("forced")
            assert places == [BUDGET, BUDGET + 1, BUDGET + 2]
            assert ids[BUDGET : BUDGET + 3] == closing
            assert length > BUDGET + 3  # it goes on
    assert kinds == {"its own", "forced"}


@pytest.mark.parametrize("sampler", [PlainSampler, GraphSampler])
def test_samplers_close_alike(thinker, sampler) -> None:
    ours, other = sampled(thinker, SharedPrefixSampler), sampled(thinker, sampler)
    assert ours.token_ids.tolist() == other.token_ids.tolist()
    assert ours.forced.tolist() == other.forced.tolist()
    torch.testing.assert_close(ours.logps, other.logps, rtol=1e-4, atol=1e-4)


def test_log_probabilities_are_the_policys_on_every_token(thinker) -> None:
    rollout, policy = sampled(thinker, SharedPrefixSampler), thinker[0][0]
    logps = policy.response_logps(thinker[1], rollout.token_ids, rollout.mask.sum(1))
    torch.testing.assert_close(logps, rollout.logps[rollout.mask], rtol=1e-4, atol=1e-4)


def test_without_a_budget_nothing_is_forced(thinker) -> None:
    (policy, _), prompts = thinker
    params = SamplingParams(max_new_tokens=LONGEST, seed=2)
    assert SharedPrefixSampler(policy).sample(prompts, 4, params).forced is None


def test_rollouts_in_turns_keep_what_was_forced(thinker, monkeypatch) -> None:
    expected = sampled(thinker, SharedPrefixSampler)
    monkeypatch.setattr(thinker[0][0], "max_cached_tokens", 150)
    turns = sampled(thinker, SharedPrefixSampler)
    assert turns.forced.tolist() == expected.forced.tolist()
    assert concat_rollouts([turns]) is turns


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_forced_tokens_teach_nothing(loss_type) -> None:
    """With all tokens but the first forced, the update is that of responses of one token."""
    policy = make_policy("qwen3_vl")
    policy.freeze_reference()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    whole = ranked_groups(policy, prompts_about_clips("qwen3_vl")[:2])
    forced, short = [], []
    for group in whole:
        first = torch.cat([torch.arange(len(tokens)) == 0 for tokens in group.token_ids])
        forced.append(replace(group, forced=~first))
        ids = tuple(tokens[:1] for tokens in group.token_ids)
        short.append(replace(group, token_ids=ids, logps=group.logps[first]))
    options = {"num_generations": G, "loss_type": loss_type, "num_iterations": 2}
    _, ours = updated(policy, forced, **options)
    _, expected = updated(policy, short, **options)
    assert_same_gradients(ours, expected)
    _, other = updated(policy, whole, **options)
    assert any(float((other[name] - ours[name]).abs().max()) > 1e-4 for name in ours)
    none = [replace(group, forced=torch.zeros_like(group.forced)) for group in forced]
    assert_same_gradients(updated(policy, none, **options)[1], other)


def test_the_score_of_a_response_is_of_what_it_chose(thinker) -> None:
    rollout = sampled(thinker, SharedPrefixSampler)
    row = int(rollout.forced.any(1).nonzero()[0, 0])
    chosen = rollout.mask[row] & ~rollout.forced[row]
    for score, expected in (
        ("sum", rollout.logps[row][chosen].sum()),
        ("mean", rollout.logps[row][chosen].mean()),
    ):
        torch.testing.assert_close(policy_scores(rollout, score).flatten()[row], expected)


@pytest.mark.parametrize(
    ("options", "generation", "message"),
    [
        ({"max_reasoning_tokens": 8}, PLAIN, "null, as the chat template opens no reasoning, got 8"),
        ({"max_reasoning_tokens": 8}, CLOSED, "opens no reasoning"),
        ({"max_reasoning_tokens": 12, "max_completion_length": 15}, THINKING, "expected 1 to 11"),
        ({"max_reasoning_tokens": 0}, THINKING, "expected 1 to 252"),
        ({"max_reasoning_tokens": 8, "sampler": "vllm"}, THINKING, "null where sampler is vllm"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(options, generation, message) -> None:
    with pytest.raises(UsageError, match=f"max_reasoning_tokens: .*{message}"):
        for_reasoning(TrainConfig(**options), encoder_of(generation))


@pytest.mark.parametrize("algorithm", ["online_dpo", "dpo", "lipo", "ppo_rm"])
def test_algorithms_that_count_every_token_refuse_it(algorithm) -> None:
    with pytest.raises(UsageError, match=f"max_reasoning_tokens: {algorithm}.* does not read it"):
        TrainConfig(algorithm=algorithm, max_reasoning_tokens=8)


def test_a_tokenizer_that_spells_the_mark_is_refused() -> None:
    with pytest.raises(UsageError, match="no token of its own for </think>"):
        closing_tokens(family_checkpoints.make_tokenizer("qwen3_vl"))


@pytest.mark.parametrize("named", [False, True])
def test_marks_of_reasoning_that_are_special_tokens_are_drawn_and_read(named) -> None:
    """As fine-tunes add them: the policy can close its reasoning, and what stands behind can be told apart."""
    model, tokenizer = family_checkpoints.make_model("qwen3_vl")
    if named:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    else:
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder = make_encoder("qwen3_vl", tokenizer, model.config)
    [prompt, *_] = make_prompts(encoder)
    taught = encoder.encode_answer("<think>left</think> red")
    assert closing_tokens(tokenizer)[0] in taught
    for shared, sampler in ((True, SharedPrefixSampler), (False, PlainSampler)):
        policy = Policy(model, tokenizer, shared_prefix=shared)
        logps = policy.response_logps([prompt], torch.tensor([taught]), torch.tensor([len(taught)]))
        assert logps.min() > -100  # none is forbidden
        policy.forbidden_bias[closing_tokens(tokenizer)[0]] += 5.0
        rollout = sampler(policy).sample([prompt], 4, SamplingParams(max_new_tokens=LONGEST, seed=2))
        closes = (rollout.token_ids == closing_tokens(tokenizer)[0]).sum(1)
        assert closes.sum() > 0
        assert [text.count("</think>") for text in rollout.texts] == closes.tolist()
        assert not any("<|im_end|>" in text for text in rollout.texts)


def test_the_engine_refuses_it(thinker) -> None:
    params = SamplingParams(max_new_tokens=LONGEST, max_reasoning_tokens=BUDGET)
    with pytest.raises(UsageError, match="the vllm sampler does not bound the reasoning"):
        sampling_options(thinker[0][0], params, 2)


def test_a_thinking_checkpoint_trains_with_a_budget(tmp_path) -> None:
    model, tokenizer = family_checkpoints.make_model("qwen3_vl")
    tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    marks = family_checkpoints.recipe("qwen3_vl")[2]
    tokenizer.chat_template = family_checkpoints.chat_template(*marks, THINKING)
    folder = tmp_path / "model"
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    family_checkpoints.write_processor(folder)
    output = tmp_path / "run"
    assert family_checkpoints.train_a_little(folder, output, tmp_path / "cache", max_reasoning_tokens=4) == 0
    family_checkpoints.assert_trained(folder, output)
    texts = [text for row in read_jsonl(RunDir.open(output).rollouts) for text in row["responses"]]
    long = [text for text in texts if len(text.split()) > 16]  # a token is at most two words
    assert long
    assert all("</think>" in text.split()[:9] for text in long)
