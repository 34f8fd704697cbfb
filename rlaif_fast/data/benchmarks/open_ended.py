"""Benchmarks of open questions: MSVD-QA, MSRVTT-QA, ActivityNet-QA; and files of our own formats."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rlaif_fast.data.benchmarks.base import Folder, Item, index_of, make_item, text_of
from rlaif_fast.data.identity import files_of
from rlaif_fast.data.published import youtube_names
from rlaif_fast.data.reader import read_report
from rlaif_fast.data.schema import Example
from rlaif_fast.data.sources import answers_of, read_text
from rlaif_fast.errors import UsageError
from rlaif_fast.video.refs import MediaRef

logger = logging.getLogger(__name__)

_TABLES = ("*.jsonl", "*.json", "*.parquet", "*.csv", "*.tsv")
# The evaluation packs of Video-ChatGPT and Video-LLaVA ship test_q.json with test_a.json.
_TEST = ("**/test_qa.json", "**/test_q.json", "**/test-*.parquet", "**/*test*.json", "**/*test*.jsonl")
_BRIEFLY = " Answer the question using a single word or phrase."  # LLaVA's, as lmms-eval asks
_ACTIVITYNET_TYPES = (
    "motion",
    "spatial relation",
    "temporal relation",
    "yes/no",
    "color",
    "object",
    "location",
    "number",
    "other",
)


def msvd_qa(folder: Folder) -> Iterator[Item]:
    """MSVD-QA: `vid12` is the twelfth line of `youtube_mapping.txt`, which names the clip's file."""
    mapping = folder.optional("**/youtube_mapping.txt")
    names = youtube_names(read_text(mapping)) if mapping else {}
    for where, row in folder.rows(*_TEST):
        number = text_of(row, "video_name" if "video_name" in row else "video_id", where)
        name = f"vid{number}" if number.isdecimal() else number
        yield _brief(folder, [*([names[name]] if name in names else []), name], row, where)


def msrvtt_qa(folder: Folder) -> Iterator[Item]:
    """MSRVTT-QA."""
    for where, row in folder.rows(*_TEST):
        number = text_of(row, "video_name" if "video_name" in row else "video_id", where)
        yield _brief(folder, [f"video{number}" if number.isdecimal() else number], row, where)


def activitynet_qa(folder: Folder) -> Iterator[Item]:
    """ActivityNet-QA; the answers are in a separate file."""
    for where, row in folder.rows("**/test_q.json", "**/test-*.parquet", "**/*test*.json"):
        kind = index_of(row.get("type"), len(_ACTIVITYNET_TYPES))
        name = text_of(row, "video_name", where)
        category = "all" if kind is None else _ACTIVITYNET_TYPES[kind]
        question = text_of(row, "question", where).capitalize().rstrip("?") + "?"
        yield _brief(folder, [f"v_{name}", name], {**row, "question": question}, where, category)


def _brief(folder: Folder, names: list[str], row: dict, where: str, category: str | None = None) -> Item:
    question = text_of(row, "question", where)
    word = question.split()[0].casefold().rstrip("?")
    identity = row.get("question_id", row.get("id"))
    return make_item(
        folder.video(*names),
        id=where if identity is None else str(identity),
        question=question,
        asked=question + _BRIEFLY,
        answer=text_of(row, "answer", where),
        category=category or (word if word in ("what", "who", "how", "when", "where") else "other"),
        source=where,
    )


def jsonl(folder: Folder, scored: Literal["answer", "whole"]) -> Iterator[Item]:
    """Files of any format of `data.converters`; a row that cannot be read is refused, a missing video is not.

    Only files of the first of five suffixes that occurs are read; the log names the others. Answers in a separate
    file (`test_a.json` beside `test_q.json`) are read with their questions.
    """
    files = folder.files(*_TABLES)
    beside = {file for pattern in _TABLES for file in folder.matching(pattern)}.difference(files)
    if beside:
        logger.warning(
            "%s: the questions are those of %s; not read: %s",
            folder.path,
            f"*{files[0].suffix}",
            ", ".join(sorted(file.name for file in beside)),
        )
    for file in files:
        if answers_of(file.with_stem(f"{file.stem.removesuffix('_a')}_q")) == file:
            continue
        report = read_report(file, check_files=False, scored=scored)
        if report.errors:
            raise UsageError(report.describe_errors())
        for example in report.examples:
            found = [_find(folder, medium) for medium in example.seen]
            media = tuple(medium for medium, _ in found)
            trouble = next((why for _, why in found if why), "")
            yield Item(example if media == example.seen else _about(example, media), {}, trouble)


def _find(folder: Folder, medium: MediaRef) -> tuple[MediaRef, str]:
    """The medium where its row says, or else the video of that name below the folder; and what is wrong with it."""
    # A name that no file system takes does not exist; Path.exists raises for it.
    gone = [path for path in files_of(medium) if not os.path.exists(path)]  # noqa: PTH110
    if not gone:
        return medium, ""
    other = None if medium.is_image or medium.frames else folder.video(Path(medium.path).name)[0]
    return (medium, f"no video {gone[0]!r}") if other is None else (replace(other, cut=medium.cut), "")


def _about(example: Example, media: tuple[MediaRef, ...]) -> Example:
    videos, images = (tuple(m.path for m in media if m.is_image is still) for still in (False, True))
    return replace(example, media=media, videos=videos, images=images)
