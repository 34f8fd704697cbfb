"""From a loss to new weights: passes of bounded size, float32 copies of 16-bit weights, what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from update_parts import G, assert_same_gradients, prompts_about_clips, ranked_groups, updated

from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.algorithms.group import to_learn_from
from rlaif_fast.algorithms.grpo_rank import GrpoRank
from rlaif_fast.loss.reference.preference import lipo_loss
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.testing import FAMILIES, make_policy, words
from rlaif_fast.prompts.batches import cut_by_tokens, take_turns
from rlaif_fast.rollout import SamplingParams, SharedPrefixSampler
from rlaif_fast.trainer.drawing import draw, weights_to_draw_with
from rlaif_fast.trainer.optimizer import combine_stats, mean_of_updates
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.sft import accumulate


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_passes_of_bounded_size_give_the_same_update(family, num_iterations, loss_type):
    policy = make_policy(family, max_packed_tokens=40)
    policy.freeze_reference()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    groups = ranked_groups(policy, prompts_about_clips(family))
    options = {"num_iterations": num_iterations, "loss_type": loss_type, "num_generations": G}
    expected = updated(policy, groups, **options)
    passes, tower = [], []
    policy.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    policy.vision.tower.register_forward_pre_hook(lambda *_: tower.append(torch.is_grad_enabled()))
    ours = updated(policy, groups, max_packed_tokens=40, **options)
    assert len(passes) >= 8 and max(passes) <= 40
    assert sum(tower) == 1  # with gradient, however many passes
    assert ours[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    assert_same_gradients(ours[1], expected[1])


def test_the_plain_path_is_bounded_too():
    policy = make_policy("qwen3_vl", shared_prefix=False)
    policy.freeze_reference()
    groups = ranked_groups(policy, prompts_about_clips("qwen3_vl"))
    expected = updated(policy, groups, num_generations=G)
    ours = updated(policy, groups, num_generations=G, max_packed_tokens=40)
    assert ours[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    assert_same_gradients(ours[1], expected[1])


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_the_sampling_ratio_weighs_the_loss(num_iterations):
    policy = make_policy("qwen3_vl")
    groups = ranked_groups(policy, prompts_about_clips("qwen3_vl"))
    options = {"beta": 0.0, "num_generations": G, "num_iterations": num_iterations}
    _, expected = updated(policy, groups, **options)
    halved = [replace(group, sampling_ratio=torch.full_like(group.logps, 0.5)) for group in groups]
    _, ours = updated(policy, halved, **options)
    assert_same_gradients({name: 2 * gradient for name, gradient in ours.items()}, expected)


class FromStart(GrpoRank):
    samples_from = "start"


@pytest.mark.parametrize("algorithm", ["grpo_rank", f"{__name__}:FromStart"])
def test_what_the_start_drew_is_weighed_by_the_ratio_to_it(algorithm):
    policy = make_policy("qwen3_vl")
    groups = ranked_groups(policy, prompts_about_clips("qwen3_vl")[:2])
    off = [replace(group, logps=group.logps - 0.1) for group in groups]
    stats, _ = updated(policy, off, beta=0.0, num_generations=G, algorithm=algorithm)
    assert stats["ratio_max"] == pytest.approx(1.0 if algorithm == "grpo_rank" else np.exp(0.1), rel=1e-3)


def test_the_sampling_ratio_is_cut_at_its_cap():
    policy = make_policy("qwen3_vl")
    groups = ranked_groups(policy, prompts_about_clips("qwen3_vl")[:2])

    def gradients(ratio: float, cap: float):
        weighed = [replace(group, sampling_ratio=torch.full_like(group.logps, ratio)) for group in groups]
        return updated(policy, weighed, beta=0.0, num_generations=G, sampling_ratio_cap=cap)[1]

    assert_same_gradients(gradients(8.0, 1.5), gradients(1.5, 2.0))


def test_truncated_responses_are_left_out_where_asked(monkeypatch):
    policy = make_policy("qwen3_vl")
    groups = ranked_groups(policy, prompts_about_clips("qwen3_vl")[:2])
    cut_off = [replace(group, finished=(True,) * (G - 1) + (False,)) for group in groups]
    options = {"beta": 0.0, "num_generations": G}
    _, ours = updated(policy, cut_off, mask_truncated_completions=True, **options)

    def without_the_last(algorithm, verdicts):
        advantages = algorithm.advantages(verdicts).advantages.clone()
        advantages[:, -1] = 0.0
        return {"advantages": advantages.flatten()}

    monkeypatch.setattr(GrpoRank, "loss_inputs", without_the_last)
    _, expected = updated(policy, groups, **options)
    share = (G - 1) / G  # the mean is over the responses that are left
    assert_same_gradients({name: share * gradient for name, gradient in ours.items()}, expected)


@pytest.mark.parametrize("algorithm", ["online_dpo", "lipo"])
def test_preferences_are_learned_from_as_their_formulas_say(algorithm):
    policy = make_policy("qwen3_vl")
    policy.freeze_reference()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    prompts = prompts_about_clips("qwen3_vl")
    groups = ranked_groups(policy, prompts)
    tied = replace(groups[2], ranking=Ranking((0,) * G))
    learned = to_learn_from([*groups[:2], tied], make_algorithm(TrainConfig(algorithm=algorithm)))
    assert [group.texts for group in learned[:2]] == [
        group.texts if algorithm == "lipo" else (group.texts[0], group.texts[-1]) for group in groups[:2]
    ]
    assert len(learned) == (2 if algorithm == "online_dpo" else 3)
    stats, ours = updated(policy, learned, algorithm=algorithm, beta=0.1, max_packed_tokens=40)
    whole, _ = updated(policy, learned, algorithm=algorithm, beta=0.1)
    assert stats == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert stats["pairs"] == (2 if algorithm == "online_dpo" else 2 * G * (G - 1) // 2)

    rows = [tokens for group in groups[:3] for tokens in group.token_ids]
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    s = []
    for logps in (policy.response_logps, policy.reference_logps):
        each = logps(prompts[:3], padded, lengths).split(lengths.tolist())
        s.append(torch.stack([row.sum() for row in each]).view(3, G))
    s = 0.1 * (s[0] - s[1])
    if algorithm == "online_dpo":
        loss = -nn.functional.logsigmoid(s[:2, 0] - s[:2, -1]).mean()
    else:
        labels = torch.tensor([[1.0, 0.5, 0.0]] * 2 + [[0.5] * 3])
        loss = lipo_loss(
            s.view(-1, 1) / 0.1,
            torch.ones(9, 1, dtype=torch.bool),
            torch.zeros(9),
            0.1,
            labels,
            None,
            None,
            3,
        )[0]
    policy.model.zero_grad()
    loss.backward()
    assert_same_gradients(ours, {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("algorithm", ["dpo", "online_dpo"])
@pytest.mark.parametrize("tower_trains", [False, True])
def test_only_fixed_pairs_are_drawn_from_the_start(algorithm, tower_trains):
    policy = make_policy("qwen3_vl")
    policy.vision.tower.requires_grad_(tower_trains)
    policy.freeze_reference(copy=True)
    config = TrainConfig(algorithm=algorithm, num_generations=G)
    run = SimpleNamespace(
        config=config, policy=policy, algorithm=make_algorithm(config), sampler=SharedPrefixSampler(policy)
    )
    prompts, params = prompts_about_clips("qwen3_vl"), SamplingParams(max_new_tokens=6, seed=1)
    with weights_to_draw_with(run):
        before, _ = draw(run, prompts, params)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    weights = [p.detach().clone() for p in policy.model.parameters()]
    with weights_to_draw_with(run):
        after, features = draw(run, prompts, params)
    from_start = algorithm == "dpo"
    assert torch.equal(before.logps, after.logps) == from_start
    assert (features is None) == from_start
    assert all(torch.equal(p, w) for p, w in zip(policy.model.parameters(), weights))


@pytest.mark.parametrize("frozen", [False, True])
def test_supervised_passes_of_bounded_size_give_the_same_gradient(frozen):
    policy = make_policy("qwen3_vl")
    policy.vision.tower.requires_grad_(not frozen)
    prompts = prompts_about_clips("qwen3_vl")
    answers = [words(k, k) for k in range(1, 7)]
    results = []
    for limit in (10_000, 40):
        policy.model.zero_grad()
        run = SimpleNamespace(config=TrainConfig(max_packed_tokens=limit), policy=policy)
        loss = accumulate(run, prompts, answers, 0.1)
        gradients = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
        results.append((loss, gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert_same_gradients(results[1][1], results[0][1])


def test_features_of_several_rollouts_are_one():
    policy = make_policy("qwen3_vl")
    prompts = prompts_about_clips("qwen3_vl")
    parts = [policy.encode_media(prompts[:3]), policy.encode_media(prompts[3:])]
    together = MediaFeatures.concat(parts)
    for ours, expected in zip(together.gather(prompts), policy.encode_media(prompts).gather(prompts)):
        torch.testing.assert_close(ours, expected)


def test_cuts_count_what_is_shared_once():
    prompts = prompts_about_clips("qwen3_vl")
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert cut_by_tokens(prompts, [5] * 6, 10_000) == [slice(0, 6)]
    assert cut_by_tokens(prompts, [5] * 6, 1) == [slice(i, i + 1) for i in range(6)]
    two = lengths[1] + 2 * 5 + 3  # the second question's words differ behind the clip
    assert cut_by_tokens(prompts[:2], [5, 5], two - 4)[0] == slice(0, 1)
    assert cut_by_tokens(prompts[:2], [5, 5], lengths[0] + lengths[1]) == [slice(0, 2)]


def test_questions_take_turns():
    rows = list("abcde")
    assert take_turns(rows, 8, 3) == rows
    seen = [take_turns(rows, 2, visit) for visit in range(5)]
    assert seen[0] == ["a", "b"] and seen[2] == ["e", "a"]
    assert sorted(row for part in seen for row in part) == sorted(rows * 2)


def test_stats_of_parts():
    parts = [
        (1, {"loss": 0.5, "tokens": 1.0, "ratio_max": 3.0, "kl": 1.0}),
        (3, {"loss": 0.25, "tokens": 3.0, "ratio_max": 2.0, "kl": 2.0}),
    ]
    assert combine_stats(parts) == {"loss": 0.75, "tokens": 4.0, "ratio_max": 3.0, "kl": 1.75}


def test_a_part_whose_tokens_are_all_masked_does_not_dilute_a_mean():
    masked = {"loss": 0.0, "tokens": 0.0, "kl": 0.0}
    assert combine_stats([(5, masked), (5, {"loss": 0.5, "tokens": 5.0, "kl": 1.0})]) == {
        "loss": 0.5,
        "tokens": 5.0,
        "kl": 1.0,
    }
    assert combine_stats([(5, masked)]) == masked


def test_a_step_of_several_updates_logs_all_of_them():
    updates = [
        {"loss": 0.5, "tokens": 4.0, "ratio_max": 2.0, "grad_norm": torch.tensor(1.0)},
        {"loss": 1.5, "tokens": 2.0, "ratio_max": 1.0, "grad_norm": torch.tensor(3.0)},
    ]
    assert mean_of_updates(updates) == {"loss": 1.0, "tokens": 6.0, "ratio_max": 2.0, "grad_norm": 2.0}
    assert mean_of_updates(updates[:1]) is updates[0]
    assert mean_of_updates([]) == {}
