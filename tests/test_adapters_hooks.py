"""SkyRL, prime-rl, rLLM, slime and ms-swift: our hooks inside the packages themselves, where they can be imported."""

from __future__ import annotations

import asyncio
import importlib
from types import SimpleNamespace

import pytest
import torch
from test_adapters_advantages import ANSWERS, IDS, LENGTHS, LOGPS, MASK, TEXTS, WORDS, Abstaining, T, expected
from test_adapters_advantages import responses as token_rows
from test_adapters_packages import batch, compared  # noqa: F401

from rlaif_fast.adapters import ms_swift, prime_rl, rllm, skyrl, slime


def package(name: str):
    """A module of a trainer's, or the reason why it cannot be had."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.fixture
def skyrl_utils():
    utils = package("skyrl.backends.skyrl_train.utils.ppo_utils")
    skyrl.register("rlaif_fast")
    yield utils
    for registry in (utils.PolicyLossRegistry, utils.AdvantageEstimatorRegistry):
        registry.unregister("rlaif_fast")


def test_skyrls_registry_takes_our_loss_and_it_is_skyrls(skyrl_utils, batch):  # noqa: F811
    config = importlib.import_module("skyrl.train.config").AlgorithmConfig(
        policy_loss_type="regular", eps_clip_low=0.1, eps_clip_high=0.3
    )
    old, new, advantages, mask, _ = batch
    metrics = []

    def by(name):
        def loss(leaf):
            function = skyrl_utils.PolicyLossRegistry.get(name)
            value, found = function(leaf, old, advantages, config, mask, rollout_logprobs=old + 0.1)
            metrics.append(found)
            return value

        return loss

    compared(by("rlaif_fast"), by("regular"), new)
    assert metrics[0].keys() == metrics[1].keys()
    assert 0.0 < metrics[0]["clip_ratio"] < 1.0
    config.off_policy_correction.tis_ratio_type = "token"
    with pytest.raises(ValueError, match="tis_ratio_type must be null"):
        by("rlaif_fast")(new)


def skyrl_trainer(base):
    trainer = object.__new__(skyrl.ranked_trainer(base, Abstaining(), reference=ANSWERS.get))
    algorithm = SimpleNamespace(
        advantage_estimator="rlaif_fast", use_kl_in_reward=False, gamma=1.0, lambd=1.0, grpo_norm_by_std=True
    )
    trainer.cfg = SimpleNamespace(
        trainer=SimpleNamespace(algorithm=algorithm), generator=SimpleNamespace(step_wise_trajectories=False)
    )
    trainer.tokenizer, trainer.all_metrics = Words(), {}
    return trainer


class Words:
    """A response is one token of text, and eights that are dropped; a prompt is one token."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        names = {200: "p", 201: "q", **{number: text for text, number in WORDS.items()}}
        return ["".join(names.get(int(token), "") for token in row) for row in rows]


def skyrl_fields():
    """SkyRL's rows: padding, prompt, response, all to the right; the tensors of tokens to the right as well."""
    ids, mask, logps = torch.zeros(6, T + 1, dtype=torch.long), torch.zeros(6, T), torch.zeros(6, T)
    for row, length in enumerate(LENGTHS.tolist()):
        ids[row, -length:] = token_rows()[row, :length]
        ids[row, -length - 1] = 200 + "pq".index(IDS[row])
        mask[row, -length:], logps[row, -length:] = 1, LOGPS[row, :length]
    return {
        "sequences": ids, "attention_mask": (ids != 0).long(), "response_mask": mask, "loss_mask": mask,
        "action_log_probs": logps, "rewards": torch.ones(6, T), "values": None,
    }  # fmt: skip


def test_skyrl_ranks_before_it_makes_advantages(skyrl_utils):
    base = package("skyrl.train.trainer").RayPPOTrainer
    batches = importlib.import_module("skyrl.backends.skyrl_train.training_batch")
    trainer, fields = skyrl_trainer(base), skyrl_fields()
    data = batches.TrainingInputBatch(fields)
    data.metadata = {"uids": IDS, "avg_response_length": 2.0}
    done = trainer.compute_advantages_and_returns(data)
    wanted = expected()[:, None] * fields["response_mask"]
    torch.testing.assert_close(done["advantages"], wanted, rtol=1e-5, atol=1e-6)
    assert 0.0 < trainer.all_metrics["oracle/gain"] < 1.0


def test_prime_rl_imports_our_loss_and_assigns_our_advantages():
    losses, algo = package("prime_rl.trainer.rl.loss"), package("prime_rl.orchestrator.algo")
    vf, configs = package("verifiers.v1"), package("prime_rl.configs.algorithm")
    custom = importlib.import_module("prime_rl.configs.trainer").CustomLossConfig(
        import_path="rlaif_fast.adapters.prime_rl.loss", kwargs={"epsilon": 0.1, "epsilon_high": 0.3}
    )
    new = LOGPS[0].clone().requires_grad_()
    old, advantages = LOGPS[0] + 0.3 * torch.randn(T, generator=torch.Generator().manual_seed(1)), LOGPS[1]
    total, metrics = losses.compute_loss(
        [new],
        [old],
        None,
        [advantages],
        [MASK[1]],
        None,
        None,
        None,
        losses.setup_rl_loss_fn(custom),
        4,
        1,
        1,
    )
    ratio = (new - old).exp()
    clipped = torch.maximum(-ratio * advantages, -ratio.clamp(0.9, 1.3) * advantages)[MASK[1]].sum() / 4
    torch.testing.assert_close(total, clipped)
    torch.testing.assert_close(*(torch.autograd.grad(x, new)[0] for x in (total, clipped)))
    assert metrics

    before = dict(algo.ALGORITHM_CLASSES)
    try:
        prime_rl.register(Abstaining())
        algorithm = algo.build_algorithm(configs.GRPOAlgoConfig(), None)
        with pytest.raises(ValueError, match="length_penalty must be null"):
            shaped = configs.GRPOAlgoConfig(length_penalty=configs.LinearLengthPenaltyConfig())
            algo.build_algorithm(shaped, None)
    finally:
        algo.ALGORITHM_CLASSES.update(before)
    for name in ANSWERS:
        rows = [row for row, group in enumerate(IDS) if group == name]
        episodes = [verifiers_episode(vf, row) for row in rows]
        failed = verifiers_episode(vf, rows[0])
        failed.traces[0].ok = False
        asyncio.run(algorithm.finalize_group([*episodes, failed]))
        for row, episode in zip(rows, episodes):
            credit = episode.traces[0].branches[0].advantages
            assert credit == pytest.approx(
                [0.0, 0.0, *[expected()[row].item()] * int(LENGTHS[row])], abs=1e-6
            )
        assert failed.traces[0].nodes[1].advantages is None


def verifiers_episode(vf, row: int):
    length = int(LENGTHS[row])
    graph, traces = (
        importlib.import_module("verifiers.v1.graph"),
        importlib.import_module("verifiers.v1.trace"),
    )
    types = importlib.import_module("verifiers.v1.types")
    asked = graph.MessageNode(
        message=types.UserMessage(content=IDS[row]), token_ids=[1, 2], mask=[False, False]
    )
    said = graph.MessageNode(
        message=types.AssistantMessage(content=TEXTS[row]), parent=0, sampled=True, token_ids=[3] * length,
        mask=[True] * length, logprobs=LOGPS[row, :length].tolist(),
    )  # fmt: skip
    trace = traces.Trace.model_construct(
        id=str(row), nodes=[asked, said], calls=[], info={"answer": ANSWERS[IDS[row]]}, ok=True, rewards={},
        task=SimpleNamespace(data=SimpleNamespace(idx=0)), agent=SimpleNamespace(name="agent", trainable=True),
    )  # fmt: skip
    return vf.Episode.model_construct(traces=[trace])


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rllm_groups(types):
    groups = []
    for name, answer in ANSWERS.items():
        rows = [row for row, group in enumerate(IDS) if group == name]
        trajectories = [
            types.Trajectory(
                reward=0.5, task=types.Task(id=name, instruction=name, metadata={"ground_truth": answer}),
                steps=[
                    types.Step(
                        chat_completions=chat(name, TEXTS[row]),
                        model_response=TEXTS[row], response_ids=[3] * int(LENGTHS[row]),
                        logprobs=LOGPS[row, : int(LENGTHS[row])].tolist(),
                    )
                ],
            )
            for row in rows
        ]  # fmt: skip
        groups.append(types.TrajectoryGroup(trajectories=trajectories, group_id=f"{name}:solver"))
    return groups


def test_rllm_spreads_our_advantages():
    advantage, types = package("rllm.trainer.algorithms.advantage"), package("rllm.types")
    config = importlib.import_module("rllm.trainer.algorithms.config").AlgorithmConfig
    rllm.register("oracle", Abstaining())
    groups = rllm_groups(types)
    metrics = advantage.collect_reward_and_advantage_from_trajectory_groups(
        groups, config(estimator_map={"solver": "oracle"})
    )
    del advantage.RLLM_ADV_ESTIMATOR_REGISTRY["oracle"]
    for group, name in zip(groups, ANSWERS):
        rows = [row for row, other in enumerate(IDS) if other == name]
        made = [trajectory.steps[0].advantage for trajectory in group.trajectories]
        assert made == pytest.approx(expected()[rows].tolist(), abs=1e-6)
    assert metrics["advantage/solver/max"] > 0


def test_slime_takes_our_functions(monkeypatch):
    sample = package("slime.utils.types").Sample
    load = package("slime.utils.misc").load_function
    monkeypatch.setattr(slime, "advantages", slime.ranked_advantages(Abstaining()), raising=False)
    monkeypatch.setattr(slime, "rank", slime.group_rewards(Abstaining()), raising=False)
    samples = [
        sample(
            group_index="pq".index(name), prompt=name, response=TEXTS[row], label=ANSWERS[name],
            rollout_log_probs=LOGPS[row, : int(LENGTHS[row])].tolist(),
        )
        for row, name in enumerate(IDS)
    ]  # fmt: skip
    raw, made = load("rlaif_fast.adapters.slime.advantages")(SimpleNamespace(), samples)
    assert made == pytest.approx(expected().tolist(), abs=1e-6)
    hub = package("slime.rollout.rm_hub")
    args = SimpleNamespace(custom_rm_path="rlaif_fast.adapters.slime.rank")
    rewards = asyncio.run(hub.batched_async_rm(args, [samples[row] for row in (0, 3, 4)]))
    assert rewards == pytest.approx([raw[row] for row in (0, 3, 4)])


def test_ms_swift_calls_our_orm_and_takes_our_advantages():
    rewards = package("swift.rewards")
    data, base = package("swift.rl_core.data"), package("swift.rlhf_trainers.grpo_trainer").GRPOTrainer
    ms_swift.register("oracle", Abstaining(), reference="solution")
    try:
        orm = rewards.orms["oracle"]()
        assert isinstance(orm, rewards.ORM)
    finally:
        del rewards.orms["oracle"]
    chats = [chat(name, text) for name, text in zip(IDS, TEXTS)]
    given = orm(TEXTS, messages=chats, solution=[ANSWERS[name] for name in IDS])
    assert given[0] == given[2] == 1.0 and given[5] is None

    trainer = object.__new__(ms_swift.ranked_trainer(base, Abstaining()))
    trainer.__dict__.update(
        model=SimpleNamespace(training=True), num_generations=3, num_generations_eval=3, kl_in_reward=False,
        beta=0.0, reward_weights=torch.ones(1), dynamic_num_samples=False, advantage_estimator="grpo",
        scale_rewards="group", reward_func_names=["oracle"], _metrics=metrics_of(), _logs=metrics_of(),
    )  # fmt: skip
    samples = [
        data.GRPOSample(
            messages=messages, prompt_id=name, request_id=str(row), extra={"solution": ANSWERS[name]}
        )
        for row, (messages, name) in enumerate(zip(chats, IDS))
    ]
    batches = [
        {
            "grpo_batch": data.GRPOBatch(
                completion_mask=MASK,
                truncated_mask=LENGTHS > 9,
                seq_lengths=LENGTHS,
                old_per_token_logps=LOGPS,
            )
        }
    ]
    made = trainer._compute_advantages(samples, torch.rand(6, 1), batches)
    torch.testing.assert_close(made, expected(), rtol=1e-5, atol=1e-6)


def metrics_of():
    from collections import defaultdict

    return defaultdict(lambda: defaultdict(list))
