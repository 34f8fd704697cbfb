"""What the processes of test_sharding.py do; they import it from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import family_checkpoints
import torch
from test_families_packed import make_clip, make_encoder
from vllm_parts import serving

from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.algorithms.group import Group
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.policy import testing
from rlaif_fast.policy.families.base import ROUTER
from rlaif_fast.policy.loading import ModelOptions
from rlaif_fast.policy.parts import add_lora
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.shard import make_mesh, own_part, shard_policy, whole
from rlaif_fast.prompts.batches import filling_prompt
from rlaif_fast.prompts.encoder import Prompt, PromptEncoder
from rlaif_fast.rollout import PlainSampler, Sampler, SamplingParams, SharedPrefixSampler, VllmSampler
from rlaif_fast.rollout.vllm.weights import merged_weights
from rlaif_fast.runs.checkpoint import CheckpointStore, load_state, load_weights
from rlaif_fast.trainer.optimizer import Updater
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.rl import update_loss
from rlaif_fast.trainer.sft import accumulate

G = 3
Split = Sequence[Sequence[int]]  # the groups of each process in one step

# Of six groups, the last two without media: unequal shares, a process without media, processes without groups.
SPLITS: tuple[Split, ...] = (
    ((0, 1, 2, 4), (3, 5)),
    ((0, 1, 2, 3), (4, 5)),
    ((0, 1, 2, 3, 4, 5), ()),
    ((), (0, 3, 5)),
    ((0, 2, 4), (1, 3, 5)),
)


@dataclass(frozen=True)
class Case:
    """What is trained, and how its steps are shared."""

    family: str = "qwen3_vl"  # of `testing`, or of `family_checkpoints`
    trains: str = "all"  # or "lora", "decoder"
    dtype: torch.dtype = torch.float32
    beta: float = 0.1
    num_iterations: int = 1
    packed: int = 200
    supervised: bool = False
    recompute: bool = False
    splits: tuple[Split, ...] = SPLITS
    together: int = 2
    asynchronous: bool = False  # its checkpoint
    offload: bool = False
    long_questions: bool = False


@dataclass
class Outcome:
    """What five steps left."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, torch.Tensor]]  # before clipping
    weights: dict[str, torch.Tensor]
    sampled: list[list[int]]
    drawn_at_start: list[list[int]]
    drawn_by_reference: list[list[int]]  # after the steps
    drawn_plainly: list[list[int]]
    kept: float  # numbers that this process holds, as a share of all
    dtypes: set[torch.dtype]  # of what the optimizer updates and of its moments


def make_policy(case: Case) -> Policy:
    if case.family in testing.FAMILIES:
        model, tokenizer = testing.make_model(case.family, dtype=case.dtype), testing.TOKENIZER
    else:
        model, tokenizer = family_checkpoints.make_model(case.family, dtype=case.dtype)
    if case.trains == "lora":
        torch.manual_seed(1)
        model.name_or_path = "tiny"  # which adapters name as their base
        model = add_lora(model, ModelOptions(lora_r=4))
    policy = Policy(model, tokenizer, max_packed_tokens=case.packed)
    if case.trains == "decoder":
        policy.vision.tower.requires_grad_(False)
    if case.family == "glm4v_moe" and case.dtype == torch.bfloat16:  # as its checkpoints are read
        for name, parameter in model.named_parameters():
            if ROUTER.search(name):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(False)
    if case.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy


def encoder_of(family: str) -> PromptEncoder:
    """What encodes prompts for a family of `family_checkpoints`."""
    tokenizer = family_checkpoints.make_tokenizer(family)
    return make_encoder(family, tokenizer, family_checkpoints.make_config(family, tokenizer))


def make_prompts(family: str, long_questions: bool = False) -> list[EncodedPrompt]:
    """Six prompts: three about one clip, one about another, two about nothing."""
    if family in testing.FAMILIES:
        cat, dog = testing.make_media("cat", (2, 4, 4)), testing.make_media("dog", (1, 4, 8))
        shown = [(cat,), (cat,), (cat,), (dog,), (), ()]
        prompts = [testing.make_prompt(family, media, before=2, after=3 + k) for k, media in enumerate(shown)]
        if long_questions:
            asked = [torch.tensor(testing.words(15, seed=k)) for k in range(len(prompts))]
            prompts = [
                replace(prompt, input_ids=torch.cat((prompt.input_ids, more)))
                for prompt, more in zip(prompts, asked)
            ]
        return prompts
    encoder, cat, dog = encoder_of(family), make_clip("cat", 4), make_clip("dog", 2)
    shown = [[cat], [cat], [cat], [dog], [], []]
    return [
        encoder.encode(Example(id=str(k), question="what color " * (k + 1)), clips)
        for k, clips in enumerate(shown)
    ]


def make_responses(family: str, lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words of the family's tokenizer, (B, longest), and how many of each row count."""
    if family in testing.FAMILIES:
        return testing.make_responses(lengths, seed=seed)
    tokenizer = family_checkpoints.make_tokenizer(family)
    words = torch.tensor(tokenizer("red blue circle square left", add_special_tokens=False)["input_ids"])
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, len(words), (len(lengths), max(lengths)), generator=generator)
    return words[chosen], torch.tensor(lengths)


def make_filler(policy: Policy, family: str) -> EncodedPrompt:
    """A short prompt, about something where the tower trains."""
    if family not in testing.FAMILIES:
        return filling_prompt(encoder_of(family), with_media=policy.vision.trains)
    media = (testing.make_media("filler", (1, 2, 2)),) if policy.vision.trains else ()
    return testing.make_prompt(family, media, before=1, after=1)


def make_groups(family: str, long_questions: bool = False) -> list[Group]:
    """A group for each prompt."""
    groups = []
    for k, prompt in enumerate(make_prompts(family, long_questions)):
        ids, lengths = make_responses(family, [2 + (k + j) % 4 for j in range(G)], seed=k)
        scores = torch.randn(G, generator=torch.Generator().manual_seed(k))
        groups.append(
            Group(
                prompt=Prompt(
                    prompt.input_ids, prompt.media, example=Example(id=str(k), question="?", answer="!")
                ),
                texts=("",) * G,
                token_ids=tuple(tuple(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())),
                finished=(True,) * G,
                logps=torch.full((int(lengths.sum()),), -3.0),
                sampling_ratio=None,
                ranking=Ranking(tuple((k + j) % G for j in range(G))),
                has_signal=True,
                scores=scores,
                advantages=torch.zeros(G),
                agreement=torch.zeros(2),
            )
        )
    return groups


def begin(world: World, case: Case) -> tuple[SimpleNamespace, Updater]:
    """A policy, sharded where there are several processes, and what updates it."""
    policy = make_policy(case)
    if world.size > 1:
        world.connect()
        mesh = make_mesh(torch.device("cpu"), world.size, case.together)
        shard_policy(policy, mesh, make_filler(policy, case.family), offload=case.offload)
    policy.freeze_reference()
    config = TrainConfig(
        beta=case.beta, num_generations=G, max_packed_tokens=case.packed, num_iterations=case.num_iterations
    )
    run = SimpleNamespace(config=config, policy=policy, world=world, algorithm=make_algorithm(config))
    updater = Updater(
        policy.model,
        world,
        learning_rate=1e-3,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        max_grad_norm=1.0,
        schedule="constant",
        warmup_steps=0,
        total_steps=10,
        min_lr_ratio=0.1,
        offload=case.offload,
    )
    # AdamW divides a gradient by its size, so where one is nearly zero its rounding alone would decide the update.
    updater._optimizer.param_groups[0]["eps"] = 1e-3
    return run, updater


def update(
    run: SimpleNamespace, updater: Updater, case: Case, split: Split
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """One step: the loss, the norm of the gradient and the gradient."""
    world, groups = run.world, make_groups(case.family, case.long_questions)
    shares = split if world.size > 1 else [sorted(sum(map(tuple, split), ()))]
    mine = [groups[k] for k in shares[world.rank]]
    loss = supervised(run, mine) if case.supervised else update_loss(run, mine, None)["loss"]
    gradients = {
        name: torch.zeros(p.shape) if p.grad is None else whole(p.grad).clone()
        for name, p in run.policy.model.named_parameters()
        if p.requires_grad
    }
    return float(loss), float(updater.step()), gradients


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in policy.model.named_parameters()}


def train(world: World, case: Case) -> Outcome:
    """Some updates of a policy, and what is drawn from it then."""
    run, updater = begin(world, case)
    policy, prompts = run.policy, make_groups(case.family, case.long_questions)[: 2 + world.rank]
    drawn_at_start = sample(policy, prompts)
    with updater:
        losses, norms, gradients = zip(*(update(run, updater, case, split) for split in case.splits))
        updated = [*updater._updated, *(state["exp_avg"] for state in updater._optimizer.state.values())]
    if case.supervised:
        losses = world.sum(*losses)
    with policy.reference_weights():
        drawn_by_reference = sample(policy, prompts)
    parameters = list(policy.model.parameters())
    return Outcome(
        losses=list(losses),
        norms=list(norms),
        gradients=list(gradients),
        weights=weights_of(policy),
        sampled=sample(policy, prompts),
        drawn_at_start=drawn_at_start,
        drawn_by_reference=drawn_by_reference,
        drawn_plainly=sample(policy, prompts, PlainSampler),
        kept=sum(own_part(p).numel() for p in parameters) / sum(p.numel() for p in parameters),
        dtypes={tensor.dtype for tensor in updated},
    )


def go_on(world: World, case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after one step from a checkpoint."""
    run, updater = begin(world, case)
    load_weights(run.policy.model, folder)
    with updater:
        updater.load_state_dict(load_state(folder), folder)
        update(run, updater, case, SPLITS[0])
    return weights_of(run.policy)


def save_and_go_on(world: World, case: Case, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The weights at a checkpoint, a step later, and a step after resuming from it."""
    run, updater = begin(world, case)
    store = CheckpointStore(folder, {}, read_only=not world.is_main, asynchronous=case.asynchronous)
    with updater:
        for split in SPLITS[:2]:
            update(run, updater, case, split)
        saved = weights_of(run.policy)
        state = {"stage": "rl", "step": 2} | updater.state_dict()
        store.save("two", run.policy.model, testing.TOKENIZER, state, last=True)
        update(run, updater, case, SPLITS[0])
        store.wait()
        world.barrier()
    return [saved, weights_of(run.policy), go_on(world, case, folder / "two")]


def hand_over(world: World, case: Case) -> tuple[bool, float, int]:
    """Whether a server of this process has the policy's weights after updates, and how well their tokens agree.

    Returns:
        Whether each weight is the same to the bit, the largest difference of log-probabilities, and how many versions
        were handed over.
    """
    torch.set_num_threads(1)
    start = make_policy(replace(case, trains="all"))  # what the server is started with, which has no adapters
    groups = make_groups(case.family, case.long_questions)[: 2 + world.rank]
    prompts = [group.prompt for group in groups]
    run, updater = begin(world, case)
    policy = run.policy
    with serving(start, [group.prompt for group in make_groups(case.family, case.long_questions)]) as server:
        sampler = VllmSampler(policy, urls=world.gather(server.url))
        with updater:
            for split in SPLITS[:2]:
                with policy.gathered():
                    sampler.sync_weights(policy)
                    sampler.sample(prompts, G, SamplingParams(5, seed=1))
                update(run, updater, case, split)
        with torch.no_grad(), policy.gathered():
            sampler.sync_weights(policy)
            rollout = sampler.sample(prompts, G, SamplingParams(5, seed=2))
            expected = dict(merged_weights(policy.model))
            given = dict(server.engine.policy.model.named_parameters())
            same = expected.keys() == given.keys()
            same = same and all(torch.equal(given[name], weight) for name, weight in expected.items())
        version = sampler.version
        sampler.close()
    world.barrier()
    assert rollout.sampling_ratio is not None
    return same, float(rollout.sampling_ratio[rollout.mask].log().abs().max()), version


def supervised(run, groups: Sequence[Group]) -> float:
    """One supervised step on the first response of each group; this process's part of the loss."""
    answers = [list(group.token_ids[0]) for group in groups]
    (tokens,) = run.world.sum(sum(map(len, answers)))
    return accumulate(run, [group.prompt for group in groups], answers, run.world.size / tokens) / tokens


def sample(
    policy: Policy, groups: Sequence[Group], sampler: Callable[[Policy], Sampler] = SharedPrefixSampler
) -> list[list[int]]:
    """What is drawn for some prompts, of which the processes have different numbers: none may wait for another."""
    waits = patch.object(
        torch.distributed, "all_reduce", side_effect=AssertionError("a process waits for others")
    )
    with torch.no_grad(), policy.gathered(), waits:
        params = SamplingParams(max_new_tokens=5, seed=3)
        rollout = sampler(policy).sample([group.prompt for group in groups], G, params)
    return rollout.token_ids.tolist()


def work_of_two(
    world: World, argument: tuple[Sequence[Case], Sequence[tuple[Case, Path]]]
) -> tuple[list, list]:
    """What rank 0 has after some trainings and some resumptions."""
    torch.set_num_threads(1)
    trained, resumed = argument
    outcomes = [train(world, case) for case in trained]
    return outcomes, [save_and_go_on(world, case, folder) for case, folder in resumed]
