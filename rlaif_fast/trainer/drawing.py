"""How the responses of a step are drawn: what is asked, with which weights, now or since the previous step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from rlaif_fast.algorithms.base import Algorithm
from rlaif_fast.distributed.world import World
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.prompts.batches import EpochOrder, take_turns
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout import Rollout, SamplingParams
from rlaif_fast.trainer.ahead import RolloutAhead
from rlaif_fast.trainer.options import RlOptions, TrainConfig
from rlaif_fast.trainer.run import Run


def roll_out(
    run: Run, order: EpochOrder, step: int, attempt: int
) -> tuple[Sequence[Prompt], Rollout | None, MediaFeatures | None]:
    """The prompts of a step, their responses, and what `draw` returns of the tower; no rollout if nothing is asked."""
    if run.ahead is not None:
        return rolled_out_ahead(run, run.ahead, step)
    prompts, params = asked(run, order, step, attempt)
    if not prompts:
        return prompts, None, None
    with run.logger.timer("rollout"):
        return prompts, *draw(run, prompts, params)


def rolled_out_ahead(
    run: Run, ahead: RolloutAhead, step: int
) -> tuple[Sequence[Prompt], Rollout | None, MediaFeatures | None]:
    """What servers drew since the previous step; they continue with the next step's."""
    with run.logger.timer("rollout"):
        begun, rollout, features = ahead.begin(step), None, None
        if begun is not None:
            features = encode(run, begun.prompts)
            rollout = ahead.finish(begun, None if features is None else features.detach())
        ahead.begin(step + 1)
    return () if begun is None else begun.prompts, rollout, features


def asked(run: Run, order: EpochOrder, step: int, attempt: int = 0) -> tuple[list[Prompt], SamplingParams]:
    """What this process asks in a step, and how it is answered."""
    config, world = run.config, run.world
    # Extra rounds take prompts after those of the last step, so that no step depends on how others went.
    extra = config.max_steps + step * config.dynamic_sampling_rounds + attempt - 1
    rows = [
        row
        for visit, clip in world.share(order.visits(step if attempt == 0 else extra))
        for row in take_turns(clip, config.questions_per_video, visit)
    ]
    with run.logger.timer("decode"):
        prompts = run.make_batch(rows)
        run.make_batch.prefetch([row for clip in world.share(order.step(step + 1)) for row in clip])
    return prompts, sampling_params(config, draw_seed(config, world, step, attempt))


def draw_seed(config: TrainConfig, world: World, step: int, attempt: int) -> int:
    """The seed of one process's draws; no other round, step or process of the run has it."""
    rounds = max(16, config.rounds)
    return ((config.seed * 1_000_003 + step) * rounds + attempt) * world.size + world.rank


def sampling_params(config: TrainConfig, seed: int) -> SamplingParams:
    """How a run draws responses."""
    return SamplingParams(
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_reasoning_tokens=config.max_reasoning_tokens,
        seed=seed,
    )


def weights_to_draw_with(run: Run) -> AbstractContextManager[None]:
    """The whole model with the weights that the algorithm draws with; all processes enter together."""
    policy = run.policy
    return policy.reference_weights() if run.algorithm.samples_from == "start" else policy.gathered()


def draw(run: Run, prompts: Sequence[Prompt], params: SamplingParams) -> tuple[Rollout, MediaFeatures | None]:
    """Draw the responses to some prompts; call it inside `weights_to_draw_with`.

    Returns:
        The rollout; and the vision tower's features for it, if its weights are the policy's.
    """
    features = encode(run, prompts)
    shared = None if features is None else features.detach()
    with torch.no_grad():
        run.sampler.sync_weights(run.policy)
        rollout = run.sampler.sample(prompts, run.config.num_generations, params, shared)
    return rollout, None if run.algorithm.samples_from == "start" else features


def encode(run: Run, prompts: Sequence[Prompt]) -> MediaFeatures | None:
    """The vision tower's features for the prompts; without a graph if the update runs the tower again."""
    with torch.set_grad_enabled(keeps_graph(run)):
        return run.policy.encode_media(prompts)


def on_policy(config: RlOptions, algorithm: Algorithm) -> bool:
    """Whether the weights that drew a rollout also learn from it: once, whole, and not drawn by the start."""
    once = config.num_iterations == 1 and config.steps_per_generation == 1
    return once and algorithm.samples_from != "start"


def keeps_graph(run: Run) -> bool:
    """Whether the update uses the tower's pass from before the rollout."""
    return keeps_tower_graph(run.config, run.algorithm, sharded=run.policy.shards is not None)


def keeps_tower_graph(config: RlOptions, algorithm: Algorithm, *, sharded: bool) -> bool:
    """Whether one pass of the vision tower serves rollout and update.

    This needs the weights that draw to be those that train; and sharded weights share no pass during a rollout.
    """
    return on_policy(config, algorithm) and not sharded
