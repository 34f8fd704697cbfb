"""The parts of a run that both stages use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlaif_fast.algorithms import Algorithm, Critic
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.machine import peak_rss_bytes
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.batches import BatchMaker
from rlaif_fast.rollout.base import Sampler
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.logging import RunLogger, SilentLogger
from rlaif_fast.termination import Termination
from rlaif_fast.trainer.ahead import RolloutAhead
from rlaif_fast.trainer.evaluation import EvalResult, evaluate
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.scoring import AnswerScorer


@dataclass
class Datasets:
    """The rows of the four splits, and what the best checkpoint is chosen by ("accuracy", "oracle" or "none")."""

    sft: list[Example]
    rl: list[Example]
    validation: list[Example]
    test: list[Example]
    metric: str = "accuracy"


@dataclass
class Run:
    """One training run: its configuration, its parts, and the folder it writes to."""

    config: TrainConfig
    policy: Policy
    sampler: Sampler
    make_batch: BatchMaker
    oracle: Oracle
    scorer: AnswerScorer
    algorithm: Algorithm
    data: Datasets
    logger: RunLogger | SilentLogger
    store: CheckpointStore
    world: World
    termination: Termination
    critic: Critic | None = None  # in the RL stage
    ahead: RolloutAhead | None = None  # in the RL stage
    peak_before: int = 0  # most bytes that the run held before it was resumed, over all processes

    def usage(self, *, alone: bool = False) -> dict[str, Any]:
        """The time and memory that the run has used, for a checkpoint.

        All processes call it together, or one calls it alone and counts its own memory and that from before.
        """
        peak = peak_rss_bytes()
        held = peak if alone else int(self.world.sum(peak)[0])
        return {"seconds": self.logger.seconds(), "peak_rss_bytes": max(held, self.peak_before)}

    def asked_to_end(self) -> bool:
        """Whether the run got SIGTERM or SIGHUP; all processes agree."""
        return self.world.sum(float(self.termination.requested))[0] > 0

    def wait_until_saved(self) -> None:
        """Wait until the last checkpoint is written, in all processes; if one ends before that, rank 0 ends too."""
        self.store.wait()
        self.world.barrier()

    def evaluate(
        self,
        examples: list[Example],
        *,
        phase: str,
        split: str,
        step: int,
        opponents: Mapping[str, str] | None = None,
    ) -> EvalResult:
        """Answer `examples` greedily, log how good the answers are, and return the predictions.

        With `opponents` (answers by example id), each answer is ranked against the other by the run's oracle.
        """
        policy = self.policy
        with self.logger.timer("evaluation"), torch.no_grad(), policy.evaluating(), policy.gathered():
            self.sampler.sync_weights(policy)
            result = evaluate(
                examples,
                self.make_batch,
                self.sampler,
                max_new_tokens=self.config.max_completion_length,
                max_reasoning_tokens=self.config.max_reasoning_tokens,
                videos_per_step=self.config.eval_videos_per_step,
                world=self.world,
                scorer=self.scorer,
                oracle=self.oracle if opponents is not None else None,
                opponents=opponents,
            )
        figures: dict = {"accuracy": result.accuracy, "by_category": result.by_category()}
        if opponents is not None:
            figures["win_rate"] = result.win_rate
        self.logger.log("eval", step, phase=phase, split=split, **figures)
        return result

    def score(self, result: EvalResult) -> float:
        """What the best checkpoint is chosen by; -inf if nothing could be measured."""
        value = result.win_rate if self.data.metric == "oracle" else result.accuracy
        return -math.inf if math.isnan(value) else value
