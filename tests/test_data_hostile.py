"""No row ends a run: what is wrong is told with its file and line, and skipped on request."""

from __future__ import annotations

import json
import time

import pytest
from fuzzing import counts, fuzz
from hypothesis import strategies as st

from rlaif_fast.data import read_examples, read_report
from rlaif_fast.data.__main__ import main
from rlaif_fast.data.forms import fault_of
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import RankRequest, ReferenceOracle

NATIVE = '"question": "what?", "answer": "x"'


def nested(depth):
    return "[" * depth + "]" * depth


def row(rest=""):
    return "{" + NATIVE + (f", {rest}" if rest else "") + "}"


HOSTILE = {
    "surrogate in the question": ('{"question": "a\\ud800", "answer": "x"}', "unpaired surrogate"),
    "surrogate in the answer": ('{"question": "a", "answer": "\\udfff"}', "unpaired surrogate"),
    "surrogate in a key": (row('"\\ud83d": 1'), "unpaired surrogate"),
    "surrogate in metadata": (row('"metadata": {"a": [{"b": "\\udc00"}]}'), "unpaired surrogate"),
    "surrogate in a path": (row('"video": "\\ud800.mp4"'), "unpaired surrogate"),
    "surrogate in an option": (row('"options": ["x", "\\ud800"]'), "unpaired surrogate"),
    "form of a wrong type": (row('"metadata": {"form": 3}'), "form: expected a regular expression, got int"),
    "form that is a list": (row('"metadata": {"form": ["x"]}'), "got list"),
    "form that is true": (row('"form": true'), "got bool"),
    "form that is none": (row('"metadata": {"form": "(x"}'), "not a regular expression"),
    "form that does not match": (row('"metadata": {"form": "y"}'), "does not match it"),
    "evil form": (row('"metadata": {"form": "(x+)+"}'), "repeat"),
    "evil form of alternatives": (row('"metadata": {"form": "(x|x)*"}'), "repeat"),
    "evil form of classes": (row('"metadata": {"form": "([a-z]*)*x"}'), "repeat"),
    "evil form with a bound": (row('"metadata": {"form": "(x{0,90}){0,90}"}'), "repeat"),
    "evil form of wide repeats": (row('"metadata": {"form": ".*.*.*.*x"}'), "repeats of almost anything"),
    "deep metadata": (row(f'"metadata": {{"a": {nested(900)}}}'), "nested more than"),
    "deep row": (nested(50_000), "nested more than|expected a JSON object"),
    "deep objects": ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested more than"),
    "many marks": (
        '{"question": "' + "<video>" * 4000 + '", "answer": "x"}',
        "4000 <video> or <image> tags, but 0",
    ),
    "many unclosed marks": (
        '{"question": "' + "<video>a" * 40000 + '", "answer": "x"}',
        "40000 <video> or <image> tags",
    ),
    "NUL in a path": (row('"video": "a\\u0000.mp4"'), "no path that a file can have"),
    "long path": (row(f'"video": "{"a" * 9000}"'), "cannot be read: File name too long"),
    "long path of a picture": (row(f'"image": "{"a" * 9000}"'), "cannot be read: File name too long"),
    "long name of a video": (row(f'"videoID": "{"a" * 9000}"'), "cannot be read: File name too long"),
    "long number": (row(f'"n": {"9" * 5000}'), "not JSON that can be read"),
    "long number as the answer": (
        '{"question": "a", "answer": ' + "9" * 5000 + "}",
        "not JSON that can be read",
    ),
    "key twice": ('{"question": "a", "question": "b", "answer": "x"}', "'question' stands twice"),
    "key twice inside": (row('"metadata": {"a": 1, "a": 2}'), "'a' stands twice"),
    "NaN": (row('"metadata": {"a": NaN}'), "NaN"),
    "infinity": (row('"a": -Infinity'), "Infinity"),
    "a number beyond all": (row('"a": 1e999'), "inf is no number"),
    "an id that is an object": (row('"id": {"a": 1}'), "id: expected a text"),
    "a category that is a list": (row('"category": [1]'), "category: expected a text"),
    "a sender that is a list": (
        '{"conversations": [{"from": ["human"], "value": "?"}]}',
        "unknown 'from' \\['human'\\]",
    ),
    "a role that is an object": (
        '{"messages": [{"role": {"a": 1}, "content": "?"}]}',
        "unknown role {'a': 1}",
    ),
    "options of objects": (row('"options": [{"a": 1}, {"b": 2}]'), "options: expected a list of texts"),
    "1,000 options": (row('"options": ' + json.dumps([f"o{i}" for i in range(1000)])), "at most 702"),
    "control characters": (row('"video": "\\u001b[2Ja.mp4"'), r"\\x1b\[2Ja\.mp4 does not exist"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_row_that_would_end_a_run_is_told_and_skipped(tmp_path, name, capsys):
    text, words = HOSTILE[name]
    path = tmp_path / "data.jsonl"
    path.write_text(row() + "\n" + text + "\n" + row() + "\n")
    start = time.perf_counter()
    with pytest.raises(UsageError, match=rf"(?s)data\.jsonl:2: .*({words})"):
        read_examples(path)
    assert len(read_examples(path, on_error="skip")) == 2
    assert main(["check", str(path), "--skip_decode"]) == 2
    assert time.perf_counter() - start < 20.0
    assert "data.jsonl:2" in capsys.readouterr().err


@pytest.mark.parametrize("count", [26, 27, 30, 60])
def test_many_options_are_read_and_scored(tmp_path, count):
    from rlaif_fast.data.schema import option_letters

    letters = option_letters(count)
    path = tmp_path / "data.jsonl"
    options = [f"thing {i}" for i in range(count)]
    labelled = [f"{letter}. {option}" for letter, option in zip(letters, options)]
    answers = [letters[-1], f"({letters[-1]}) thing {count - 1}", f"thing {count - 1}"]
    path.write_text(
        "".join(
            json.dumps({"question": "?", "options": o, "answer": a}) + "\n"
            for o in (options, labelled)
            for a in answers
        )
    )
    for example in read_examples(path):
        assert (example.options, example.answer) == (tuple(options), letters[-1])
        request = RankRequest(
            "1", "?", (letters[-1], letters[0]), options=example.options, reference=example.answer
        )
        assert ReferenceOracle().rank([request])[0].scores == (1.0, 0.2)


@pytest.mark.parametrize(
    "form",
    [
        r"the (red|green|blue) (square|circle) moves (left|right)\.",
        r"(\w+) (\w+) and (\w+)",
        r"there (?:is|are) (\d+) objects?",
        r"first (.*) then (.*)",
        r"(?:a |an |the )?(cat|dog)",
        r"[^.]{1,200}\.",
    ],
)
def test_plain_forms_are_kept(form):
    assert fault_of(form) is None


@pytest.mark.parametrize(
    "form", [r"first (.*) then (.*)", r"(\w+) (\w+) and (\w+)", r"\w*\d*\s*x", r"[^.]{1,200}\."]
)
def test_kept_forms_match_in_bounded_time(form):
    start = time.perf_counter()
    group = RankRequest(
        "1",
        "?",
        ("first " * 5000, "a " * 1990, "9" * 3990, "ab" * 3990),
        reference="x",
        metadata={"form": form},
    )
    ReferenceOracle().rank([group])
    assert time.perf_counter() - start < 5.0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
words = st.sampled_from(
    [
        "what?",
        "A",
        "(B) blue",
        "A. red",
        "<video>",
        "<image>x",
        "<answer>B</answer>",
        "<think>",
        "a.mp4",
        "video",
        "user",
        "\x00",
        "\ud800",
        "x\nA. a\nB. b",
    ]
)
_KEYS = """
question answer options video videos image images id category metadata form system problem solution path data_type
process conversations messages prompt completion query response history from value role content type text fps nframes
video_start a0 a1 max_pixels reward_model ground_truth video_id videoID video_name category_id bytes url
"""
_keys = st.sampled_from(_KEYS.split())
_rows = st.recursive(
    words | json_values,
    lambda inner: st.dictionaries(_keys, inner, max_size=5) | st.lists(inner, max_size=3),
    max_leaves=16,
)
_valid = st.fixed_dictionaries(
    {"question": words, "answer": words | json_values},
    optional={"options": _rows, "metadata": _rows, "video": _rows},
)


@pytest.mark.parametrize("cases", counts(800, 20_000))
def test_any_row_is_read_or_told(tmp_path, cases):
    path = tmp_path / "data.jsonl"

    def check(value):
        found, damage = value
        text = json.dumps(found)
        if damage is not None:
            at, junk = damage
            text = text[: at % (len(text) + 1)] + junk + text[at % (len(text) + 1) :]
        path.write_text(text.replace("\n", " ") + "\n", encoding="utf-8", errors="surrogatepass")
        report = read_report(path, require_answer=False)
        assert report.examples or report.errors or report.rows == 0
        for error in report.errors:
            assert error.startswith(f"{path}:1: ")
            assert "cannot be read (" not in error  # nothing that was not foreseen
            error.encode("utf-8")
        for example in report.examples:
            json.dumps([example.question, example.answer, dict(example.metadata)]).encode()
            assert len(example.layout) in (0, len(example.seen) + 1)
            responses = ("A", "B", "x")
            request = RankRequest(
                "1",
                example.question,
                responses,
                reference=example.answer,
                options=example.options,
                metadata=example.metadata,
            )
            assert len(ReferenceOracle().rank([request])) == 1

    damage = st.none() | st.tuples(
        st.integers(0, 500),
        st.sampled_from(['"', "{", "]", "NaN", "1e999", "\\ud800", "9" * 5000, ",", "\x00"]),
    )
    fuzz(st.tuples(_rows | _valid | st.dictionaries(_keys, _rows, max_size=8), damage), check, cases, "rows")
