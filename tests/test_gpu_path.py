"""A real training step goes through every kernel that a GPU has, without a GPU: Triton's interpreter, DALI on the CPU.

A bfloat16 model learns from generated clips, supervised and by rankings. What was run is counted where it is called,
so cutting any one wire fails here; the loss and its gradients are compared with the reference in float32.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")

from rlaif_fast.algorithms import AlgorithmOptions, make_algorithm
from rlaif_fast.algorithms.group import rank_rollout
from rlaif_fast.distributed.world import World
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.policy.loading import load_model
from rlaif_fast.rollout import SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.trainer import datasets, setup
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.rl import update_loss
from rlaif_fast.trainer.sft import accumulate
from rlaif_fast.video.dali import DaliDecoder
from rlaif_fast_kernels.launch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="rehearses a GPU on a machine without one"),
    pytest.mark.skipif(
        DaliDecoder.unavailable() is not None, reason="needs nvidia-dali, which decodes on a CPU too"
    ),
]

G = 4
# bfloat16 keeps 8 bits; a loss is a mean over many tokens, a gradient a sum of rounded products through 4 layers.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-2, 3e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu_path")


def config_of(folder, family, **changes):
    values = {
        "model": f"tiny-{family}",
        "device": "cpu",
        "dtype": "bfloat16",
        "decoder": "dali",
        "patchify_backend": "triton",
        "backend": "triton",
        "attention_backend": "sdpa",
        "min_pixels": 1024,
        "max_pixels": 1024,
        "total_pixels": None,
        "fps": 3.0,
        "synthetic_sft_clips": 3,
        "synthetic_rl_clips": 3,
        "synthetic_validation_clips": 2,
        "synthetic_test_clips": 2,
        "num_generations": G,
        "max_completion_length": 6,
        "beta": 0.04,
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "run"),
    }
    return TrainConfig(**(values | changes))


@pytest.fixture
def calls(monkeypatch):
    """Counts the launches of the kernels and the files that DALI decodes."""
    from rlaif_fast_kernels import logits_loss, patchify, prefix_decode, rank_loss, rank_penalty

    counted: Counter[str] = Counter()

    def count(owner, name, label):
        inner = getattr(owner, name)

        class Counted:
            def __getitem__(self, grid):
                launch = inner[grid]

                def run(*arguments, **options):
                    counted[label] += 1
                    return launch(*arguments, **options)

                return run

        monkeypatch.setattr(owner, name, Counted())

    for module, name in (
        (logits_loss, "row_loss_kernel"),
        (patchify, "patchify_kernel"),
        (rank_penalty, "rank_penalty_kernel"),
        (prefix_decode, "prefix_part_kernel"),
    ):
        count(module, name, name)
    ranked = rank_loss.rank_loss

    def rank_loss_with_ranks(logps, entropy, inputs, options):
        counted["rank_loss with ranks" if inputs.oracle_ranks is not None else "rank_loss"] += 1
        return ranked(logps, entropy, inputs, options)

    from rlaif_fast_kernels import linear_loss

    monkeypatch.setattr(rank_loss, "rank_loss", rank_loss_with_ranks)
    monkeypatch.setattr(linear_loss, "rank_loss", rank_loss_with_ranks)
    decode = DaliDecoder.submit

    def submit(self, path, indices):
        counted["dali"] += 1
        return decode(self, path, indices)

    monkeypatch.setattr(DaliDecoder, "submit", submit)
    return counted


def parts(config, data):
    """A run's parts, as the trainer makes them, with the fixed-shape sampler of a GPU."""
    options = setup.resolved_model(config, data)
    loaded = load_model(options)
    policy = setup.make_policy(loaded, options)
    run = SimpleNamespace(
        config=config,
        policy=policy,
        algorithm=make_algorithm(
            AlgorithmOptions(
                **{f.name: getattr(config, f.name) for f in dataclasses.fields(AlgorithmOptions)}
            )
        ),
        oracle=ReferenceOracle(),
        world=World(),
        sampler=GraphSampler(policy, attention="kernel"),
    )
    return loaded, run


def gradients_of(policy):
    found = {n: p.grad.float() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return found


def assert_close(ours, expected):
    assert ours.keys() == expected.keys()
    distance = sum(float((ours[n] - expected[n]).square().sum()) for n in ours) ** 0.5
    size = sum(float(expected[n].square().sum()) for n in ours) ** 0.5
    assert distance < GRADIENT_TOLERANCE * size  # NaN never passes


def groups_with_signal(run, prompts):
    """Groups of the first seed by which not all responses tie: a random model says little, and no version the same."""
    for seed in range(3, 40):
        params = SamplingParams(max_new_tokens=4, seed=seed, temperature=1.0)
        rollout = run.sampler.sample(prompts, G, params)
        groups = rank_rollout(prompts, rollout, run.oracle, run.algorithm)
        if any(group.has_signal for group in groups):
            return groups
    raise AssertionError("all responses tie with every seed")


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_a_training_step_runs_on_the_engine(family, folder, calls):
    config = config_of(folder, family)
    data = datasets.load_data(config)
    loaded, run = parts(config, data)
    assert run.policy.head_weight.dtype == torch.bfloat16
    run.policy.freeze_reference()
    with setup.make_batch_maker(loaded, config) as make_batch:
        prompts = make_batch(data.rl[:3])
        answers = [make_batch.encoder.encode_answer(row.answer) for row in data.rl[:3]]
    assert {media.patches.dtype for prompt in prompts for media in prompt.media} == {torch.bfloat16}
    assert calls["dali"] >= 1 and calls["patchify_kernel"] >= 1

    sft_loss = accumulate(run, prompts, answers, 0.1)
    sft_gradients = gradients_of(run.policy)

    groups = groups_with_signal(run, prompts)
    assert calls["prefix_part_kernel"] >= 1
    stats = update_loss(run, groups, None)
    gradients = gradients_of(run.policy)
    assert calls["row_loss_kernel"] >= 1 and calls["rank_penalty_kernel"] >= 1
    assert calls["rank_loss with ranks"] >= 1 and calls["rank_loss"] == 0

    # The same step in float32, without a kernel of ours, but DALI's pixels: PyAV's alone move gradients by 3 to 5%.
    plain = dataclasses.replace(config, dtype="float32", backend="reference", patchify_backend="reference")
    loaded, other = parts(plain, data)
    other.policy.model.load_state_dict(
        {name: value.float() for name, value in run.policy.model.state_dict().items()}
    )
    other.policy.freeze_reference()
    with setup.make_batch_maker(loaded, plain) as make_batch:
        prompts = make_batch(data.rl[:3])
    expected = accumulate(other, prompts, answers, 0.1)
    assert sft_loss == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert_close(sft_gradients, gradients_of(other.policy))
    groups = [dataclasses.replace(group, prompt=prompt) for group, prompt in zip(groups, prompts)]
    expected_stats = update_loss(other, groups, None)
    assert float(stats["loss"]) == pytest.approx(float(expected_stats["loss"]), rel=LOSS_TOLERANCE, abs=2e-3)
    assert_close(gradients, gradients_of(other.policy))


def test_several_inner_steps_rank_in_the_loss_too(folder, calls):
    config = config_of(folder, "qwen3_vl", num_iterations=2, importance_sampling_level="sequence")
    data = datasets.load_data(config)
    loaded, run = parts(config, data)
    run.policy.freeze_reference()
    with setup.make_batch_maker(loaded, config) as make_batch:
        prompts = make_batch(data.rl[:2])
    rollout = run.sampler.sample(prompts, G, SamplingParams(max_new_tokens=3, seed=1))
    groups = rank_rollout(prompts, rollout, run.oracle, run.algorithm)
    stats = update_loss(run, groups, None)
    assert torch.isfinite(stats["loss"])
    assert calls["rank_loss with ranks"] >= 1 and calls["rank_loss"] == 0


def test_float16_weights_are_refused():
    from rlaif_fast.errors import UsageError
    from rlaif_fast.policy.testing import make_policy
    from rlaif_fast.trainer.optimizer import Updater

    policy = make_policy("qwen3_vl", dtype=torch.float16)
    with pytest.raises(UsageError, match="float16 weights cannot be trained"):
        Updater(
            policy.model,
            World(),
            learning_rate=1e-3,
            weight_decay=0.0,
            betas=(0.9, 0.99),
            max_grad_norm=1.0,
            schedule="constant",
            warmup_steps=0,
            total_steps=1,
            min_lr_ratio=0.1,
        )
