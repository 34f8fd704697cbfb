"""Greedy answers on a held-out set: right or wrong by category, and better or worse than other answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rlaif_fast.algorithms.group import rank_request
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.oracle.base import Oracle, rank_all
from rlaif_fast.prompts.batches import BatchMaker, by_media
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout.base import Sampler, SamplingParams
from rlaif_fast.trainer.scoring import AnswerScorer, has_answer


@dataclass(frozen=True)
class Prediction:
    """One greedy answer.

    Attributes:
        example: The row.
        text: The answer.
        correct: Whether it is right; None if the row has no reference answer.
        win: 1 if the oracle ranks it above the opponent's answer, 0 below, 0.5 for a tie; None if it was not compared
            or could not be.
        finished: Whether the answer ended within the budget.
    """

    example: Example
    text: str
    correct: bool | None
    win: float | None = None
    finished: bool = True


@dataclass(frozen=True)
class EvalResult:
    """Predictions on a set, in the order of the rows; rows with unreadable media are missing."""

    predictions: tuple[Prediction, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers among those that can be scored; NaN if none can."""
        scored = [p.correct for p in self.predictions if p.correct is not None]
        return sum(scored) / len(scored) if scored else math.nan

    @property
    def win_rate(self) -> float:
        """Mean of `win` over the compared answers; NaN if none was compared."""
        wins = [p.win for p in self.predictions if p.win is not None]
        return sum(wins) / len(wins) if wins else math.nan

    @property
    def texts(self) -> dict[str, str]:
        """The answers by example id."""
        return {p.example.id: p.text for p in self.predictions}

    def by_category(self) -> dict[str, dict[str, float | int]]:
        """Accuracy, count and number of right answers among the scorable ones of each category, by name."""
        counts: dict[str, list[int]] = {}
        for prediction in self.predictions:
            if prediction.correct is not None:
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
    scorer: AnswerScorer,
    max_new_tokens: int,
    max_reasoning_tokens: int | None = None,
    videos_per_step: int = 64,
    advance=lambda count: None,
    world: World | None = None,
    oracle: Oracle | None = None,
    opponents: Mapping[str, str] | None = None,
) -> EvalResult:
    """Answer every row greedily and score it against its reference answer, if it has one.

    Args:
        examples: Rows.
        make_batch: Loads and encodes rows.
        sampler: Draws the answers (temperature 0, one per prompt).
        scorer: Says which answers are right.
        max_new_tokens: Most tokens in an answer.
        max_reasoning_tokens: See `SamplingParams`.
        videos_per_step: Videos answered at once; those of the next step are decoded meanwhile.
        advance: Called with the number of rows done after each step.
        world: The processes that share the rows; all of them get the result.
        oracle: Ranks each answer against the one in `opponents`; with None nothing is compared.
        opponents: Other answers, by example id.

    Raises:
        Outage: The oracle went down, or too many files are bad, in any process.
    """
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=0.0, max_reasoning_tokens=max_reasoning_tokens
    )
    world = world or World()
    groups = world.share(by_media(examples))
    row_of = {id(example): row for row, example in enumerate(examples)}
    starts = range(0, len(groups), videos_per_step)
    steps = [[row for group in groups[at : at + videos_per_step] for row in group] for at in starts]

    def answer() -> dict[int, tuple[str, bool | None, float | None, bool]]:
        found: dict[int, tuple[str, bool | None, float | None, bool]] = {}
        for rows, following in zip_longest(steps, steps[1:], fillvalue=()):
            prompts = make_batch(rows)
            make_batch.prefetch(following)
            if prompts:
                rollout = sampler.sample(prompts, 1, params)
                wins = compare_with(prompts, rollout.texts, oracle, opponents or {})
                ended = rollout.finished.tolist()
                for prompt, text, win, finished in zip(prompts, rollout.texts, wins, ended):
                    correct = None
                    if has_answer(prompt.example):
                        correct = scorer.is_correct(rank_request(prompt, [text], 0), text)
                    found[row_of[id(prompt.example)]] = text, correct, win, finished
            advance(len(rows))
        return found

    answers = world.together(answer)
    for part in world.gather(answers):
        answers |= part
    return EvalResult(tuple(Prediction(examples[row], *answers[row]) for row in sorted(answers)))


def compare_with(
    prompts: Sequence[Prompt], texts: Sequence[str], oracle: Oracle | None, opponents: Mapping[str, str]
) -> list[float | None]:
    """Each answer's result against its opponent: 1, 0.5 or 0; None without an opponent or a verdict.

    Equal texts tie without being shown to the oracle.
    """
    others = [opponents.get(prompt.example.id) for prompt in prompts]
    wins: list[float | None] = [0.5 if text == other else None for text, other in zip(texts, others)]
    asked = [i for i, other in enumerate(others) if other is not None and other != texts[i]]
    if oracle is None or not asked:
        return wins
    requests = [rank_request(prompts[i], [others[i] or "", texts[i]], i) for i in asked]
    for i, ranking in zip(asked, rank_all(oracle, requests)):
        theirs, ours = ranking.ranks
        if ranking.valid and theirs is not None and ours is not None:
            wins[i] = 1.0 if ours < theirs else 0.5 if ours == theirs else 0.0
    return wins
