"""The optimizer: float32 copies, main memory, schedules, checkpoints."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from update_parts import G, prompts_about_clips, ranked_groups

from rlaif_fast import token_logps
from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.algorithms.group import to_learn_from
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.loss import chunks
from rlaif_fast.loss.testing import relative_l2
from rlaif_fast.policy.testing import make_policy, words
from rlaif_fast.policy.weights import float32_copy
from rlaif_fast.trainer import sft
from rlaif_fast.trainer.optimizer import Updater
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.rl import update_loss
from rlaif_fast.trainer.sft import accumulate


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
        assert skipping.changes == whole.changes  # a checkpoint after a skip is one of another schedule
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
