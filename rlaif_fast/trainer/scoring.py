"""Who says whether an answer is right, and what the best checkpoint is chosen by.

The run's own oracle answers both wherever it can, so that reward, selection and report measure one thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Oracle, RankRequest
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.oracle.registry import SHARED_OPTIONS, build_oracle, find_oracle
from rlaif_fast.oracle.scoring import answer_kind
from rlaif_fast.oracle.wrappers import oracles_in

# How a verdict on an answer comes about, above all which part of it the rules see. Raise this number with every change
# to that: an evaluation begun before is then refused. The rules have their own number (`ReferenceOracle.identity`).
SCORING = 3
FREE_TEXT_WORDS = 5  # a right answer need not repeat a reference of this many words
BEHIND_REASONING = r"(?:</think>|\Z)\s*(.*)"  # nothing if the reasoning does not end
TAKES_EXTRACT = ("reference", "api", "local")
NEED_ANSWERS = ("reference", "embedding")  # oracles that compare with the reference answer
RULE_OPTIONS = ("extract", "tolerance")  # of the reference oracle; judges take `extract` in the same sense


@runtime_checkable
class AnswerScorer(Protocol):
    """Says whether a response counts as right; an oracle that knows the answers has this."""

    def is_correct(self, request: RankRequest, response: str) -> bool:
        """Whether the response to a request with a reference answer is right."""
        ...


def scorer_of(oracle: Oracle, options: Mapping[str, Any], *, reasons: bool = False) -> AnswerScorer:
    """The scorer of a run: the oracle itself or one inside it, else the rules with the options that it shares.

    Wrappers that disturb an oracle for an experiment are looked through: accuracy uses the clean one.
    """
    return next((o for o in oracles_in(oracle) if isinstance(o, AnswerScorer)), None) or rules(
        options, reasons=reasons
    )


def scorer_by_name(name: str, options: Mapping[str, Any], *, reasons: bool = False) -> AnswerScorer:
    """The scorer of a run with this oracle, without loading a judge."""
    for inner, own in oracles_named(name, options):
        if hasattr(find_oracle(inner, own), "is_correct"):
            plain = {key: value for key, value in own.items() if key not in SHARED_OPTIONS}
            oracle: Any = build_oracle(inner, max_invalid_fraction=None, **plain)
            return oracle
    return rules(options, reasons=reasons)


def rules(options: Mapping[str, Any], *, reasons: bool = False) -> ReferenceOracle:
    """The rules of the reference oracle, with the `extract` and `tolerance` of the run's oracle.

    Args:
        options: The oracle's options.
        reasons: Whether the chat template leaves the prompt inside the reasoning. The answer then begins where the
            reasoning closes, unless `extract` says otherwise; a response that never closes it has no answer.
    """
    given = {name: options[name] for name in RULE_OPTIONS if options.get(name) is not None}
    return ReferenceOracle(**({"extract": BEHIND_REASONING} if reasons else {}) | given)


def behind_reasoning(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An oracle's options, changed so that it and the oracles they name see only what follows the reasoning.

    An oracle with its own `extract` keeps it.

    Returns:
        The options, and the names of the oracles that still see whole responses.
    """
    told, whole = dict(options), []
    if name in TAKES_EXTRACT:
        told.setdefault("extract", BEHIND_REASONING)
    elif not list(_inside(options)) and "extract" not in options:
        whole.append(name)

    def inside(oracle: Any) -> Any:
        for nested, own in _inside({"inner": oracle}):
            inner, others = behind_reasoning(nested, own)
            whole.extend(others)
            return oracle if inner == own else {"name": nested, **inner}
        return oracle

    if "inner" in told:
        told["inner"] = inside(told["inner"])
    if isinstance(told.get("members"), (list, tuple)):
        told["members"] = [inside(member) for member in told["members"]]
    return told, whole


def choose_metric(
    asked: str, oracle: str, options: Mapping[str, Any], rows: Sequence[Example]
) -> tuple[str, str]:
    """What the best checkpoint is chosen by, and why in a sentence.

    Args:
        asked: `metric_for_best_model`.
        oracle: The oracle's name.
        options: Its options.
        rows: The validation rows.

    Raises:
        UsageError: The metric is accuracy and no row has an answer.
    """
    answered = [row for row in rows if has_answer(row)]
    if asked == "accuracy" and not answered:
        raise UsageError(
            "metric_for_best_model: accuracy needs answers, and no validation row has one; use auto, oracle or none"
        )
    if asked != "auto":
        return asked, f"The best checkpoint is chosen by: {asked} (asked for)."
    if 2 * len(answered) < len(rows) or not answered:
        missing = len(rows) - len(answered)
        return "oracle", f"{_BY_ORACLE}: {missing} of {len(rows)} validation rows have no answer."
    knows = any(hasattr(find_oracle(name, own), "is_correct") for name, own in oracles_named(oracle, options))
    free = sum(_is_free_text(row, knows) for row in answered)
    if 2 * free > len(answered):
        return "oracle", f"{_BY_ORACLE}: {free} of {len(answered)} validation answers are free text."
    return "accuracy", "The best checkpoint is chosen by: accuracy on validation."


def check_references(oracle: str, options: Mapping[str, Any], rows: Sequence[Example]) -> None:
    """Refuse training rows if the oracle cannot rank a single one.

    Raises:
        UsageError: The oracle compares with reference answers, and no row has one.
    """
    if _needs_answers(oracle, options) and rows and not any(has_answer(row) for row in rows):
        raise UsageError(
            f"oracle: {oracle} ranks by reference answers, and none of the {len(rows)} rl rows has one; "
            "add answers, or use an oracle that needs none"
        )


def has_answer(row: Example) -> bool:
    """Whether a row has a reference answer that says something."""
    return row.answer is not None and bool(row.answer.strip())


_BY_ORACLE = (
    "The best checkpoint is chosen by: oracle (share of greedy answers to validation questions that the run's oracle "
    "ranks above those where RL began, ties half)"
)


def _is_free_text(row: Example, oracle_knows_answers: bool) -> bool:
    """Whether the row's answer is a text that a right response need not repeat.

    An oracle that is not based on the answers need not agree with a comparison of texts, however short.
    """
    answer = row.answer or ""
    if answer_kind(answer, row.options, row.metadata.get("form")) != "text":
        return False
    return not oracle_knows_answers or len(answer.split()) >= FREE_TEXT_WORDS


def oracles_named(name: str, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and options of an oracle, and of those that its options name."""
    yield name, dict(options)
    for nested, own in _inside(options):
        yield from oracles_named(nested, own)


def _inside(options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The names and options of the oracles that an oracle's options name, one level deep."""
    members = options.get("members") or ()
    for nested in (options.get("inner"), *(members if isinstance(members, (list, tuple)) else ())):
        if isinstance(nested, str):
            yield nested, {}
        elif isinstance(nested, Mapping) and "name" in nested:
            yield nested["name"], {key: nested[key] for key in nested if key != "name"}


def _needs_answers(name: str, options: Mapping[str, Any]) -> bool:
    """Whether an oracle ranks no group without a reference answer; for an ensemble, whether too few members do."""
    inside = [_needs_answers(*nested) for nested in _inside(options)]
    if not inside:
        return name in NEED_ANSWERS
    least = options.get("min_members")
    return inside.count(False) < (least if isinstance(least, int) else len(inside))
