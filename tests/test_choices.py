"""What a careful reader takes a reply to a multiple-choice question for: a table, and what no reply may do."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_fast.data.schema import index_of_letter, option_letters
from rlaif_fast.oracle import RankRequest, ReferenceOracle
from rlaif_fast.oracle.choices import parse_choice

TABLE = json.loads((Path(__file__).parent / "data" / "choice_replies.json").read_text(encoding="utf-8"))
REPLIES = [
    pytest.param(reply, group["options"], read, id=f"{group['theme']}-{number}")
    for group in TABLE
    for number, (reply, read) in enumerate(group["replies"])
]


def test_the_table_is_large():
    assert len(REPLIES) >= 150
    assert len({param.values[0] for param in REPLIES}) >= 150


@pytest.mark.parametrize(("reply", "options", "read"), REPLIES)
def test_a_reply_is_read_as_a_careful_reader_reads_it(reply, options, read):
    found = parse_choice(reply, options)
    letter = None if found is None else option_letters(len(options))[found]
    assert letter == read


def test_replies_that_were_misread_earn_what_they_pick():
    oracle = ReferenceOracle()
    replies = (
        "Answer: **B**",
        r"\boxed{B}",
        "<answer>B</answer>",
        "B, because...",
        "Not A. The answer is B.",
    )
    group = RankRequest(
        id="1", question="?", responses=(*replies, "A. is wrong; the answer is B", "Answer: A red ball"),
        options=("blue", "a red ball"), reference="B",
    )  # fmt: skip
    assert oracle.rank([group])[0].scores == (1.0,) * 7


@pytest.mark.parametrize("count", [2, 26, 27, 60, 702])
def test_labels_and_places_are_inverse(count):
    letters = option_letters(count)
    assert len(set(letters)) == count
    assert [index_of_letter(letter, count) for letter in letters] == list(range(count))
    assert index_of_letter(option_letters(count + 1)[-1], count) is None


@given(st.text(max_size=200))
def test_any_reply_is_read(reply):
    found = parse_choice(reply, ["a dog", "a cat", "a bird"])
    assert found is None or found in range(3)


@pytest.mark.parametrize(
    "unit", ["the answer is ", "A, ", "not A or ", "option ", "is ", " ", "**", "B. a cat ", "\\boxed{"]
)
def test_a_long_reply_is_read_in_time(unit):
    start = time.perf_counter()
    parse_choice(unit * (8000 // len(unit)), ["a dog", "a cat"])
    assert time.perf_counter() - start < 2.0
