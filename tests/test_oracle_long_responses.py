"""Long responses: what a judge is shown of them, and that cutting never makes two of them equal."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import RankRequest
from rlaif_fast.oracle.judge import Judge, JudgeOptions, Outcome
from rlaif_fast.oracle.protocols import MalformedVerdict, parse_listwise, parse_pairwise, parse_pointwise
from rlaif_fast.oracle.protocols import answers_block as block
from rlaif_fast.oracle.untrusted import show_responses

REASONING = "First I look at the frames. " * 200  # 5,600 characters


class Counting(Judge):
    """Puts the texts that hold "right" first, and counts what it was asked."""

    def __init__(self, **options):
        super().__init__(JudgeOptions(**options))
        self.showings = []

    def run_all(self, showings):
        self.showings += showings
        return [
            Outcome(tuple(0 if "right" in (text.answer or text) else 1 for text in showing.texts))
            for showing in showings
        ]


@pytest.mark.parametrize(
    "responses",
    [
        (REASONING + "So it is wrong.", REASONING + "So it is right."),
        ("wrong " + REASONING, "right " + REASONING),
        (REASONING + "wrong" + REASONING, REASONING + "right" + REASONING),
        (REASONING * 20 + "wrong" + REASONING, REASONING * 20 + "right" + REASONING),
        ("a" * 2001 + " wrong", "a" * 2001 + " right"),
        (REASONING + "right" + "!" * 3000, REASONING + "wrong" + "!" * 3000),
    ],
)
@pytest.mark.parametrize("max_response_chars", [20, 50, 2000])
def test_texts_that_differ_are_asked_about(responses, max_response_chars):
    judge = Counting(max_response_chars=max_response_chars)
    [ranking] = judge.rank([RankRequest("r", "?", responses)])
    assert len(judge.showings) == 4
    assert len(set(judge.showings[0].texts)) == 2
    assert sorted(ranking.ranks) == [0, 1]
    assert responses[ranking.ranks.index(0)].count("right") == 1


def test_equal_texts_tie_without_a_question():
    judge = Counting()
    [ranking] = judge.rank([RankRequest("r", "?", (REASONING, REASONING + " "))])
    assert ranking.ranks == (0, 0)
    assert judge.showings == []


def test_the_end_is_shown():
    [text, _], _ = show_responses([REASONING + "The answer is B.", "short"], 300)
    assert text.startswith("First I look")
    assert text.endswith("The answer is B.")
    assert len(text) < 320


@given(st.lists(st.text(alphabet="ab ", max_size=30), min_size=2, max_size=5), st.integers(1, 8))
def test_shown_texts_are_equal_where_the_responses_are(responses, cap):
    shown, places = show_responses(responses, cap)
    clean = [" ".join(response.split()) for response in responses]
    for i, first in enumerate(clean):
        for j, second in enumerate(clean):
            assert (shown[places[i]] == shown[places[j]]) == (first == second)


def test_the_declared_answer_is_shown_beside_the_reasoning():
    judge = Counting(extract=r"<answer>(.*?)</answer>")
    responses = (
        f"{REASONING}right<answer>wrong</answer>",
        f"{REASONING}wrong<answer>right</answer>",
        "none right",
    )
    [ranking] = judge.rank([RankRequest("r", "?", responses)])
    assert ranking.ranks == (1, 0, 0)
    shown = [
        json.loads(line)
        for line in block([("K7Q", text) for text in judge.showings[0].texts]).split("\n")[1:-1]
    ]
    assert [item.get("answer") for item in shown] == ["wrong", "right", None]
    assert all(item["text"] for item in shown)
    assert "extract" in judge.identity


@pytest.mark.parametrize("extract", ["(", "answer", "(?P<a>", "[", "*"])
def test_an_extract_that_finds_nothing_is_refused(extract):
    with pytest.raises(UsageError, match="extract"):
        JudgeOptions(extract=extract)


BODY = '{"better": "K7Q"}'


@pytest.mark.parametrize(
    "reply",
    [
        f"</think>{BODY}",
        f"I compare them.\n</think>\n\n{BODY}",
        f"<think>K7Q is {{right}}</think>{BODY}",
        f"a</think>b</think>{BODY}",
        f"hm</THINK>\n```JSON\n{BODY}\n```",
        f"hm</thinking> {BODY}",
        f"```json\n{BODY}\n```",
        f"```JSON\n{BODY}\n```",
        f"```Json {BODY} ```",
        f"```\n{BODY}\n```\n",
        f"~~~json\n{BODY}\n~~~",
        f"\n```json\r\n{BODY}\r\n```",
        f"```json5\n{BODY}```",
    ],
)
def test_a_reply_behind_thinking_or_in_a_fence_is_the_reply(reply):
    assert parse_pairwise(reply, "K7Q", "B2D") == 1


@pytest.mark.parametrize(
    "reply",
    [
        f"<think>{BODY}",
        f"{BODY}</think>",
        f"```json\n{BODY}\n``` done",
        f"```json\n{BODY}\n```\n```json\n{BODY}\n```",
        "```json\n```",
        "``````",
        f"best: ```json\n{BODY}\n```",
    ],
)
def test_nothing_else_is_fished_out(reply):
    with pytest.raises(MalformedVerdict):
        parse_pairwise(reply, "K7Q", "B2D")


HOSTILE = [
    "```" + "\n" * 200_000,
    "```json\n" * 50_000,
    "```json\n" + " \n" * 100_000 + "``",
    "</think>" * 50_000,
    "<think>" * 50_000,
    " " * 400_000 + "`",
    "[" * 300_000,
    '{"score": ' + "9" * 5000 + "}",
    '{"score": 1e999}',
    '{"score": -1}',
]


@pytest.mark.parametrize("reply", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_replies_are_refused_in_time(reply):
    start = time.perf_counter()
    with pytest.raises(MalformedVerdict):
        parse_pointwise(reply)
    with pytest.raises(MalformedVerdict):
        parse_listwise(reply, ("K7Q", "B2D"))
    assert time.perf_counter() - start < 5.0
