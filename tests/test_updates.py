"""From a loss to new weights: passes of bounded size, float32 copies of 16-bit weights, what is refused."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rlaif_fast import token_logps
from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.algorithms.group import Group, rank_rollout, to_learn_from
from rlaif_fast.algorithms.grpo_rank import GrpoRank
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.loss import chunks
from rlaif_fast.loss.reference.preference import lipo_loss
from rlaif_fast.loss.testing import relative_l2
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.testing import FAMILIES, make_media, make_policy, make_prompt, words
from rlaif_fast.policy.weights import float32_copy
from rlaif_fast.prompts.batches import cut_by_tokens, take_turns
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout import PlainSampler, SamplingParams, SharedPrefixSampler
from rlaif_fast.trainer import sft
from rlaif_fast.trainer.drawing import draw, weights_to_draw_with
from rlaif_fast.trainer.optimizer import Updater, combine_stats, mean_of_updates
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.rl import update_loss
from rlaif_fast.trainer.sft import accumulate

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


# --- the optimizer ------------------------------------------------------------------------------------------


def make_updater(model, **changes) -> Updater:
    options = {
        "learning_rate": 1e-5,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "max_grad_norm": 1e9,
        "schedule": "constant",
        "warmup_steps": 0,
        "total_steps": 100,
        "min_lr_ratio": 0.1,
    }
    return Updater(model, World(), **options | changes)


def drift(dtype: torch.dtype, steps: int, **changes) -> torch.Tensor:
    """How far the weights of a layer go under a steady gradient."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).to(dtype)
    before = model.weight.detach().float().clone()
    with make_updater(model, **changes) as updater:
        for _ in range(steps):
            model.weight.sum().backward()
            updater.step()
    return model.weight.detach().float() - before


def test_small_updates_of_bfloat16_weights_add_up():
    """Without float32 copies four in five weights would never move."""
    moved, exact = drift(torch.bfloat16, 100), drift(torch.float32, 100)
    assert exact.mean() == pytest.approx(-1e-3, rel=1e-3)
    assert moved.mean() == pytest.approx(exact.mean().item(), rel=0.02)
    assert (moved == 0).float().mean() < 0.1


def test_gradients_of_several_passes_are_summed_in_float32():
    model = nn.Linear(8, 1, bias=False).to(torch.bfloat16)
    with make_updater(model) as updater:
        (model.weight.sum() * 256).backward()
        model.weight.sum().backward()  # 256 + 1 is 256 in bfloat16
        assert model.weight.grad is None
        assert updater.step().item() == pytest.approx(257 * 8**0.5)
    model.weight.sum().backward()
    assert model.weight.grad is not None  # the hooks are gone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_in_main_memory_updates_alike(dtype):
    here, there = (drift(dtype, 20, offload=offload, weight_decay=0.1) for offload in (False, True))
    assert here.abs().max() > 0
    assert torch.equal(there, here)


def test_an_optimizer_in_main_memory_leaves_no_gradient_on_the_device():
    model = nn.Linear(8, 2, bias=False)
    before = model.weight.detach().clone()
    with make_updater(model, offload=True) as updater:
        model.weight.sum().backward()
        model.weight.sum().backward()
        assert model.weight.grad is None
        assert updater.step().item() == pytest.approx(2 * 16**0.5)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_with_its_optimizer_moved(first):
    """From main memory to the device, and back: as if it had stayed."""
    torch.manual_seed(0)
    models = [nn.Linear(6, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    whole, parted = models
    inputs = torch.randn(4, 5, 6)

    def steps(updater, model, batch):
        for row in batch:
            model(row).square().sum().backward()
            updater.step()

    with make_updater(whole) as updater:
        steps(updater, whole, inputs)
    with make_updater(parted, offload=first) as updater:
        steps(updater, parted, inputs[:2])
        state = updater.state_dict()
    with make_updater(parted, offload=not first) as updater:
        updater.load_state_dict(state)
        steps(updater, parted, inputs[2:])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parted.parameters(), whole.parameters()))


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of logits a pass."""
    monkeypatch.setattr(chunks, "CPU_LEAST_ROWS", 4)
    monkeypatch.setattr(chunks, "CPU_BYTES", 1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", ["sft", "grpo_rank", "online_dpo", "lipo"])
def test_the_head_s_gradient_reaches_the_optimizer_unrounded(stage, tied, small_chunks, monkeypatch):
    """In bfloat16 it would be off by 2e-3, and more with every chunk and pass."""
    policy = make_policy("qwen3_vl", dtype=torch.bfloat16)
    head = policy.model.get_output_embeddings()
    if not tied:
        head.weight = nn.Parameter(head.weight.detach().clone())
    policy.freeze_reference()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    prompts = prompts_about_clips("qwen3_vl")
    groups = ranked_groups(policy, prompts)
    config = TrainConfig(
        algorithm="grpo_rank" if stage == "sft" else stage, beta=0.1, max_packed_tokens=40, num_generations=G
    )
    run = SimpleNamespace(config=config, policy=policy, world=World(), algorithm=make_algorithm(config))
    exact = torch.zeros(head.weight.shape, dtype=torch.float64)
    monkeypatch.setattr(run.algorithm, "loss", in_float64_too(run.algorithm.loss, exact))
    monkeypatch.setattr(sft, "token_logps", sft_in_float64_too(token_logps, exact, 0.1))
    with make_updater(policy.model) as updater:
        if stage == "sft":
            accumulate(run, prompts, [words(k, k) for k in range(1, 7)], 0.1)
            fed = [words(k, k) for k in range(1, 7)]
        else:
            update_loss(run, to_learn_from(groups, run.algorithm), None)
            fed = [tokens for group in groups for tokens in group.token_ids]
        copy = float32_copy(head.weight)
        assert copy is not None and copy.dtype == torch.float32 and head.weight.grad is None
        rows = torch.ones(len(exact), dtype=torch.bool)
        if tied:  # the embedding's part comes through bfloat16, and only to tokens that are fed
            rows[[token for tokens in fed for token in tokens]] = False
            rows[torch.cat([prompt.input_ids for prompt in prompts])] = False
        assert rows.sum() > 10 and relative_l2(copy.grad[rows], exact[rows]) < 1e-5
        gradients = [p.grad for p in updater._updated if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert updater.step() == pytest.approx(float(norm), rel=1e-6)
        assert torch.equal(head.weight, copy.bfloat16())
    assert policy.head_float32 is None  # the copy is let go with the updater


def in_float64_too(loss, total):
    """A loss that also adds the exact gradient of the head to `total`."""

    def both(hidden, weight, token_ids, *, float32_weight, **inputs):
        leaf = weight.detach().double().requires_grad_()
        wide = {name: x.double() if is_float(x) else x for name, x in inputs.items()}
        loss(hidden.detach().double(), leaf, token_ids, **wide).loss.backward()
        total.add_(leaf.grad)
        return loss(hidden, weight, token_ids, float32_weight=float32_weight, **inputs)

    return both


def sft_in_float64_too(logps, total, scale):
    def both(hidden, weight, token_ids, *, bias, **options):
        leaf = weight.detach().double().requires_grad_()
        (-scale * logps(hidden.detach().double(), leaf, token_ids, bias=bias.double()).sum()).backward()
        total.add_(leaf.grad)
        return logps(hidden, weight, token_ids, bias=bias, **options)

    return both


def is_float(x) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def test_a_frozen_head_has_no_copy():
    policy = make_policy("qwen3_vl", dtype=torch.bfloat16)
    policy.head_weight.requires_grad_(False)
    groups = ranked_groups(policy, prompts_about_clips("qwen3_vl")[:2])
    config = TrainConfig(beta=0.0, num_generations=G)
    run = SimpleNamespace(config=config, policy=policy, world=World(), algorithm=make_algorithm(config))
    with make_updater(policy.model) as updater:
        assert policy.head_float32 is None
        update_loss(run, groups, None)
        assert updater.step() > 0 and policy.head_weight.grad is None


def test_a_checkpoint_holds_the_float32_weights():
    torch.manual_seed(0)
    models = [nn.Linear(8, 8).to(torch.bfloat16) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def train(updater, model, steps):
        for _ in range(steps):
            model(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
            updater.step()

    whole = make_updater(models[0])
    train(whole, models[0], 3)
    state = copy.deepcopy(whole.state_dict())
    rounded = {name: value.clone() for name, value in models[0].state_dict().items()}
    train(whole, models[0], 20)
    models[1].load_state_dict(rounded)
    resumed = make_updater(models[1])
    resumed.load_state_dict(state)
    train(resumed, models[1], 20)
    for ours, expected in zip(resumed.state_dict()["float32_weights"], whole.state_dict()["float32_weights"]):
        assert torch.equal(ours, expected)


def test_a_run_goes_on_in_float32_where_bfloat16_left_it():
    torch.manual_seed(0)
    model = nn.Linear(8, 8).to(torch.bfloat16)
    updater = make_updater(model)
    model.weight.sum().backward()
    updater.step()
    state = updater.state_dict()
    wide = nn.Linear(8, 8)
    wide.load_state_dict(model.state_dict())
    make_updater(wide).load_state_dict(state)
    assert torch.equal(wide.weight, state["float32_weights"][0])


def test_a_schedule_goes_on_where_there_is_nothing_to_learn(recwarn):
    models = [nn.Linear(2, 2) for _ in range(2)]
    schedule = {"schedule": "linear", "warmup_steps": 2, "total_steps": 6}
    whole, skipping = (make_updater(model, **schedule) for model in models)
    for step in range(6):
        models[0].weight.sum().backward()
        whole.step()
        before = models[1].weight.clone()
        if step in (0, 3):
            skipping.skip()
            assert torch.equal(models[1].weight, before)
        else:
            models[1].weight.sum().backward()
            skipping.step()
        assert skipping.learning_rate == whole.learning_rate
    assert not recwarn.list


def test_a_supervised_step_that_nothing_of_could_be_read_is_a_step_of_the_schedule():
    updater = make_updater(nn.Linear(2, 2), learning_rate=1.0, schedule="linear", total_steps=4)
    run = SimpleNamespace(world=World(), make_batch=SimpleNamespace(encoder=None))
    assert sft.learn(run, [], updater) is None
    assert updater.learning_rate == 0.75


def test_a_checkpoint_goes_on_with_another_learning_rate():
    def advance(updater, model, steps):
        for _ in range(steps):
            model.weight.sum().backward()
            updater.step()
        return updater.learning_rate

    schedule = {"schedule": "cosine", "warmup_steps": 2, "total_steps": 10}
    models = [nn.Linear(4, 4) for _ in range(3)]
    fast, slow, resumed = (
        make_updater(model, learning_rate=rate, **schedule) for model, rate in zip(models, (1e-3, 1e-4, 1e-4))
    )
    advance(fast, models[0], 4)
    advance(slow, models[1], 4)
    resumed.load_state_dict(fast.state_dict())
    assert resumed.learning_rate == pytest.approx(slow.learning_rate)
    assert advance(resumed, models[2], 3) == pytest.approx(advance(slow, models[1], 3))


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with make_updater(model) as updater, pytest.raises(RlaifFastError, match="not finite"):
        (model.weight.sum() * float("nan")).backward()
        updater.step()
    assert torch.equal(model.weight, before)


def test_float16_weights_are_refused():
    with pytest.raises(UsageError, match="float16"):
        make_updater(nn.Linear(4, 4).to(torch.float16))
