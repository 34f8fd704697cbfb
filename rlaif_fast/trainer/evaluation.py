"""Greedy answers on a held-out set, scored by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlaif_fast.algorithms.group import rank_request
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.prompts.batches import BatchMaker, by_media
from rlaif_fast.rollout.base import Sampler, SamplingParams


@dataclass(frozen=True)
class Prediction:
    """One greedy answer and whether it is right."""

    example: Example
    text: str
    correct: bool


@dataclass(frozen=True)
class EvalResult:
    """Predictions on a set, in the order of the rows; rows with unreadable media are missing."""

    predictions: tuple[Prediction, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 for an empty set."""
        return sum(p.correct for p in self.predictions) / max(len(self.predictions), 1)

    def by_category(self) -> dict[str, dict[str, float | int]]:
        """Accuracy, count and right answers for each category, by name."""
        counts: dict[str, list[int]] = {}
        for prediction in self.predictions:
            tally = counts.setdefault(prediction.example.category, [0, 0])
            tally[0] += prediction.correct
            tally[1] += 1
        return {
            name: {"accuracy": correct / n, "n": n, "correct": correct}
            for name, (correct, n) in sorted(counts.items())
        }


def evaluate(
    examples: Sequence[Example],
    make_batch: BatchMaker,
    sampler: Sampler,
    *,
    max_new_tokens: int,
    videos_per_step: int = 64,
    advance=lambda count: None,
    world: World | None = None,
) -> EvalResult:
    """Answer every row greedily and score it against its reference answer.

    Args:
        examples: Rows with answers.
        make_batch: Loads and encodes rows.
        sampler: Draws the answers (temperature 0, one a prompt).
        max_new_tokens: Most tokens in an answer.
        videos_per_step: Videos answered at once.
        advance: Called with the number of rows done after each step.
        world: The processes that share the rows; all of them get the result.
    """
    judge = ReferenceOracle()
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    world = world or World()
    groups = world.share(by_media(examples))
    row_of = {id(example): row for row, example in enumerate(examples)}
    answers: dict[int, tuple[str, bool]] = {}
    for start in range(0, len(groups), videos_per_step):
        rows = [row for group in groups[start : start + videos_per_step] for row in group]
        prompts = make_batch(rows)
        if prompts:
            for prompt, text in zip(prompts, sampler.sample(prompts, 1, params).texts):
                correct = judge.is_correct(rank_request(prompt, [text], 0), text)
                answers[row_of[id(prompt.example)]] = text, correct
        advance(len(rows))
    for part in world.gather(answers):
        answers |= part
    return EvalResult(tuple(Prediction(examples[row], *answers[row]) for row in sorted(answers)))
