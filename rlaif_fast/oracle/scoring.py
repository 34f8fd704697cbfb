"""Scores of an answer against a reference answer, each in [0, 1] and by a rule that can be checked by hand.

Four kinds of answer are distinguished, in this order:

- `form`: the dataset gives a regular expression that a well-formed answer to this very question matches, its
  groups capturing the key facts. exact 1; well-formed 0.3 + 0.6 * (share of facts that are right); malformed
  0.25 * F1, so that no malformed text ever reaches a well-formed one.
- `choice`: the reference is one of the options. right letter 1; another letter 0.2; no letter 0.1 * F1.
- `number`: the reference is a number. exact 1; the right number among other words 0.9; another number 0.2 to
  0.5 by its distance; none or several 0.15 * F1.
- `text`: exact 1; else 0.9 * mean(token F1, chrF).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rlaif_fast.data.forms import FINAL_PUNCTUATION, fault_of, match_form
from rlaif_fast.errors import UsageError, needed_by
from rlaif_fast.oracle.choice_texts import QUOTES, tokens
from rlaif_fast.oracle.choices import parse_choice, reference_choice

EMPHASIS = f"{QUOTES}*_`"  # at the ends: "red", **red**
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)|(?<![\w.])[-+]?\.\d+(?!\w)")
_NUMBER_WORDS = {
    word: float(value)
    for value, word in enumerate(
        (
            *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
            *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
            *("nineteen", "twenty"),
        )
    )
}


def normalise(text: str) -> str:
    """Fold case and Unicode compatibility forms, squeeze white space, drop final punctuation, quotes and emphasis.

    A text with nothing else keeps them: "?" may be the answer, an empty text may not.
    """
    squeezed = " ".join(_plain_forms(text).casefold().split())
    return squeezed.lstrip(EMPHASIS).rstrip(EMPHASIS + FINAL_PUNCTUATION) or squeezed


def _plain_forms(text: str) -> str:
    """`text` without Unicode compatibility forms, each minus sign a hyphen."""
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-")


def token_f1(response: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the multisets of tokens, as in SQuAD (articles kept)."""
    ours, theirs = Counter(tokens(response)), Counter(tokens(reference))
    common = sum((ours & theirs).values())
    if common == 0:
        return 0.0
    return 2.0 * common / (sum(ours.values()) + sum(theirs.values()))


def chrf(response: str, reference: str) -> float:
    """Character n-gram F-score (chrF2) by sacrebleu, scaled to [0, 1]."""
    return _chrf_metric().sentence_score(normalise(response), [normalise(reference)]).score / 100.0


@functools.cache
def _chrf_metric():
    with needed_by("scoring free text", "train"):
        from sacrebleu.metrics import CHRF
    return CHRF(eps_smoothing=True)


def parse_number(text: str) -> float | None:
    """The one number `text` names in digits, or else as a word up to twenty; None if there is not exactly one."""
    digits = {float(match.replace(",", "")) for match in _NUMBER.findall(_plain_forms(text))}
    found = digits or {_NUMBER_WORDS[token] for token in tokens(text) if token in _NUMBER_WORDS}
    return found.pop() if len(found) == 1 else None


@functools.lru_cache(maxsize=4096)
def compile_form(form: str) -> re.Pattern[str]:
    """Compile a `form`; it is matched against normalised text, whatever its case.

    Raises:
        UsageError: If it is not a regular expression, or may take very long to match.
    """
    reason = fault_of(form)
    if reason is not None:
        raise UsageError(f"metadata 'form': {reason}: {form!r:.200}")
    return re.compile(form, re.IGNORECASE)


def form_facts(form: str, text: str) -> tuple[str, ...] | None:
    """The groups of `form` in a well-formed answer, normalised; None if `text` is malformed."""
    match = match_form(compile_form(form), text)
    if match is None:
        return None
    return tuple(normalise(group or "") for group in match.groups())


def score_form(response: str, reference: str, form: str) -> float:
    """Score by `form`; see the module's table.

    Raises:
        UsageError: If the reference answer itself does not match the form.
    """
    if normalise(response) == normalise(reference):
        return 1.0
    right = form_facts(form, reference)
    if right is None:
        raise UsageError(
            f"the reference answer {reference!r} does not match its own metadata 'form' {form!r}"
        )
    facts = form_facts(form, response)
    if facts is None:
        return 0.25 * token_f1(response, reference)
    if not right:
        return 0.3 + 0.6 * token_f1(response, reference)
    return 0.3 + 0.6 * sum(a == b for a, b in zip(facts, right)) / len(right)


def score_choice(response: str, answer: int, options: Sequence[str]) -> float:
    """Score a multiple-choice answer whose right option is number `answer`."""
    picked = parse_choice(response, options)
    if picked == answer:
        return 1.0
    if picked is not None:
        return 0.2
    return 0.1 * token_f1(response, options[answer]) if options else 0.0


def score_number(response: str, reference: str, tolerance: float) -> float:
    """Score against a numeric reference; `tolerance` is relative to it."""
    if normalise(response) == normalise(reference):
        return 1.0
    right, value = parse_number(reference), parse_number(response)
    assert right is not None
    if value is None:
        return 0.15 * token_f1(response, reference)
    error = abs(value - right)
    if error <= tolerance * abs(right) + 1e-9:
        return 1.0 if _is_number(response) else 0.9
    return 0.2 + 0.3 * max(0.0, 1.0 - error / max(1.0, abs(right)))


def _is_number(text: str) -> bool:
    """Whether `text` is only a number, perhaps with a sign, a currency or a per cent mark."""
    stripped = normalise(text).strip("$€£% ")
    return stripped in _NUMBER_WORDS or _NUMBER.fullmatch(stripped) is not None


def score_text(response: str, reference: str) -> float:
    """Score free text."""
    if normalise(response) == normalise(reference):
        return 1.0
    if not tokens(response):
        return 0.0
    return 0.9 * 0.5 * (token_f1(response, reference) + chrf(response, reference))


def answer_kind(reference: str, options: Sequence[str], form: str | None) -> str:
    """Which rule a reference answer is judged by: "form", "choice", "number" or "text"."""
    if options and reference_choice(reference, options) is not None:
        return "choice"
    if form is not None:
        return "form"
    if not options and re.fullmatch(r"\(?[A-H]\)?[.):]?", reference.strip()):
        return "choice"
    return "number" if _is_number(reference) and parse_number(reference) is not None else "text"
