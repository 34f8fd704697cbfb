"""The gallery: what the policy answered about some test clips before and after, with frames."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from rlaif_fast.data.schema import lettered
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.video import FrameSampling, VideoError, load_clip, load_image, probe

STRIP_FRAMES = 6
STRIP_SIDE = 192  # pixels of a gallery frame's longer side, at most
PHASES = {"sft": "Before RL", "final": "After RL"}


@dataclass(frozen=True)
class Frame:
    """One frame of a strip: a data URI and its time in seconds."""

    uri: str
    time: float


@dataclass(frozen=True)
class Row:
    """One response of a group, or several identical ones.

    Attributes:
        text: The response.
        count: How often it was sampled.
        oracle: Place in the oracle's order, 1 is best; None if it was not judged.
        policy: Place in the policy's own order.
        advantage: Its GRPO_rank advantage.
        strength: |advantage| over the largest in the gallery, in [0, 1].
        oracle_share: 1 for the best place of the group, 0 for the last.
    """

    text: str
    count: int
    oracle: int | None
    policy: int | None
    advantage: float
    strength: float
    oracle_share: float


@dataclass(frozen=True)
class Answers:
    """What the policy answered in one phase: greedily, and in a sampled group."""

    title: str
    greedy: str | None
    correct: bool | None
    valid: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Card:
    """One clip of the gallery with its question.

    Attributes:
        category: Category of the question.
        question: The question as asked.
        options: "A. text", for multiple choice.
        answer: The reference answer.
        frames: The strip; empty if the file cannot be read.
        problem: Why there is no strip.
        answers: Before and after RL.
    """

    category: str
    question: str
    options: tuple[str, ...]
    answer: str
    frames: tuple[Frame, ...]
    problem: str
    answers: tuple[Answers, ...]


def gallery(run_dir: RunDir) -> list[Card]:
    """The test clips for which the run recorded samples, in its order."""
    by_example: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in read_jsonl(run_dir.samples):
        by_example.setdefault(record["example_id"], {})[record["phase"]] = record
    correct = {
        (phase, record["example_id"]): None if record["correct"] is None else bool(record["correct"])
        for phase in PHASES
        for record in read_jsonl(run_dir.predictions(phase))
    }
    sizes = [
        abs(advantage)
        for phases in by_example.values()
        for record in phases.values()
        for advantage in record["advantages"]
        if advantage is not None
    ]
    largest = max(sizes, default=0.0) or 1.0
    cards = []
    for name, phases in by_example.items():
        answers = tuple(
            Answers(
                title=PHASES[phase],
                greedy=phases[phase].get("greedy"),
                correct=correct.get((phase, name)),
                valid=bool(phases[phase].get("valid", True)),
                rows=_rows(phases[phase], largest),
            )
            for phase in PHASES
            if phase in phases
        )
        cards.append(_card(phases["sft"] if "sft" in phases else phases["final"], answers))
    return cards


def _card(asked: Mapping[str, Any], answers: tuple[Answers, ...]) -> Card:
    """The card of a question, from one of its records."""
    frames, problem = _strip(media_of(asked))
    answer = asked.get("answer") or ""
    options = tuple(lettered(asked.get("options") or ()))
    return Card(
        category=asked["category"],
        question=asked["question"],
        options=options,
        answer=next((option for option in options if option.startswith(f"{answer}. ")), answer),
        frames=frames,
        problem=problem,
        answers=answers,
    )


def _rows(record: Mapping[str, Any], largest: float) -> tuple[Row, ...]:
    """The responses of a group, the oracle's best first, equal ones merged."""
    oracle, policy = places(record["oracle_ranks"]), places(record["policy_ranks"])
    last = max((place for place in oracle if place is not None), default=1)
    counts: dict[tuple[str, int | None, int | None, float], int] = {}
    for text, first, second, advantage in zip(record["responses"], oracle, policy, record["advantages"]):
        key = (text, first, second, round(advantage or 0.0, 6))
        counts[key] = counts.get(key, 0) + 1
    rows = [
        Row(
            text=text,
            count=count,
            oracle=first,
            policy=second,
            advantage=advantage,
            strength=min(1.0, abs(advantage) / largest),
            oracle_share=0.0 if first is None or last == 1 else (last - first) / (last - 1),
        )
        for (text, first, second, advantage), count in counts.items()
    ]
    return tuple(sorted(rows, key=lambda row: (row.oracle or len(oracle) + 1, row.policy or len(oracle) + 1)))


def places(ranks: Sequence[float | None]) -> list[int | None]:
    """Turn ranks into places; only their order counts. 1 is best, equal ranks share a place."""
    known = [rank for rank in ranks if rank is not None]
    return [None if rank is None else 1 + sum(other < rank for other in known) for rank in ranks]


def _strip(path: str) -> tuple[tuple[Frame, ...], str]:
    """Evenly spaced frames of a clip, or why there are none."""
    if not path:
        return (), "The record names no clip."
    try:
        if (mimetypes.guess_type(path)[0] or "").startswith("image/"):
            clip = load_image(path)
        else:
            count = min(STRIP_FRAMES, probe(path).frames)
            clip = load_clip(path, sampling=FrameSampling(nframes=count, frame_factor=1))
    except VideoError as error:
        return (), str(error)
    return tuple(
        Frame(_png_uri(image), time) for image, time in zip(clip.frames.numpy(), clip.timestamps)
    ), ""


def _png_uri(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((STRIP_SIDE, STRIP_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def media_of(record: Mapping[str, Any]) -> str:
    """The first clip of a record; "" if there is none."""
    video = record.get("video") or ""
    return video if isinstance(video, str) else str(video[0])
