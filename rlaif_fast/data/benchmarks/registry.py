"""The benchmarks by name, and how to read one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

from rlaif_fast.data.benchmarks.base import Benchmark, Folder, Item
from rlaif_fast.data.benchmarks.multiple_choice import mvbench, nextqa, videomme
from rlaif_fast.data.benchmarks.open_ended import activitynet_qa, jsonl, msrvtt_qa, msvd_qa
from rlaif_fast.errors import UsageError

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("videomme", "task type", videomme, subtitles=True),
        Benchmark("msvd_qa", "question word", msvd_qa),
        Benchmark("msrvtt_qa", "question word", msrvtt_qa),
        Benchmark("activitynet_qa", "question type", activitynet_qa),
        Benchmark("nextqa", "question type", nextqa),
        Benchmark("mvbench", "task", mvbench),
        Benchmark("jsonl", "category", jsonl, in_parts=True),
    )
}


def read_benchmark(
    name: str,
    folder: str | Path,
    *,
    subtitles: bool = False,
    limit: int | None = None,
    scored: Literal["answer", "whole"] = "answer",
) -> list[Item]:
    """The items of a benchmark.

    Args:
        name: One of `BENCHMARKS`.
        folder: Where its files are.
        subtitles: Show what is said in the video, for a benchmark that ships it.
        limit: Read only the first items.
        scored: Which part of an answer counts if it may have parts, as for `read_examples`.

    Raises:
        UsageError: The name is unknown, the benchmark has no subtitles, or a file is missing or has another layout.
    """
    if name not in BENCHMARKS:
        raise UsageError(f"benchmark: expected one of {', '.join(BENCHMARKS)}, got {name!r}")
    benchmark = BENCHMARKS[name]
    if subtitles and not benchmark.subtitles:
        raise UsageError(f"subtitles: {name} has none; leave it out")
    more: dict[str, Any] = {"subtitles": subtitles} if benchmark.subtitles else {}
    more |= {"scored": scored} if benchmark.in_parts else {}
    items = list(itertools.islice(benchmark.read(Folder(folder), **more), limit))
    if not items:
        raise UsageError(f"data: {folder} holds no question of {name}")
    seen: set[str] = set()
    for item in items:
        if item.example.id in seen:
            raise UsageError(f"{item.example.source}: the id {item.example.id!r} stands twice in {folder}")
        seen.add(item.example.id)
    return items
