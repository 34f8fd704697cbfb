"""What a dataset holds, and how accurate a policy can be without looking at the videos."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rlaif_fast.data.schema import NO_CATEGORY, Example

_ENOUGH = 20  # times a question must be asked before its most frequent answer means anything


@dataclass(frozen=True)
class CategorySummary:
    """One line of the table that `check` prints.

    Attributes:
        category: The category.
        questions: Number of questions.
        multiple_choice: How many of them have options.
        chance: Accuracy without the videos, see `chance_by_category`.
        mean_question_words: Words of a question, on average.
        mean_answer_words: Words of an answer, on average.
        max_answer_words: Words of the longest answer.
    """

    category: str
    questions: int
    multiple_choice: int
    chance: float
    mean_question_words: float
    mean_answer_words: float
    max_answer_words: int


def chance_by_category(
    examples: Iterable[Example], reference: Iterable[Example] | None = None
) -> dict[str, float]:
    """Accuracy of a policy that reads the question but not the video.

    It always gives the most frequent answer to questions of the same kind (`metadata["kind"]`, if the row
    has it; the facts that `metadata["form"]` captures are then counted), else of the same wording
    if that is asked at least 20 times, else of the same category.

    Args:
        examples: Questions with answers; those without one are left out.
        reference: What the policy learns its answers from, e.g. the training split. The default is `examples`
            itself, which gives an upper bound: the policy knows the answers it is tested on.

    Returns:
        Category -> accuracy in [0, 1].
    """
    tested = [example for example in examples if example.answer is not None]
    known = tested if reference is None else [example for example in reference if example.answer is not None]
    asked = Counter(_wording(example) for example in known)
    answers: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for example in known:
        answers[_group(example, asked)][_facts(example)] += 1
    guess = {group: counts.most_common(1)[0][0] for group, counts in answers.items()}
    right: dict[str, list[bool]] = defaultdict(list)
    for example in tested:
        right[example.category].append(guess.get(_group(example, asked)) == _facts(example))
    return {category: sum(hits) / len(hits) for category, hits in sorted(right.items())}


def chance_accuracy(examples: Iterable[Example]) -> float:
    """`chance_by_category` over all questions, each counted once; 0 if no question has an answer."""
    tested = [example for example in examples if example.answer is not None]
    sizes = Counter(example.category for example in tested)
    chances = chance_by_category(tested)
    return sum(chances[category] * size for category, size in sizes.items()) / max(1, len(tested))


def summarise(examples: Sequence[Example]) -> list[CategorySummary]:
    """One entry for each category, by name."""
    chances = chance_by_category(examples)
    members: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        members[example.category].append(example)
    return [
        _summary(category, group, chances.get(category, float("nan")))
        for category, group in sorted(members.items())
    ]


def summary_of_all(examples: Sequence[Example]) -> CategorySummary:
    """The entry for all questions together; there must be at least one."""
    return _summary(NO_CATEGORY, examples, chance_accuracy(examples))


def _summary(category: str, group: Sequence[Example], chance: float) -> CategorySummary:
    return CategorySummary(
        category=category,
        questions=len(group),
        multiple_choice=sum(bool(example.options) for example in group),
        chance=chance,
        mean_question_words=fmean(len(example.question.split()) for example in group),
        mean_answer_words=fmean(len((example.answer or "").split()) for example in group),
        max_answer_words=max(len((example.answer or "").split()) for example in group),
    )


def _wording(example: Example) -> Hashable:
    return example.category, example.question, len(example.options)


def _group(example: Example, asked: Counter[Hashable]) -> Hashable:
    """The group of a question; all questions of one group get the same guess."""
    if "kind" in example.metadata:
        return example.category, example.metadata["kind"], len(example.options)
    wording = _wording(example)
    return wording if asked[wording] >= _ENOUGH else (example.category, None, len(example.options))


def _facts(example: Example) -> Hashable:
    """The answer without the words that come from the question, if the row says which those are."""
    assert example.answer is not None
    form = example.metadata.get("form")
    match = re.fullmatch(form, example.answer) if isinstance(form, str) else None
    return match.groups() if match else example.answer.strip().casefold()
