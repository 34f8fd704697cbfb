"""Reinforcement learning from an oracle's rankings: sample, rank, turn ranks into advantages, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlaif_fast.algorithms.group import Group, minibatches, rank_rollout, to_learn_from, verdicts_on
from rlaif_fast.distributed.world import World
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.forward_rows import ForwardRows, for_policy, response_hidden, response_rows
from rlaif_fast.prompts.batches import EpochOrder, by_media
from rlaif_fast.runs.checkpoint import load_state
from rlaif_fast.termination import Terminated
from rlaif_fast.trainer.ahead import RolloutAhead
from rlaif_fast.trainer.drawing import asked, keeps_graph, on_policy, roll_out, weights_to_draw_with
from rlaif_fast.trainer.optimizer import Updater, combine_stats, mean_of_updates
from rlaif_fast.trainer.options import RlOptions
from rlaif_fast.trainer.passes import backward_in_parts
from rlaif_fast.trainer.rollout_log import log_rollouts
from rlaif_fast.trainer.run import Run
from rlaif_fast.trainer.seeds import seed_step
from rlaif_fast.trainer.stage_checkpoints import StageCheckpoints

# The statistics of a loss that are logged, if it has them.
LOGGED = (
    *("loss/policy", "loss/kl", "kl", "entropy", "clip_low", "clip_high", "ratio_max", "tokens"),
    *("pairs", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"),
)


@dataclass
class Progress:
    """The state of the stage; part of every checkpoint."""

    step: int = 0
    best_score: float = -math.inf
    evals_without_gain: int = 0
    evaluation_due: bool = False  # the run ended during one

    def is_over(self, patience: int) -> bool:
        """Whether the last `patience` evaluations brought no better score; 0 never ends the stage."""
        return 0 < patience <= self.evals_without_gain

    def note(self, score: float, *, improved: bool, counts: bool) -> None:
        """Record an evaluation; one without `counts` resets the count towards early stopping."""
        self.evals_without_gain = 0 if improved or not counts else self.evals_without_gain + 1
        self.best_score = max(score, self.best_score)
        self.evaluation_due = False


def train_rl(run: Run, *, resume_from: Path | None = None) -> Progress:
    """Run the RL stage from its beginning, or from a checkpoint of this stage; the best checkpoint is kept."""
    config, policy, logger, world = run.config, run.policy, run.logger, run.world
    clips = by_media(run.data.rl)
    order = EpochOrder(clips, config.videos_per_step, config.seed + 1)
    updaters: list[Updater] = []

    def make(model: nn.Module, *args: Any, **options: Any) -> Updater:
        updaters.append(make_updater(config, world, model, *args, **options))
        return updaters[-1]

    run.critic = critic = run.algorithm.make_critic(policy, world, make)
    begin = 0 if critic is None else critic.first_policy_step
    updater = make(policy.model, begin=begin)
    progress, start_answers, drawn = Progress(), None, None
    if resume_from is not None:
        state = load_state(resume_from)
        updater.load_state_dict(state, resume_from)
        if critic is not None:
            critic.load_state_dict(state["critic"])
        progress, start_answers = Progress(**state["progress"]), state["start_answers"]
        drawn = state.get("drawn")
    if config.rollout_lag:
        ask = partial(asked, run, order)
        run.ahead = RolloutAhead(run.sampler, policy, config.num_generations, ask, config.max_steps, drawn)

    def stage_state(alone: bool) -> dict:
        state = {"progress": vars(progress).copy(), "start_answers": start_answers} | updater.state_dict()
        if critic is not None:
            state["critic"] = critic.state_dict()
        if run.ahead is not None:
            state["drawn"] = run.ahead.drawn(progress.step, world, alone=alone, note=logger.message)
        return state

    def changes() -> int:
        return sum(one.changes for one in updaters)

    if resume_from is None:
        # The start is a candidate for the best checkpoint, so what is kept never scores below it on validation.
        start = run.evaluate(run.data.validation, phase="rl", split="validation", step=0)
        if run.data.metric == "oracle":
            start_answers, progress.best_score = start.texts, 0.5  # the start ties with itself
        else:
            progress.best_score = run.score(start)
        run.store.mark(best=run.store.path("sft").name)

    def evaluate() -> None:
        """Evaluate and save the result, so that a run resumed after it does not evaluate again."""
        result = run.evaluate(
            run.data.validation,
            phase="rl",
            split="validation",
            step=progress.step,
            opponents=start_answers,
        )
        score = run.score(result)
        improved = score > progress.best_score or run.data.metric == "none"
        progress.note(score, improved=improved, counts=progress.step > begin)
        checkpoints.save(best=improved)

    checkpoints = StageCheckpoints(run, "rl", progress.step, stage_state, changes)
    stage = logger.stage("rl", total=config.max_steps, start=progress.step)
    with updater, run.termination.saving(checkpoints.may_give_up), stage, checkpoints.kept():
        if progress.evaluation_due:
            evaluate()
        while progress.step < config.max_steps and not progress.is_over(config.early_stopping_patience):
            seed_step(config, world, "rl", progress.step)
            stats = train_step(run, order, updater, progress.step)
            progress.step += 1
            logger.log("rl", progress.step, **stats, learning_rate=updater.learning_rate)
            checkpoints.finished(progress.step)

            if progress.step % config.eval_steps == 0 or progress.step == config.max_steps:
                progress.evaluation_due = True
                evaluate()
            if progress.step < config.max_steps and run.asked_to_end():
                raise Terminated(run.termination.heard)
    if progress.is_over(config.early_stopping_patience):
        logger.message(
            f"no better validation {run.data.metric} in {progress.evals_without_gain} evaluations: stopped early"
        )
    return progress


def make_updater(
    config: RlOptions,
    world: World,
    model: nn.Module,
    learning_rate: float | None = None,
    *,
    begin: int = 0,
    end: int | None = None,
    updates: int | None = None,
) -> Updater:
    """The optimizer of a model that learns from the rollouts `begin` to `end`; see `MakeUpdater`."""
    updates = config.num_iterations * config.steps_per_generation if updates is None else updates
    rollouts = (config.max_steps if end is None else end) - begin
    return Updater(
        model,
        world,
        learning_rate=config.learning_rate if learning_rate is None else learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        max_grad_norm=config.max_grad_norm,
        schedule=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps * updates,
        total_steps=rollouts * updates,
        min_lr_ratio=config.min_lr_ratio,
        offload=config.optimizer_offload,
    )


def train_step(run: Run, order: EpochOrder, updater: Updater, step: int) -> dict:
    """One rollout with its updates; returns what is logged of it.

    Raises:
        Outage: The step could not be drawn and ranked in every process; the policy is unchanged.
    """
    config, logger, critic = run.config, run.logger, run.critic
    with weights_to_draw_with(run):
        sampled, groups, features = run.world.together(lambda: sample_and_rank(run, order, step))
    stats: dict = {}
    if critic is not None:
        with logger.timer("critic"):
            groups, stats = critic.appraise(groups, step)
    updates: list[dict] = []
    critic_updates: list[dict] = []
    for _ in range(config.num_iterations):
        for part in minibatches(groups, config.steps_per_generation):
            with logger.timer("update"):
                update_stats = update_loss(run, part, features)
                if update_stats is not None:
                    updates.append(update_stats | {"grad_norm": updater.step()})
                elif critic is None or step >= critic.first_policy_step:
                    updater.skip()
            if critic is not None:
                with logger.timer("critic"):
                    critic_updates.append(critic.update(part))
    stats |= mean_of_updates(updates) | mean_of_updates([one for one in critic_updates if one])
    # After the update: logging reads values on the host, and nothing before this point has to wait for the device.
    return log_rollouts(run, sampled, step) | stats


def sample_and_rank(
    run: Run, order: EpochOrder, step: int
) -> tuple[list[Group], list[Group], MediaFeatures | None]:
    """Roll out one step's prompts and have them ranked; with `dynamic_sampling`, replace groups without signal.

    Returns:
        This process's groups; those to learn from; and the vision tower's features from before the rollout, with their
        graph if the rollout is learned from once and whole.
    """
    config, logger = run.config, run.logger
    sampled: list[Group] = []
    towers: list[MediaFeatures] = []
    wanted = None
    for attempt in range(config.rounds):
        prompts, rollout, features = roll_out(run, order, step, attempt)
        if rollout is None:
            continue
        with logger.timer("oracle"):
            judge = run.oracle if run.critic is None else run.critic.judge(run.oracle, prompts, rollout, step)
            sampled += rank_rollout(prompts, rollout, judge, run.algorithm)
        towers += [] if features is None else [features]
        wanted = wanted or len(prompts)
        if sum(group.has_signal for group in sampled) >= wanted:
            break
    learnable = [g for g in sampled if g.ranking.valid and (g.has_signal or not config.dynamic_sampling)]
    features = towers[0] if len(towers) == 1 else MediaFeatures.concat(towers) if towers else None
    return sampled, to_learn_from(learnable[:wanted], run.algorithm), features


def update_loss(run: Run, groups: Sequence[Group], features: MediaFeatures | None) -> dict | None:
    """Accumulate this process's part of the gradient and return the whole loss's statistics.

    None if no process has a group.
    """
    config, world = run.config, run.world
    mask = counted_tokens(config, groups)
    tokens = sum(group.tokens for group in groups) if mask is None else int(mask.sum())
    responses = sum(
        finished or not config.mask_truncated_completions for group in groups for finished in group.finished
    )
    all_groups, all_tokens, all_responses = world.sum(len(groups), tokens, responses)
    if all_groups == 0:
        return None
    # The gradients are averaged over the processes, so each divides by its part of the whole.
    items = max(all_tokens if config.loss_type == "dapo" else all_responses, 1.0) / world.size
    stats = _accumulate(run, groups, features, items)
    if world.size == 1:
        return stats
    values = torch.stack([torch.as_tensor(value) for value in stats.values()]).tolist() if stats else []
    mine = {
        name: value / (world.size if name.startswith("loss") else 1) for name, value in zip(stats, values)
    }
    return combine_stats([(weight, shard) for weight, shard in world.gather((tokens, mine)) if shard])


def counted_tokens(config: RlOptions, groups: Sequence[Group]) -> Tensor | None:
    """(M,) bool, the tokens that the loss counts: not forced ones, nor, if truncated responses are masked, theirs.

    None if it counts all.
    """
    mask: Tensor | None = None
    finished = [done for group in groups for done in group.finished]
    if config.mask_truncated_completions and not all(finished):
        lengths = torch.tensor([len(tokens) for group in groups for tokens in group.token_ids])
        mask = torch.repeat_interleave(torch.tensor(finished), lengths).to(groups[0].logps.device)
    forced = [group.forced for group in groups if group.forced is not None]
    if forced:
        mask = ~torch.cat(forced) if mask is None else mask & ~torch.cat(forced)
    return mask


def _accumulate(run: Run, groups: Sequence[Group], features: MediaFeatures | None, items: float) -> dict:
    """Accumulate the gradient of the loss of the groups, divided by `items`, and return the loss's statistics."""
    prompts, tokens = [group.prompt for group in groups], [group.tokens for group in groups]
    if features is not None and run.policy.vision.trains and not keeps_graph(run):
        features = None
    known: list[Tensor] | None = None
    if run.policy.shards is not None and "reference" in run.algorithm.extra_models:
        known = gathered_reference(run, groups, features)

    def loss_of(part: slice, features: MediaFeatures | None) -> tuple[Tensor, tuple[int, dict]]:
        ref_logps = None if known is None else torch.cat(known[part])
        loss, stats = _loss(run, groups[part], features, items, ref_logps)
        return loss, (sum(tokens[part]), stats)

    parts = backward_in_parts(run, prompts, tokens, features, loss_of)
    if len(parts) == 1:
        return parts[0][1]
    names = list(parts[0][1]) if parts else []
    # One read on the host for all statistics.
    figures = [torch.stack([torch.as_tensor(stats[name]) for name in names]) for _, stats in parts]
    values = torch.stack(figures).tolist() if figures else []
    return combine_stats([(weight, dict(zip(names, row))) for (weight, _), row in zip(parts, values)])


def gathered_reference(run: Run, groups: Sequence[Group], features: MediaFeatures | None) -> list[Tensor]:
    """The reference's log-probabilities of each group, computed before the passes, whose numbers must be equal."""
    if not groups:
        with run.policy.reference_weights():  # the others gather theirs
            return []
    logps = reference_logps(run, rows_of(run, groups), features)
    return list(logps.split([group.tokens for group in groups]))


@torch.no_grad()
def reference_logps(run: Run, rows: ForwardRows, features: MediaFeatures | None) -> Tensor:
    """(M,) log-probabilities of the response tokens under the reference."""
    logps = run.policy.reference_logps(
        rows.prompts,
        rows.token_ids,
        rows.lengths,
        group_sizes=rows.group_sizes,
        temperature=run.config.temperature,
        features=features,
    )
    return logps[rows.token_index.to(logps.device)]


def rows_of(run: Run, groups: Sequence[Group]) -> ForwardRows:
    """The responses of some groups as the policy computes them."""
    rows = response_rows([group.prompt for group in groups], [group.token_ids for group in groups])
    return for_policy(rows, run.policy)


def _loss(
    run: Run,
    groups: Sequence[Group],
    features: MediaFeatures | None,
    items: float,
    ref_logps: Tensor | None,  # (M,); None to run the reference here, if there is one
) -> tuple[Tensor, dict]:
    """The loss of some groups and its statistics, which stay on the device."""
    config, policy = run.config, run.policy
    rows = rows_of(run, groups)
    device = policy.device
    lengths = [len(tokens) for group in groups for tokens in group.token_ids]
    row_lengths = torch.tensor(lengths, device=device)
    if ref_logps is None and "reference" in run.algorithm.extra_models:
        ref_logps = reference_logps(run, rows, features)
    ratios = [group.sampling_ratio for group in groups if group.sampling_ratio is not None]
    output = run.algorithm.loss(
        response_hidden(policy, rows, features=features),
        policy.head_weight,
        rows.target_ids.to(device),
        **run.algorithm.loss_inputs(verdicts_on(groups, run.algorithm)),
        **appraised(groups),
        bias=policy.head_bias,
        float32_weight=policy.head_float32,
        lengths=row_lengths,
        mask=counted_tokens(config, groups),
        old_logps=None if on_policy(config, run.algorithm) else torch.cat([group.logps for group in groups]),
        ref_logps=ref_logps,
        sampling_ratio=torch.cat(ratios).clamp(max=config.sampling_ratio_cap) if ratios else None,
        num_items_in_batch=items,
        validate=False,
    )
    stats = {name: output.stats[name] for name in LOGGED if name in output.stats}
    return output.loss, {"loss": output.loss.detach()} | stats


def appraised(groups: Sequence[Group]) -> dict[str, Tensor]:
    """The advantages (M,) of a critic; nothing without one."""
    advantages = [group.appraisal.advantages for group in groups if group.appraisal is not None]
    return {"advantages": torch.cat(advantages)} if advantages else {}
