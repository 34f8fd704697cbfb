"""Rows as published datasets and other trainers write them."""

from functools import partial

import pytest
from published_rows import PUBLISHED, media_folder, one, write_rows

from rlaif_fast.data import read_examples


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return media_folder(tmp_path_factory.mktemp("media"))


@pytest.fixture
def write(tmp_path):
    return partial(write_rows, tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_formats(name, write, media):
    row, (question, answer, videos, images, options, category) = PUBLISHED[name]
    example = one(write, media, row)
    assert (example.question, example.answer, example.options) == (question, answer, options)
    assert example.videos == tuple(str(media / video) for video in videos)
    assert example.images == tuple(str(media / image) for image in images)
    assert example.category == category
    assert example.source.endswith("data.jsonl:1")


def test_the_rest_of_a_row_is_metadata(write, media):
    row, _ = PUBLISHED["Video-R1, choice"]
    assert one(write, media, row).metadata == {"process": "", "data_source": "LLaVA-Video-178K"}
    row, _ = PUBLISHED["native"]
    example = one(write, media, {**row, "license": "CC0"})
    assert example.metadata == {"license": "CC0", "world": 3} and example.id == "x1"
    assert one(write, media, PUBLISHED["ms-swift, messages"][0]).system == "You are helpful."
    assert one(write, media, PUBLISHED["ms-swift, query"][0]).system == "Be short."


def test_every_turn_of_a_conversation_is_a_question(write, media):
    turns = [("human", "<image>\nWho?"), ("gpt", "A man."), ("human", "Where?"), ("gpt", "At home.")]
    row = {"id": 7, "video": "a.mp4", "conversations": [{"from": f, "value": v} for f, v in turns]}
    examples = read_examples(write(row), media_root=media)
    assert [(e.id, e.question, e.answer) for e in examples] == [
        ("7#1", "Who?", "A man."),
        ("7#2", "Where?", "At home."),
    ]
    assert all(e.videos == (str(media / "a.mp4"),) for e in examples)
