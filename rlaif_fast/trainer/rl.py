"""Reinforcement learning from an oracle's rankings: sample, rank, turn ranks into advantages, update."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from rlaif_fast import fused_linear_grpo_rank_loss
from rlaif_fast.errors import RlaifFastError
from rlaif_fast.policy.forward_rows import for_policy, response_hidden
from rlaif_fast.rollout import SamplingParams, SharedPrefixSampler
from rlaif_fast.trainer.batches import EpochOrder, by_media
from rlaif_fast.trainer.checkpoint import load_state
from rlaif_fast.trainer.groups import (
    RankedRollout,
    concat,
    rank_rollout,
    rollout_rows,
)
from rlaif_fast.trainer.rollout_log import log_rollouts
from rlaif_fast.trainer.run import Run, make_optimizer, trainable


@dataclass
class Progress:
    """Where the stage stands; part of every checkpoint."""

    step: int = 0
    best_accuracy: float = -1.0
    evals_without_gain: int = 0


def train_rl(run: Run, *, resume_from: Path | None = None) -> Progress:
    """Run the RL stage from its beginning, or from a checkpoint of this stage; the best checkpoint is kept."""
    config, policy, logger, world = run.config, run.policy, run.logger, run.world
    clips = by_media(run.data.rl)
    order = EpochOrder(clips, config.videos_per_step, config.seed + 1)
    parameters = trainable(policy.model)
    updates_per_rollout = config.num_iterations * config.steps_per_generation
    optimizer, scheduler = make_optimizer(
        parameters,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        schedule=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps * updates_per_rollout,
        total_steps=config.max_steps * updates_per_rollout,
        min_lr_ratio=config.min_lr_ratio,
    )
    progress = Progress()
    if resume_from is not None:
        state = load_state(resume_from)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        progress = Progress(**state["progress"])

    def save(name: str, **roles: bool) -> None:
        state = {
            "stage": "rl",
            "step": progress.step,
            "progress": vars(progress).copy(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "seconds": logger.seconds(),
        }
        with logger.timer("checkpoint"):
            run.store.save(name, policy.model, policy.tokenizer, state, **roles)

    if resume_from is None:
        # The start is a candidate for the best checkpoint, so what is kept never scores below it on validation.
        progress.best_accuracy = run.evaluate(
            run.data.validation, phase="rl", split="validation", step=0
        ).accuracy
        run.store.mark(best=run.store.path("sft").name)

    with logger.stage("rl", total=config.max_steps, start=progress.step):
        while progress.step < config.max_steps:
            ranked, stats = sample_and_rank(run, order, progress.step)
            for _ in range(config.num_iterations):
                for part in minibatches(ranked, config.steps_per_generation):
                    with logger.timer("update"):
                        loss_stats = update_loss(run, part)
                        if loss_stats is None:
                            continue
                        world.average_gradients(parameters)
                        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad(set_to_none=True)
                        stats |= loss_stats | {"grad_norm": grad_norm}
            progress.step += 1
            logger.log("rl", progress.step, **stats, learning_rate=scheduler.get_last_lr()[0])

            if progress.step % config.eval_steps == 0 or progress.step == config.max_steps:
                accuracy = run.evaluate(
                    run.data.validation, phase="rl", split="validation", step=progress.step
                ).accuracy
                improved = accuracy > progress.best_accuracy
                progress.evals_without_gain = 0 if improved else progress.evals_without_gain + 1
                progress.best_accuracy = max(accuracy, progress.best_accuracy)
                save(f"rl-{progress.step:06d}", last=True, best=improved)
                if 0 < config.early_stopping_patience <= progress.evals_without_gain:
                    logger.message(
                        f"no better validation accuracy in {progress.evals_without_gain} evaluations: stopping early"
                    )
                    break
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
        rows = [row for clip in world.share(order.step(at)) for row in clip[: config.questions_per_video]]
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
            features = run.policy.encode_media(batch.prompts)
            shared = {}
            if features is not None and isinstance(run.sampler, SharedPrefixSampler):
                shared = {"features": features.detach()}
            with torch.no_grad():
                rollout = run.sampler.sample(batch.prompts, config.num_generations, params, **shared)
        with logger.timer("oracle"):
            ranked = rank_rollout(batch, rollout, run.oracle, config)
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
    shards = [
        (weight, {name: float(value) for name, value in shard.items()})
        for weight, shard in world.gather((tokens, stats))
        if shard
    ]
    return {
        name: _over_processes(name, [(weight, shard[name]) for weight, shard in shards], world.size)
        for name in shards[0][1]
    }


def _over_processes(name: str, shards: list[tuple[int, float]], size: int) -> float:
    """One statistic of the whole step from those of the processes, each with its number of tokens."""
    values = [value for _, value in shards]
    if name == "tokens":
        return sum(values)
    if name == "ratio_max":
        return max(values)
    if name.startswith("loss"):
        return sum(values) / size
    return sum(weight * value for weight, value in shards) / max(sum(weight for weight, _ in shards), 1)


def _accumulate(run: Run, ranked: RankedRollout, items: float) -> dict:
    """Accumulate the gradient of the loss of `ranked`, divided by `items`, and return the loss's statistics."""
    config, policy, rollout = run.config, run.policy, ranked.rollout
    rows = for_policy(rollout_rows(rollout), policy)
    device = policy.device
    row_lengths = rollout.mask.sum(1).to(device)
    targets = rows.target_ids.to(device)
    on_policy = config.num_iterations == 1 and config.steps_per_generation == 1
    # Nothing was updated since the rollout: its pass through the vision tower serves the update too.
    features = ranked.features if on_policy else None
    if features is None:
        features = policy.encode_media(rows.prompts)

    ref_logps: Tensor | None = None
    if config.beta > 0:
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
    output = fused_linear_grpo_rank_loss(
        response_hidden(policy, rows, features=features),
        policy.head_weight,
        targets,
        advantages=ranked.advantages.flatten().to(device),
        bias=policy.head_bias,
        lengths=row_lengths,
        mask=None if bool(keep.all()) else token_mask,
        old_logps=None if on_policy else rollout.logps[rollout.mask],
        ref_logps=ref_logps,
        temperature=config.temperature,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        delta=config.delta,
        beta=config.beta,
        kl=config.kl,
        entropy_coef=config.entropy_coef,
        loss_type=config.loss_type,
        max_completion_length=config.max_completion_length,
        num_items_in_batch=items,
        importance_sampling_level=config.importance_sampling_level,
        backend=config.backend,
    )
    if not torch.isfinite(output.loss):
        raise RlaifFastError(
            "the loss is not finite; lower learning_rate, or set dtype float32, and resume from the last checkpoint"
        )
    output.loss.backward()
    names = ("loss/policy", "loss/kl", "kl", "entropy", "clip_low", "clip_high", "ratio_max", "tokens")
    return {"loss": output.loss.detach()} | {
        name: output.stats[name] for name in names if name in output.stats
    }
