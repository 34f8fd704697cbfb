"""Benchmarks of multiple choice: Video-MME, NExT-QA, MVBench."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlaif_fast.data.answers import MAX_OPTIONS, unlabelled
from rlaif_fast.data.benchmarks.base import (
    Folder,
    Item,
    cut_of,
    index_of,
    letter_of,
    make_item,
    text_of,
)
from rlaif_fast.data.schema import index_of_letter, lettered
from rlaif_fast.data.sources import objects_of, read_text
from rlaif_fast.errors import UsageError
from rlaif_fast.video.refs import Cut

# The authors' prompt (arXiv 2405.21075, "Evaluation Pipeline" of their repository).
_VIDEOMME = (
    "Select the best answer to the following multiple-choice question based on the video{and_subtitles}. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
    "{question}\n{options}\nThe best answer is:"
)
_LETTER = "Answer with the option's letter from the given choices directly."  # LLaVA's, as lmms-eval asks
_FONT = re.compile(r"<[^>]*>")

# Where the authors keep the videos of a task (`data_list` of their notebook): other folders may hold the same names.
_MVBENCH_HOMES = {
    "action_sequence": "star",
    "action_prediction": "star",
    "action_antonym": "ssv2",
    "fine_grained_action": "Moments_in_Time",
    "unexpected_action": "FunQA",
    "object_existence": "clevrer",
    "object_interaction": "star",
    "object_shuffle": "perception",
    "moving_direction": "clevrer",
    "action_localization": "sta",
    "scene_transition": "scene_qa",
    "action_count": "perception",
    "moving_count": "clevrer",
    "moving_attribute": "clevrer",
    "state_change": "perception",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa",
    "counterfactual_inference": "clevrer",
}
_MVBENCH_FPS = 3.0  # of its folders of frames: `frames_fps3_hq`

NEXTQA_TYPES = {
    "CW": "causal why",
    "CH": "causal how",
    "TN": "temporal next",
    "TC": "temporal current",
    "TP": "temporal previous",
    "DC": "descriptive counting",
    "DL": "descriptive location",
    "DO": "descriptive other",
    "DB": "descriptive binary",
}


def videomme(folder: Folder, subtitles: bool) -> Iterator[Item]:
    """Video-MME: one row per question, or one per video with its `questions`."""
    for where, row in folder.rows("**/test-*.parquet", "**/*.parquet", "**/*.jsonl", "**/*.json"):
        questions = row.get("questions") or [row]
        if not isinstance(questions, list) or not all(isinstance(each, dict) for each in questions):
            raise UsageError(f"{where}: expected 'questions' to list objects, got {questions!r:.60}")
        for question in questions:
            shared = {**row, **question}
            options = unlabelled(_options(shared, "options", where))
            answer = text_of(shared, "answer", where)
            name = text_of(shared, "videoID" if shared.get("videoID") else "video_id", where)
            text = text_of(shared, "question", where)
            spoken = _subtitle(folder, name) if subtitles else None
            asked = _VIDEOMME.format(
                and_subtitles=" and the subtitles" if subtitles else "",
                question=text,
                options="\n".join(lettered(options)),
            )
            if spoken is not None:
                asked = f"This video's subtitles are listed below:\n{spoken}\n{asked}"
            yield make_item(
                folder.video(name),
                groups={
                    "duration": text_of(shared, "duration", where),
                    "domain": text_of(shared, "domain", where),
                },
                id=text_of(shared, "question_id", where),
                question=text,
                asked=asked,
                options=tuple(options),
                answer=letter_of(index_of_letter(answer, len(options)), options, where, answer),
                category=text_of(shared, "task_type", where),
                source=where,
            )


def _subtitle(folder: Folder, name: str) -> str:
    file = folder.subtitles.get(name)
    if file is None:
        return "No subtitles available"
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    lines = [line for each in text.splitlines() if (line := each.strip())]
    # A number before a subtitle's times is its index; any other number is spoken.
    said = (
        line
        for line, after in zip(lines, [*lines[1:], ""])
        if "-->" not in line and not (line.isdecimal() and "-->" in after)
    )
    return "\n".join(_FONT.sub("", line) for line in said)


def nextqa(folder: Folder) -> Iterator[Item]:
    """NExT-QA, multiple choice."""
    mapping = folder.optional("**/map_vid_vidorID.json")
    places = _mapping(mapping) if mapping else {}
    patterns = ("**/MC/test-*.parquet", "**/mc*.csv", "**/test.csv", "**/test-*.parquet", "**/val.csv")
    for where, row in folder.rows(*patterns):
        video = text_of(row, "video", where)
        options = [text_of(row, f"a{i}", where) for i in range(5)]
        question = text_of(row, "question", where)
        place = row.get("answer")
        kind = str(row.get("type") or "all")
        yield make_item(
            folder.video(*([f"{places[video]}.mp4"] if video in places else []), video),
            groups={"kind": {"C": "causal", "T": "temporal", "D": "descriptive"}.get(kind[0], kind)},
            id=f"{video}_{row.get('qid', where)}",
            question=question,
            asked="\n".join((question, *lettered(options), _LETTER)),
            options=tuple(options),
            answer=letter_of(index_of(place, len(options)), options, where, place),
            category=NEXTQA_TYPES.get(kind, kind),
            source=where,
        )


def mvbench(folder: Folder) -> Iterator[Item]:
    """MVBench: one file per task; a row may name seconds, to which folders of segments are already cut."""
    for file in folder.files("json/*.json", "**/json/*.json"):
        task = file.stem
        home = _MVBENCH_HOMES.get(task)
        for where, row in objects_of(file):
            options = _options(row, "candidates", where)
            answer, question = text_of(row, "answer", where), text_of(row, "question", where)
            place = options.index(answer) if answer in options else None
            labelled = lettered(options, "({}) {}")
            name, cut = text_of(row, "video", where), cut_of(row, where)
            found, trouble = folder.video(name, cut=cut, home=home)
            if found is not None and "segment" in str(Path(found.path).relative_to(folder.path)):
                found = replace(found, cut=Cut())
            elif found is not None and found.frames:
                found = replace(found, cut=replace(cut, fps=_MVBENCH_FPS))
            yield make_item(
                (found, trouble),
                id=f"{task}:{where.rpartition(':')[2]}",
                question=question,
                asked="\n".join((f"Question:{question}", "Option:", *labelled, "Only give the best option.")),
                options=tuple(options),
                answer=letter_of(place, options, where, answer),
                category=task.replace("_", " "),
                source=where,
            )


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(file))
    except ValueError as error:
        raise UsageError(f"{file}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file}: expected one JSON object")
    return found


def _options(row: dict[str, Any], key: str, where: str) -> list[str]:
    value: Any = row.get(key)
    listed = isinstance(value, list) and 2 <= len(value) <= MAX_OPTIONS
    if listed and all(isinstance(option, (str, int, float)) for option in value):
        return [str(option).strip() for option in value]
    raise UsageError(
        f"{where}: expected {key!r} to list the options, got {value!r:.60}; is this the benchmark named?"
    )
