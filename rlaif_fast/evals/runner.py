"""Answers a benchmark chunk by chunk and keeps the answers, so that an interrupted evaluation can continue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Protocol

from rlaif_fast.algorithms.group import rank_request
from rlaif_fast.data.benchmarks import Item
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.evals.grading import Grader, grade_answers
from rlaif_fast.evals.identity import asked_digest
from rlaif_fast.evals.records import EvalFolder, Record
from rlaif_fast.oracle.base import RankRequest
from rlaif_fast.oracle.grading import Grade
from rlaif_fast.prompts.batches import BatchMaker
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.video.refs import MediaRef

GRADED_AT_ONCE = 64  # answers that share a judge's deadline, and whose grades an interruption loses


class Answers(Protocol):
    """Gives one answer to each prompt."""

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]: ...


IsRight = Callable[[RankRequest, str], bool]


def run_items(
    items: Sequence[Item],
    folder: EvalFolder | None,
    make_batch: BatchMaker,
    answers: Answers,
    *,
    category: str,
    is_right: IsRight,
    grader: Grader | None,
    reasons: bool,
    videos_per_step: int,
    world: World,
    advance: Callable[[int], None],
) -> None:
    """Answer every item that is not in the folder yet, and record it there.

    Args:
        items: The benchmark.
        folder: Where answers are kept, in rank 0; the other ranks have none and follow it.
        make_batch: Loads and encodes rows; those with bad media are missing from the result.
        answers: Answers prompts.
        category: What the category is called among the groups of a record.
        is_right: Says whether an answer is right.
        grader: Also grades the answers to open questions; None grades none.
        reasons: See `grade_answers`.
        videos_per_step: Videos answered at once, in each process; the next ones are decoded meanwhile.
        world: The processes that share the items.
        advance: Called with the number of items done.
    """
    done = set().union(*world.gather(set(folder.records) if folder is not None else set()))
    left = [item for item in items if item.example.id not in done]
    advance(len(items) - len(left))
    chunks = _by_video(left)
    starts = range(0, len(chunks), videos_per_step * world.size)
    steps = [chunks[at : at + videos_per_step * world.size] for at in starts]
    mine = [[item for chunk in world.share(step) for item in chunk] for step in steps]
    for items_now, following in zip_longest(mine, mine[1:], fillvalue=()):
        records = _answer_chunk(
            items_now, following, make_batch, answers, category, is_right, grader, reasons
        )
        everyone = [record for part in world.gather(records) for record in part]
        if folder is not None:
            folder.add(everyone)
        advance(len(everyone))


def grade_rest(items: Sequence[Item], folder: EvalFolder, grader: Grader) -> int:
    """Ask once more for the grades that a judge did not give, and record them as they come; returns how many are still
    missing. A judge that grades none of `GRADED_AT_ONCE` answers is not asked about the rest.

    Args:
        items: The benchmark, fully answered.
        folder: Where the answers are.
        grader: The judge.
    """
    waiting = [
        (item.example, record.prediction)
        for item in items
        if not item.example.options
        and (record := folder.records[item.example.id]).pred is None
        and record.prediction is not None
    ]
    left = len(waiting)
    for at in range(0, len(waiting), GRADED_AT_ONCE):
        part = waiting[at : at + GRADED_AT_ONCE]
        grades = grade_answers(grader, part)
        given = {example.id: grade for (example, _), grade in zip(part, grades) if grade is not None}
        folder.grade(given)
        left -= len(given)
        if not given:
            break
    return left


def _answer_chunk(
    items: Sequence[Item],
    following: Sequence[Item],
    make_batch: BatchMaker,
    answers: Answers,
    category: str,
    is_right: IsRight,
    grader: Grader | None,
    reasons: bool,
) -> list[Record]:
    asked = _readable(items)
    prompts = make_batch(asked) if asked else []
    make_batch.prefetch(_readable(following))
    texts = answers(prompts) if prompts else []
    requests = [rank_request(prompt, [text], 0) for prompt, text in zip(prompts, texts)]
    grades: dict[str, Grade | None] = {}
    if grader is not None:
        open_ended = [(p.example, text) for p, text in zip(prompts, texts) if not p.example.options]
        found_grades = grade_answers(grader, open_ended, reasons=reasons)
        grades = {example.id: grade for (example, _), grade in zip(open_ended, found_grades)}
    found = {
        prompt.example.id: (text, is_right(request, text))
        for prompt, text, request in zip(prompts, texts, requests)
    }
    reason = make_batch.store.reason
    return [
        _record(item, category, found.get(item.example.id), grades.get(item.example.id), reason)
        for item in items
    ]


def _readable(items: Sequence[Item]) -> list[Example]:
    """The questions whose media exist."""
    return list({item.example.id: item.example for item in items if not item.trouble}.values())


def _record(
    item: Item,
    category: str,
    found: tuple[str, bool] | None,
    grade: Grade | None,
    reason: Callable[[MediaRef], str | None],
) -> Record:
    example = item.example
    unread = item.trouble or next((f"{m.path}: {why}" for m in example.seen if (why := reason(m))), "")
    return Record(
        id=example.id,
        video=_video(example) or example.id,
        groups={category: example.category, **item.groups},
        question=example.question,
        answer=example.answer,
        prediction=None if found is None else found[0],
        correct=found is not None and found[1],
        trouble="" if found is not None else unread or f"{_video(example)} cannot be read",
        pred=None if grade is None else grade.correct,
        score=None if grade is None else grade.score,
        asked=asked_digest(example),
    )


def _video(example: Example) -> str:
    return " ".join(medium.path for medium in example.seen)


def _by_video(items: Sequence[Item]) -> list[list[Item]]:
    """Items grouped by video, so that each is decoded only once; an item without one is a group of its own."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault(item.example.seen or item.example.id, []).append(item)
    return list(groups.values())
