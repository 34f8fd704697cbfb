"""Supervised fine-tuning: the policy learns to answer in the dataset's form before it is ranked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlaif_fast import token_logps
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.forward_rows import ForwardRows, answer_rows, for_policy, response_hidden
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.prompts.batches import EpochOrder, by_media
from rlaif_fast.prompts.encoder import Prompt, PromptEncoder
from rlaif_fast.runs.checkpoint import load_state
from rlaif_fast.termination import Terminated
from rlaif_fast.trainer.optimizer import Updater
from rlaif_fast.trainer.passes import backward_in_parts
from rlaif_fast.trainer.run import Run
from rlaif_fast.trainer.seeds import seed_step
from rlaif_fast.trainer.stage_checkpoints import StageCheckpoints


def sft_loss(
    policy: Policy, rows: ForwardRows, backend: str = "auto", features: MediaFeatures | None = None
) -> Tensor:
    """Sum of the negative log-likelihood over all answer tokens of the batch."""
    logps = token_logps(
        response_hidden(policy, rows, features=features),
        policy.head_weight,
        rows.target_ids.to(policy.device),
        bias=policy.head_bias,
        float32_weight=policy.head_float32,
        validate=False,
        backend=backend,
    )
    assert isinstance(logps, Tensor)
    return -logps.sum()


def accumulate(
    run: Run, prompts: Sequence[EncodedPrompt], answers: Sequence[list[int]], scale: float
) -> float:
    """Accumulate `scale` times the gradient of the loss of all answers, `max_packed_tokens` at a time; return it."""
    policy = run.policy

    def loss_of(part: slice, features: MediaFeatures | None) -> tuple[Tensor, Tensor]:
        rows = for_policy(answer_rows(prompts[part], answers[part]), policy)
        loss = sft_loss(policy, rows, run.config.backend, features=features)
        return loss * scale, loss.detach()

    losses = backward_in_parts(run, prompts, [len(answer) for answer in answers], None, loss_of)
    return torch.stack(losses).sum().item() if losses else 0.0


def learn(run: Run, prompts: Sequence[Prompt], updater: Updater) -> dict[str, Any] | None:
    """One update from the answers of a step, and its log; None if no process has a readable row."""
    world, encoder = run.world, run.make_batch.encoder
    answers = [encoder.encode_answer(prompt.example.taught or "") for prompt in prompts]
    (tokens,) = world.sum(sum(map(len, answers)))
    if tokens == 0:
        updater.skip()
        return None
    local_loss = accumulate(run, prompts, answers, world.size / tokens)
    grad_norm = updater.step()
    (loss,) = world.sum(local_loss / tokens)
    return {"loss": loss, "grad_norm": grad_norm, "tokens": int(tokens)}


def check_answers(rows: Sequence[Example], encoder: PromptEncoder, max_completion_length: int) -> None:
    """Refuse answers that the policy could learn but never sample.

    Raises:
        UsageError: A row has no answer, or one of more tokens than `max_completion_length`.
    """
    for row in rows:
        where = row.source or row.id
        if row.taught is None:
            raise UsageError(f"{where}: supervised fine-tuning needs an answer; or use --sft none")
        tokens = len(encoder.encode_answer(row.taught))
        if tokens > max_completion_length:
            raise UsageError(
                f"{where}: the answer has {tokens} tokens and max_completion_length is {max_completion_length}; "
                f"raise it to at least {tokens}, or shorten the answer"
            )


def train_sft(run: Run, *, resume_from=None) -> None:
    """Run the supervised stage from its beginning, or from one of its checkpoints.

    Raises:
        UsageError: There is nothing to learn from (see `check_answers`).
        Outage: Too many files are bad, in any process; the previous steps are saved.
    """
    config, policy, logger, world = run.config, run.policy, run.logger, run.world
    if not run.data.sft:
        raise UsageError(
            "data: there are no rows for supervised fine-tuning; add sft_data, or use --sft none"
        )
    check_answers(run.data.sft, run.make_batch.encoder, config.max_completion_length)
    order = EpochOrder(by_media(run.data.sft), config.sft_videos_per_step, config.seed)
    updater = Updater(
        policy.model,
        world,
        learning_rate=config.sft_learning_rate,
        weight_decay=config.sft_weight_decay,
        betas=(0.9, 0.98),
        max_grad_norm=config.max_grad_norm,
        schedule="cosine",
        warmup_steps=config.sft_warmup_steps,
        total_steps=config.sft_steps,
        min_lr_ratio=0.1,
        offload=config.optimizer_offload,
    )
    done, evaluation_due = 0, False
    if resume_from is not None:
        state = load_state(resume_from)
        updater.load_state_dict(state, resume_from)
        done, evaluation_due = state["step"], state.get("evaluation_due", False)

    def stage_state(alone: bool) -> dict:
        return {"evaluation_due": evaluation_due} | updater.state_dict()  # due if the run ended during one

    def evaluate() -> None:
        nonlocal evaluation_due
        run.evaluate(run.data.validation, phase="sft", split="validation", step=done)
        evaluation_due = False
        checkpoints.save()

    checkpoints = StageCheckpoints(run, "sft", done, stage_state, lambda: updater.changes)
    stage = logger.stage("sft", total=config.sft_steps, start=done)
    with updater, run.termination.saving(checkpoints.may_give_up), stage, checkpoints.kept():
        if evaluation_due:
            evaluate()
        while done < config.sft_steps:
            seed_step(config, world, "sft", done)
            prompts = world.together(partial(taught, run, order, done))
            with logger.timer("sft"):
                learned = learn(run, prompts, updater)
            done += 1
            if learned is not None:
                logger.log("sft", done, **learned, learning_rate=updater.learning_rate)
            checkpoints.finished(done)
            unfinished = done < config.sft_steps
            evaluation_due = done % (4 * config.eval_steps) == 0 and unfinished
            if evaluation_due:
                evaluate()
            if unfinished and run.asked_to_end():
                raise Terminated(run.termination.heard)


def taught(run: Run, order: EpochOrder, step: int) -> list[Prompt]:
    """This process's share of what a step teaches; that of the next step is decoded meanwhile."""
    with run.logger.timer("decode"):
        rows, following = (
            [row for clip in run.world.share(order.step(at)) for row in clip] for at in (step, step + 1)
        )
        prompts = run.make_batch(rows)
        run.make_batch.prefetch(following)
    return prompts
