"""Reinforcement learning from an oracle's rankings: sample, rank, turn ranks into advantages, update."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.forward_rows import for_policy, response_hidden
from rlaif_fast.prompts.batches import EpochOrder, by_media, cut_by_tokens, take_turns
from rlaif_fast.rollout import SamplingParams
from rlaif_fast.runs.checkpoint import load_state
from rlaif_fast.trainer.groups import (
    RankedRollout,
    concat,
    rank_rollout,
    rollout_rows,
)
from rlaif_fast.trainer.optimizer import Updater, combine_stats
from rlaif_fast.trainer.options import RlOptions
from rlaif_fast.trainer.rollout_log import log_rollouts
from rlaif_fast.trainer.run import Run


@dataclass
class Progress:
    """Where the stage stands; part of every checkpoint."""

    step: int = 0
    best_accuracy: float = -1.0
    evals_without_gain: int = 0

    def is_over(self, patience: int) -> bool:
        """Whether as many evaluations in a row brought no better accuracy; 0 never ends the stage."""
        return 0 < patience <= self.evals_without_gain


def train_rl(run: Run, *, resume_from: Path | None = None) -> Progress:
    """Run the RL stage from its beginning, or from a checkpoint of this stage; the best checkpoint is kept."""
    config, policy, logger, world = run.config, run.policy, run.logger, run.world
    clips = by_media(run.data.rl)
    order = EpochOrder(clips, config.videos_per_step, config.seed + 1)
    updates_per_rollout = config.num_iterations * config.steps_per_generation
    updater = Updater(
        policy.model,
        world,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        max_grad_norm=config.max_grad_norm,
        schedule=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps * updates_per_rollout,
        total_steps=config.max_steps * updates_per_rollout,
        min_lr_ratio=config.min_lr_ratio,
    )
    progress = Progress()
    if resume_from is not None:
        state = load_state(resume_from)
        updater.load_state_dict(state)
        progress = Progress(**state["progress"])

    def save(name: str, **roles: bool) -> None:
        state = {
            "stage": "rl",
            "step": progress.step,
            "progress": vars(progress).copy(),
            "seconds": logger.seconds(),
        } | updater.state_dict()
        with logger.timer("checkpoint"):
            run.store.save(name, policy.model, policy.tokenizer, state, **roles)

    if resume_from is None:
        # The start is a candidate for the best checkpoint, so what is kept never scores below it on validation.
        progress.best_accuracy = run.evaluate(
            run.data.validation, phase="rl", split="validation", step=0
        ).accuracy
        run.store.mark(best=run.store.path("sft").name)

    with updater, logger.stage("rl", total=config.max_steps, start=progress.step):
        while progress.step < config.max_steps and not progress.is_over(config.early_stopping_patience):
            ranked, stats = sample_and_rank(run, order, progress.step)
            for _ in range(config.num_iterations):
                for part in minibatches(ranked, config.steps_per_generation):
                    with logger.timer("update"):
                        loss_stats = update_loss(run, part)
                        if loss_stats is not None:
                            stats |= loss_stats | {"grad_norm": updater.step()}
            progress.step += 1
            logger.log("rl", progress.step, **stats, learning_rate=updater.learning_rate)

            if progress.step % config.eval_steps == 0 or progress.step == config.max_steps:
                accuracy = run.evaluate(
                    run.data.validation, phase="rl", split="validation", step=progress.step
                ).accuracy
                improved = accuracy > progress.best_accuracy
                progress.evals_without_gain = 0 if improved else progress.evals_without_gain + 1
                progress.best_accuracy = max(accuracy, progress.best_accuracy)
                save(f"rl-{progress.step:06d}", last=True, best=improved)
    if progress.is_over(config.early_stopping_patience):
        logger.message(
            f"no better validation accuracy in {progress.evals_without_gain} evaluations: stopped early"
        )
    return progress


def sample_and_rank(run: Run, order: EpochOrder, step: int) -> tuple[RankedRollout | None, dict]:
    """Roll out one step's prompts and have them ranked; with `dynamic_sampling`, replace groups without signal.

    Returns:
        This process's groups to learn from (None where there are none), and statistics over everything that was
        sampled, by all processes; the statistics are rank 0's alone.
    """
    config, logger, world = run.config, run.logger, run.world
    rounds = 1 + (config.dynamic_sampling_rounds if config.dynamic_sampling else 0)
    sampled: list[RankedRollout] = []
    wanted = None
    for attempt in range(rounds):
        # Extra rounds draw from behind the last step's prompts, so that no step depends on how others went.
        at = step if attempt == 0 else config.max_steps + step * (rounds - 1) + attempt - 1
        rows = [
            row
            for visit, clip in world.share(order.visits(at))
            for row in take_turns(clip, config.questions_per_video, visit)
        ]
        with logger.timer("decode"):
            batch = run.make_batch(rows)
            run.make_batch.prefetch([row for clip in world.share(order.step(step + 1)) for row in clip])
        if not len(batch):
            continue
        params = SamplingParams(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=((config.seed * 1_000_003 + step) * 16 + attempt) * world.size + world.rank,
        )
        with logger.timer("rollout"):
            with torch.set_grad_enabled(on_policy(config)):  # else the update runs the tower again
                features = run.policy.encode_media(batch.prompts)
            shared = None if features is None else features.detach()
            with torch.no_grad():
                run.sampler.sync_weights(run.policy)
                rollout = run.sampler.sample(batch.prompts, config.num_generations, params, shared)
        with logger.timer("oracle"):
            ranked = rank_rollout(batch, rollout, run.oracle, run.algorithm)
        sampled.append(replace(ranked, features=features))
        wanted = wanted or len(batch)
        if sum(int(part.has_signal.sum()) for part in sampled) >= wanted:
            break
    everything = concat(sampled) if sampled else None
    stats = log_rollouts(run, everything, step)
    if everything is None:
        return None, stats
    valid = everything.valid
    if config.dynamic_sampling:
        valid &= everything.has_signal
    groups = torch.nonzero(valid).flatten().tolist()[:wanted]
    return (everything.select(groups) if groups else None), stats


def minibatches(ranked: RankedRollout | None, parts: int) -> list[RankedRollout | None]:
    """The rollout cut into `parts` by groups, as evenly as it goes; None for an empty part."""
    if parts == 1 or ranked is None:
        return [ranked] * parts
    bounds = [len(ranked.batch) * i // parts for i in range(parts + 1)]
    return [ranked.select(range(low, high)) if high > low else None for low, high in pairwise(bounds)]


def update_loss(run: Run, ranked: RankedRollout | None) -> dict | None:
    """Accumulate this process's part of the gradient and return the whole loss's statistics.

    None where no process has a group.
    """
    config, world = run.config, run.world
    tokens, responses = 0, 0
    if ranked is not None:
        counted = ranked.rollout.mask
        if config.mask_truncated_completions:
            counted = counted[ranked.rollout.finished]
        tokens, responses = int(counted.sum()), len(counted)
    groups, all_tokens, all_responses = world.sum(
        0 if ranked is None else len(ranked.batch), tokens, responses
    )
    if groups == 0:
        return None
    # The gradients are averaged over the processes, so each divides by its part of the whole.
    items = max(all_tokens if config.loss_type == "dapo" else all_responses, 1.0) / world.size
    stats = {} if ranked is None else _accumulate(run, ranked, items)
    if world.size == 1:
        return stats
    mine = {
        name: float(value) / (world.size if name.startswith("loss") else 1) for name, value in stats.items()
    }
    return combine_stats([(weight, shard) for weight, shard in world.gather((tokens, mine)) if shard])


def _accumulate(run: Run, ranked: RankedRollout, items: float) -> dict:
    """Accumulate the gradient of the loss of `ranked`, divided by `items`, and return the loss's statistics.

    At most `max_packed_tokens` go through the model at once, forward and backward; the vision tower runs once all
    the same, forward and backward.
    """
    config, policy = run.config, run.policy
    features = ranked.features
    if features is None or (policy.vision.trains and not on_policy(config)):
        features = policy.encode_media(ranked.batch.prompts)
    leaves = features.leaves() if features is not None and features.requires_grad else None
    groups = ranked.rollout.mask.sum(1).view(-1, config.num_generations).sum(1).tolist()
    parts = []
    for span in cut_by_tokens(ranked.batch.prompts, groups, config.max_packed_tokens):
        part = ranked if len(span) == len(ranked.batch) else ranked.select(span)
        parts.append((sum(groups[i] for i in span), _backward(run, part, leaves or features, items)))
    if leaves is not None:
        assert features is not None
        features.backward_from(leaves)
    if len(parts) == 1:
        return parts[0][1]
    return combine_stats([(weight, {n: float(v) for n, v in stats.items()}) for weight, stats in parts])


def _backward(run: Run, ranked: RankedRollout, features: MediaFeatures | None, items: float) -> dict:
    """One forward and backward pass; the statistics stay on the device."""
    config, policy, rollout = run.config, run.policy, ranked.rollout
    rows = for_policy(rollout_rows(rollout), policy)
    device = policy.device
    row_lengths = rollout.mask.sum(1).to(device)
    ref_logps: Tensor | None = None
    if "reference" in run.algorithm.extra_models:
        with torch.no_grad():
            ref_logps = policy.reference_logps(
                rows.prompts,
                rows.token_ids,
                rows.lengths,
                group_sizes=rows.group_sizes,
                temperature=config.temperature,
                features=features,
            )[rows.token_index.to(device)]
    keep = torch.ones(len(row_lengths), dtype=torch.bool)
    if config.mask_truncated_completions:
        keep = rollout.finished.cpu()
    token_mask = torch.repeat_interleave(keep.to(device), row_lengths)
    output = run.algorithm.loss(
        response_hidden(policy, rows, features=features),
        policy.head_weight,
        rows.target_ids.to(device),
        advantages=ranked.advantages.flatten().to(device),
        bias=policy.head_bias,
        lengths=row_lengths,
        mask=None if bool(keep.all()) else token_mask,
        old_logps=None if on_policy(config) else rollout.logps[rollout.mask],
        ref_logps=ref_logps,
        sampling_ratio=None if rollout.sampling_ratio is None else rollout.sampling_ratio[rollout.mask],
        num_items_in_batch=items,
    )
    output.loss.backward()
    names = ("loss/policy", "loss/kl", "kl", "entropy", "clip_low", "clip_high", "ratio_max", "tokens")
    return {"loss": output.loss.detach()} | {
        name: output.stats[name] for name in names if name in output.stats
    }


def on_policy(config: RlOptions) -> bool:
    """Whether each rollout is learned from once and whole, so that nothing is updated before it is used up."""
    return config.num_iterations == 1 and config.steps_per_generation == 1
