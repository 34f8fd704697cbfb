"""The parts of a run that both stages use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlaif_fast.algorithms import Algorithm
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.batches import BatchMaker
from rlaif_fast.rollout.base import Sampler
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.logging import RunLogger, SilentLogger
from rlaif_fast.trainer.evaluation import EvalResult, evaluate
from rlaif_fast.trainer.options import TrainConfig


@dataclass
class Datasets:
    """The rows of the four splits."""

    sft: list[Example]
    rl: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass
class Run:
    """One training run: its configuration, its parts, and the folder it writes to."""

    config: TrainConfig
    policy: Policy
    sampler: Sampler
    make_batch: BatchMaker
    oracle: Oracle
    algorithm: Algorithm
    data: Datasets
    logger: RunLogger | SilentLogger
    store: CheckpointStore
    world: World

    def evaluate(self, examples: list[Example], *, phase: str, split: str, step: int) -> EvalResult:
        """Answer `examples` greedily, log the accuracy, return the predictions."""
        with self.logger.timer("evaluation"), torch.no_grad(), self.policy.evaluating():
            self.sampler.sync_weights(self.policy)
            result = evaluate(
                examples,
                self.make_batch,
                self.sampler,
                max_new_tokens=self.config.max_completion_length,
                videos_per_step=self.config.eval_videos_per_step,
                world=self.world,
            )
        self.logger.log(
            "eval", step, phase=phase, split=split, accuracy=result.accuracy, by_category=result.by_category()
        )
        return result
