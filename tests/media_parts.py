"""Rows of media to write and load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("PIL")
from PIL import Image
from transformers import AutoTokenizer

from rlaif_fast.data import read_examples
from rlaif_fast.policy.tiny import make_tiny
from rlaif_fast.prompts.encoder import PromptEncoder
from rlaif_fast.video import ClipStore, FrameSampling, PatchSpec, PixelBudget
from rlaif_fast.video.testing import counter_frames, read_counter, write_video


def media_folder(folder: Path) -> Path:
    """Fill a folder with two films, and with pictures of the same frames."""
    write_video(folder / "a.mp4", counter_frames(40), fps=10)
    write_video(folder / "b.mp4", counter_frames(40), fps=10)
    pictures = list(counter_frames(12))
    for number in range(12):
        frame = Image.fromarray(pictures[number])
        for name in (f"frames/f{number}.png", f"p{number}.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            frame.save(folder / name)
    return folder


def write_rows(folder: Path, *rows: dict) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_encoder(folder: Path) -> PromptEncoder:
    words = {"before", "after", "what", "then", "end"}
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(folder, words, family="qwen3_vl", seed=0))
    spec = PatchSpec(16)
    return PromptEncoder(tokenizer, "qwen2_5_vl", spec, PixelBudget(spec.factor, 1024, 64 * 64))


def example_of(write, media, row):
    [example] = read_examples(write({"question": "what?", "answer": "x", **row}), media_root=media)
    return example


def counters(clip):
    return [read_counter(frame) for frame in clip.frames]


def load(example, **options):
    with ClipStore(FrameSampling(**options), isolate=False) as store:
        return [store.load(medium) for medium in example.seen]
