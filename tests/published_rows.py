"""Rows as datasets are published and other trainers write them, and what has to come of each."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from rlaif_fast.data import read_examples
from rlaif_fast.data.synthetic.encode import encode_video


def media_folder(folder: Path) -> Path:
    """Fill a folder with two videos and an image."""
    (folder / "empty").mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    for name in ("a.mp4", "b.mp4"):
        encode_video(folder / name, frames)
    Image.fromarray(frames[0]).save(folder / "c.png")
    return folder


def write_rows(folder: Path, *rows: dict | str, name: str = "data.jsonl") -> Path:
    """Write rows, or raw lines, into a file."""
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def one(write, media, row, **options):
    (example,) = read_examples(write(row), media_root=media, **options)
    return example


NATIVE = {"video": "a.mp4", "question": "what moves?", "answer": "the cat."}


# The row as published, and what has to come of it: question, answer, videos, images, options, category.
PUBLISHED = {
    "native": (
        {**NATIVE, "category": "object reasoning", "id": "x1", "metadata": {"world": 3}},
        ("what moves?", "the cat.", ["a.mp4"], [], (), "object reasoning"),
    ),
    "native, several media": (
        {"videos": ["a.mp4", "b.mp4"], "images": ["c.png"], "question": "which?", "answer": "a"},
        ("which?", "a", ["a.mp4", "b.mp4"], ["c.png"], (), "all"),
    ),
    "native, options": (
        {**NATIVE, "options": ["a dog", "the cat."], "answer": "B"},
        ("what moves?", "B", ["a.mp4"], [], ("a dog", "the cat."), "all"),
    ),
    "Video-R1, choice": (
        {
            "problem_id": 2,
            "problem": "What appears on the screen in Russian during the missile's ascent?",
            "data_type": "video",
            "problem_type": "multiple choice",
            "options": ["A. A YouTube subscription prompt", "B. A successful launch message", "C. A date"],
            "process": "",
            "solution": "<answer>A</answer>",
            "path": "./a.mp4",
            "data_source": "LLaVA-Video-178K",
        },
        (
            "What appears on the screen in Russian during the missile's ascent?",
            "A",
            ["a.mp4"],
            [],
            ("A YouTube subscription prompt", "A successful launch message", "A date"),
            "multiple choice",
        ),
    ),
    "Video-R1, image": (
        {
            "problem_id": 9,
            "problem": "How large is the angle?",
            "data_type": "image",
            "problem_type": "numerical",
            "options": [],
            "solution": "<answer>30</answer>",
            "path": "c.png",
        },
        ("How large is the angle?", "30", [], ["c.png"], (), "numerical"),
    ),
    "LLaVA, open": (
        {
            "id": "ytb_7nRmsEw7nsE",
            "video": "a.mp4",
            "data_source": "0_30_s_youtube_v0_1",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat does the man do?"},
                {"from": "gpt", "value": "The man walks."},
            ],
        },
        ("What does the man do?", "The man walks.", ["a.mp4"], [], (), "all"),
    ),
    "LLaVA, choice": (
        {
            "id": "v_1",
            "video": "a.mp4",
            "conversations": [
                {
                    "from": "human",
                    "value": "<image>\nWhich color is it?\nA. Red.\nB. Blue.\nC. Green.\n"
                    "Please provide your answer by stating the letter followed by the full option.",
                },
                {"from": "gpt", "value": "B. Blue."},
            ],
        },
        (
            "Which color is it?\nPlease provide your answer by stating the letter followed by the full option.",
            "B",
            ["a.mp4"],
            [],
            ("Red.", "Blue.", "Green."),
            "all",
        ),
    ),
    "ms-swift, messages": (
        {
            "messages": [
                {"role": "system", "content": "You are helpful."},
                {"role": "user", "content": "<video>What is in the video?"},
                {"role": "assistant", "content": "A cat."},
            ],
            "videos": ["a.mp4"],
        },
        ("What is in the video?", "A cat.", ["a.mp4"], [], (), "all"),
    ),
    "ms-swift, query": (
        {
            "system": "Be short.",
            "query": "<image><video>What differs?",
            "response": "Colors.",
            "images": ["c.png"],
        }
        | {"videos": ["a.mp4"]},
        ("What differs?", "Colors.", ["a.mp4"], ["c.png"], (), "all"),
    ),
    "ms-swift, path in the tag": (
        {"query": "<video>a.mp4</video>What is it?", "response": "A dog."},
        ("What is it?", "A dog.", ["a.mp4"], [], (), "all"),
    ),
    "TRL, prompt and completion": (
        {
            "prompt": [{"role": "user", "content": "What happens?"}],
            "completion": [{"role": "assistant", "content": "It falls."}],
            "images": ["c.png"],
        },
        ("What happens?", "It falls.", [], ["c.png"], (), "all"),
    ),
    "TRL, content lists": (
        {
            "prompt": [
                {"role": "system", "content": [{"type": "text", "text": "Think."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": "a.mp4", "text": None},
                        {"type": "text", "text": "What happens?", "video": None},
                    ],
                },
            ],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "It falls."}]}],
        },
        ("What happens?", "It falls.", ["a.mp4"], [], (), "all"),
    ),
    "TRL, placeholders": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
            ],
            "images": [{"path": "c.png", "bytes": None}],
        },
        ("What is it?", "A dog.", [], ["c.png"], (), "all"),
    ),
    "TRL, plain prompt with a solution": (
        {"prompt": "How many?", "solution": "<think>one, two</think><answer>2</answer>", "video": "a.mp4"},
        ("How many?", "2", ["a.mp4"], [], (), "all"),
    ),
    "OpenAI, video_url": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": "file://a.mp4"}},
                        {"type": "text", "text": "Who?"},
                    ],
                },
                {"role": "assistant", "content": "Me."},
            ],
        },
        ("Who?", "Me.", ["a.mp4"], [], (), "all"),
    ),
}
