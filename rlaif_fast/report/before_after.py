"""Test accuracy before and after RL, by category, from the predictions of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlaif_fast.data.schema import named_categories
from rlaif_fast.report.figures import Score
from rlaif_fast.report.gallery import media_of
from rlaif_fast.report.stats import left_out, most_asked, paired_bootstrap, share_interval
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """Test accuracy before and after RL.

    Attributes:
        total: All questions.
        by_category: Each category, the largest gain first; none if no row has one.
        fixed: Questions answered wrong before and right after.
        broken: Questions answered right before and wrong after.
        clips: Number of videos that the questions are about; 0 if the predictions do not say.
    """

    total: Score
    by_category: tuple[Score, ...]
    fixed: int
    broken: int
    clips: int

    @property
    def drawn(self) -> tuple[Score, ...]:
        """What the figures show: all questions, then the categories, only those with the most questions if many."""
        chosen = {score.name for score in most_asked(sorted(self.by_category, key=lambda score: score.name))}
        return (self.total, *(score for score in self.by_category if score.name in chosen))

    @property
    def left_out(self) -> str:
        """What the figures leave out, to be added to their titles; "" if they show every category."""
        return left_out(self.by_category)


def compare_predictions(run_dir: RunDir) -> Comparison | None:
    """Compare the test predictions made before and after RL; None until both exist and can be scored."""
    pairs = scored_pairs(run_dir)
    if not pairs:
        return None
    scores = [_score(name, own) for name, own in named_categories(by_category(pairs)).items()]
    return Comparison(
        total=_score("all categories", pairs),
        by_category=tuple(sorted(scores, key=lambda score: (-score.change.mean, score.name))),
        fixed=sum(new["correct"] and not old["correct"] for old, new in pairs),
        broken=sum(old["correct"] and not new["correct"] for old, new in pairs),
        clips=len({media_of(new) for _, new in pairs if media_of(new)}),
    )


def scored_pairs(run_dir: RunDir) -> list[Pair]:
    """Test predictions before and after RL, for each question that was answered both times and can be scored."""
    before, after = (
        {
            row["example_id"]: row
            for row in read_jsonl(run_dir.predictions(phase))
            if row["correct"] is not None
        }
        for phase in ("sft", "final")
    )
    return [(before[name], after[name]) for name in after if name in before]


def by_category(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """The pairs of each category, in order of first appearance."""
    categories: dict[str, list[Pair]] = {}
    for pair in pairs:
        categories.setdefault(pair[1]["category"], []).append(pair)
    return categories


def _score(name: str, pairs: Sequence[Pair]) -> Score:
    old = [bool(before["correct"]) for before, _ in pairs]
    new = [bool(after["correct"]) for _, after in pairs]
    # Questions about one clip are not independent.
    clips = [media_of(after) or after["example_id"] for _, after in pairs]
    return Score(
        name=name,
        n=len(pairs),
        before=share_interval(old, clips),
        after=share_interval(new, clips),
        change=paired_bootstrap(old, new, clusters=clips),
        chance=float(np.mean([after["chance"] for _, after in pairs])),
    )
