"""Rows of media to write and load."""

from __future__ import annotations

import pytest

pytest.importorskip("PIL")
from rlaif_fast.data import read_examples
from rlaif_fast.video import ClipStore, FrameSampling
from rlaif_fast.video.testing import read_counter


def example_of(write, media, row):
    [example] = read_examples(write({"question": "what?", "answer": "x", **row}), media_root=media)
    return example


def counters(clip):
    return [read_counter(frame) for frame in clip.frames]


def load(example, **options):
    with ClipStore(FrameSampling(**options), isolate=False) as store:
        return [store.load(medium) for medium in example.seen]
