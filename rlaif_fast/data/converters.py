"""Turns rows of the formats in use into the fields of an `Example`; the row's keys decide which.

| format                | recognised by   | published by                                      |
|-----------------------|-----------------|---------------------------------------------------|
| native                | `question`      | this project                                      |
| Video-R1              | `problem`       | Video-R1-260k, Video-R1-COT-165k                  |
| LLaVA conversations   | `conversations` | LLaVA-Video-178K, ShareGPT                        |
| query and response    | `query`         | ms-swift                                          |
| messages              | `messages`      | ms-swift, TRL, OpenAI                             |
| prompt and completion | `prompt`        | TRL                                               |

`answer`, `options`, `category`, `system`, `id` and `metadata` mean the same in every format.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlaif_fast.data.answers import contradict, settle_options, split_target
from rlaif_fast.data.errors import RowError
from rlaif_fast.data.forms import check_form
from rlaif_fast.data.media_keys import (
    CUT_KEYS,
    MEDIA_KEYS,
    Medium,
    read_medium,
    refuse_idle_cut,
    row_cut,
    row_media,
)
from rlaif_fast.data.published import named_video, unfold

Row = Mapping[str, Any]


@dataclass
class Fields:
    """What a converter found; the fields of `Example` before paths are resolved and names made unique."""

    question: str
    answer: str | None = None
    media: list[Medium] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    category: str | None = None
    id: str | None = None
    system: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    layout: list[str] = field(default_factory=list)
    tags_before: Counter[str] = field(default_factory=Counter)  # in earlier turns, by kind
    target: str | None = None


_ID = ("id", "question_id", "problem_id", "sample_id")
_CATEGORY = ("category", "task_type", "problem_type")
_COMMON = {*_ID, *_CATEGORY, *MEDIA_KEYS, "answer", "options", "metadata", "system"}
TAG = re.compile(r"<(video|image)>(?:([^<]{1,4096})</\1>)?\n?")


def convert(row: Row, scored: str = "answer") -> tuple[str, list[Fields]]:
    """Convert one row.

    Args:
        row: The row.
        scored: Which part of an answer is scored; see `answers.split_target`.

    Returns:
        The name of the format, and one entry for each question the row asks.

    Raises:
        RowError: The row is in no known format, or is wrong.
    """
    row = unfold(row)
    for key, (name, reader) in FORMATS.items():
        if row.get(key) is not None:
            questions = reader(row)
            _give_answer(questions, row)
            return name, [_finish(fields, row, scored) for fields in questions]
    known = [*FORMATS, *sorted(_COMMON)]
    hints = [
        f"{key!r} (did you mean {near[0]!r}?)"
        for key in row
        if (near := difflib.get_close_matches(key, known, 1, 0.75)) and near[0] != key
    ]
    found = ", ".join(hints or map(repr, row)) or "no key"
    raise RowError(f"none of the keys {', '.join(FORMATS)} is there; found {found}")


# Formats


def _native(row: Row) -> list[Fields]:
    return [Fields(_text(row, "question"))]


def _video_r1(row: Row) -> list[Fields]:
    fields = Fields(_text(row, "problem"))
    if row.get("path") is not None:
        kind = "video" if row.get("data_type") is None else row["data_type"]
        if kind not in ("video", "image"):
            raise RowError(f"data_type: expected 'video' or 'image', got {kind!r}")
        fields.media.append(read_medium(row["path"], kind, "path", row_cut(row, kind)))
    return [fields]


def _query_response(row: Row) -> list[Fields]:
    if row.get("history"):
        raise RowError("history: earlier turns cannot be carried along; give one question a row")
    return [Fields(_text(row, "query"), _optional_text(row, "response"))]


def _llava(row: Row) -> list[Fields]:
    roles = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    }
    turns = []
    for turn in _list(row, "conversations"):
        if not isinstance(turn, Mapping):
            raise RowError(f"conversations: expected objects with 'from' and 'value', got {turn!r:.60}")
        role, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in roles:
            raise RowError(f"conversations: unknown 'from' {role!r:.60}; use 'human' and 'gpt'")
        turns.append({**turn, "role": roles[role], "content": value})
    return _dialogue(turns, "conversations", row)


def _messages(row: Row) -> list[Fields]:
    return _dialogue(_list(row, "messages"), "messages", row)


def _prompt_completion(row: Row) -> list[Fields]:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str):
        return [Fields(_text(row, "prompt"), completion if completion is None else _flat(completion))]
    found = _dialogue(_list(row, "prompt"), "prompt", row)
    if len(found) != 1 or found[0].answer is not None:
        raise RowError("prompt: expected one user message; give one question a row")
    if completion is not None:
        found[0].answer = _flat(completion)
    return found


FORMATS: dict[str, tuple[str, Callable[[Row], list[Fields]]]] = {
    "question": ("native", _native),
    "problem": ("Video-R1", _video_r1),
    "conversations": ("LLaVA conversations", _llava),
    "query": ("query and response", _query_response),
    "messages": ("messages", _messages),
    "prompt": ("prompt and completion", _prompt_completion),
}
_OWN = {*FORMATS, "solution", "completion", "response", "history", "path", "data_type"}
# keys of a turn that change what is learned from it
_UNREAD_IN_TURNS = (
    *("weight", "loss", "loss_scale", "prefix", "tool_calls", "function_call"),
    *("reasoning_content", "reasoning", "thinking"),
)
TEXT_KEYS = _COMMON | _OWN - {"path"}  # any other key that holds a file name names media


def _dialogue(turns: list[Any], key: str, row: Row) -> list[Fields]:
    """One entry for each user turn with the answer after it; all see all media of the dialogue."""
    found: list[Fields] = []
    media: list[Medium] = []
    system = None
    for turn in turns:
        if not isinstance(turn, Mapping) or "role" not in turn:
            raise RowError(f"{key}: expected objects with 'role' and 'content', got {turn!r:.60}")
        role, content = turn["role"], turn.get("content")
        if role == "system":
            if system is not None:
                raise RowError(f"{key}: two system turns; join them into one")
            system = _flat(content)
            if row.get("system") not in (None, system):
                raise RowError(f"{key}: its system turn is not the row's `system`; leave one of the two out")
        elif role == "user":
            if found and found[-1].answer is None:
                raise RowError(f"{key}: two user turns without an answer between them")
            found.append(Fields(_user_text(content, media, row)))
        elif role == "assistant":
            if not found or found[-1].answer is not None:
                raise RowError(f"{key}: an assistant turn without a user turn before it")
            found[-1].answer = _said(turn)
        else:
            raise RowError(f"{key}: unknown role {role!r:.60}; use 'system', 'user' and 'assistant'")
    if not found:
        raise RowError(f"{key}: no user turn")
    counted = [Counter(kind for kind, _ in TAG.findall(fields.question)) for fields in found]
    before: Counter[str] = Counter()
    for fields, own in zip(found, counted):
        fields.media, fields.system, fields.tags_before = list(media), system, before.copy()
        before += own
    return found


def _user_text(content: Any, media: list[Medium], row: Row) -> str:
    """The text of a user turn, with a tag for each medium; the media in its parts are added to `media`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"content: expected a string or a list, got {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            texts.append(_flat([part]))
        elif kind in ("video", "image", "video_url", "image_url"):
            texts.append(f"<{kind[:5]}>")
            if any(part.get(key) is not None for key in (kind, "path", "url")):
                media.append(read_medium(part, kind[:5], kind, row_cut(row, kind[:5])))
            elif any(value is not None for key, value in part.items() if key != "type"):
                # else a placeholder for the next of `videos` or `images`
                raise RowError(f"content: a {kind} without its path, {part!r:.60}")
        else:
            raise RowError(f"content: unknown part {part!r:.60}; use the types 'text', 'video' and 'image'")
    return "\n".join(texts)


def _flat(content: Any) -> str:
    """The text of a string, of a list of text parts, or of a list with one message."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        if len(content) == 1 and "role" in content[0]:
            return _said(content[0])
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "\n".join(texts)  # type: ignore[arg-type]
    raise RowError(f"expected a text, got {content!r:.60}")


def _said(turn: Mapping[str, Any]) -> str:
    """The text of a turn that is learned from."""
    for key in _UNREAD_IN_TURNS:
        if turn.get(key) not in (None, "", [], {}, 1):  # a weight of 1 is the default
            raise RowError(
                f"{key}: of a turn it is not used; leave it out, or write what it says into the text"
            )
    return _flat(turn.get("content"))


def _give_answer(found: list[Fields], row: Row) -> None:
    """Give the last question the answer that the row states outside its turns."""
    for key, beside in (("label", "completion"), ("kto_tag", "messages")):
        if row.get(key) is False and row.get(beside) is not None:
            raise RowError(f"{key}: false marks a response that is not wanted; leave the row out")
    last = found[-1]
    stated = (_optional_text(row, "answer"), last.answer, _optional_text(row, "solution"))
    told, said, solution = (text if text and text.strip() else None for text in stated)
    if told and solution and contradict(told, solution, row.get("options")):
        raise RowError(f"answer: {told!r:.60} is not what `solution` says; leave one of the two out")
    if len(found) > 1:
        if row.get("options"):
            raise RowError(f"options: the row asks {len(found)} questions; give each a row of its own")
        if told and said and told.strip() != said.strip():
            raise RowError(f"answer: the row asks {len(found)} questions that its turns answer; leave it out")
    last.answer = told or said or solution


def _finish(fields: Fields, row: Row, scored: str) -> Fields:
    """Apply the keys that all formats share, and bring options and answer into one form."""
    named = row_media(row)
    if any(first.kind == second.kind for first in named for second in fields.media[:1]):
        kind = fields.media[0].kind
        raise RowError(f"{kind}s: name every {kind} in its part, or all of them in `{kind}s`")
    if not named and not fields.media and (video := named_video(row)) is not None:
        named = [video]
    fields.media += named
    place_media(fields, row)
    if row.get("system") is not None:
        fields.system = _text(row, "system")
    fields.id = id_of(row)
    fields.category = next((_name(row, key) for key in _CATEGORY if row.get(key) not in (None, "")), None)
    process = row.get("process")
    if isinstance(process, str) and process.strip() and fields.answer is not None:  # Video-R1-COT
        fields.answer = f"{process.strip()}\n{fields.answer}"
    fields.answer, fields.target = split_target(fields.answer, scored)
    asked = fields.question
    fields.question, fields.options, fields.answer = settle_options(asked, fields.answer, row.get("options"))
    if fields.layout and fields.question != asked:
        fields.layout[-1] = settle_options(fields.layout[-1], fields.answer, None)[0]
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise RowError(f"metadata: expected an object, got {type(metadata).__name__}")
    rest = {
        key: value
        for key, value in row.items()
        if key not in _COMMON and key not in _OWN and key not in CUT_KEYS and value is not None
    }
    fields.metadata = {**rest, **metadata}
    form = fields.metadata.get("form")
    if form is not None:
        check_form(form, fields.answer)
    return fields


def place_media(fields: Fields, row: Row) -> None:
    """Put the media into the order of the question's <video> and <image> tags, and split the question at them.

    What the row says about its media also applies to those named in a tag. If a row has no picture, <image> means its
    video (LLaVA-Video-178K), and vice versa.
    """
    waiting = {
        kind: [medium for medium in fields.media if medium.kind == kind] for kind in ("video", "image")
    }
    stands_for = {
        kind: kind if waiting[kind] else other for kind, other in (("video", "image"), ("image", "video"))
    }
    used: Counter[str] = Counter()
    for kind, count in fields.tags_before.items():
        used[stands_for[kind]] += count
    pieces, tagged, at = [], [], 0
    for match in TAG.finditer(fields.question):
        kind, inner = match.groups()
        pieces.append(fields.question[at : match.start()])
        at = match.end()
        if inner:  # <video>path</video>
            tagged.append(read_medium(inner.strip(), kind, kind, row_cut(row, kind)))
            continue
        kind = stands_for[kind]
        if used[kind] >= len(waiting[kind]):
            tags, count = (
                sum(fields.tags_before.values()) + len(TAG.findall(fields.question)),
                len(fields.media),
            )
            raise RowError(
                f"{tags} <video> or <image> tags, but {count} files; name each in `videos` or `images`"
            )
        tagged.append(waiting[kind][used[kind]])
        used[kind] += 1
    pieces.append(fields.question[at:])
    taken = set(map(id, tagged))
    first = [medium for medium in fields.media if id(medium) not in taken]
    fields.question = "".join(pieces).strip()
    if not fields.question:
        raise RowError("the question is empty")
    fields.media = first + tagged
    refuse_idle_cut(row, fields.media)
    pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    fields.layout = [] if not any(piece.strip() for piece in pieces[:-1]) else [""] * len(first) + pieces


def id_of(row: Row) -> str | None:
    """The id of a row; None if it has none.

    Raises:
        RowError: It is neither a text nor a number.
    """
    return next((_name(row, key) for key in _ID if row.get(key) is not None), None)


def _name(row: Row, key: str) -> str:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RowError(f"{key}: expected a text or a number, got {type(value).__name__}")
    return str(value).strip()


def _list(row: Row, key: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise RowError(f"{key}: expected a list, got {type(row[key]).__name__}")
    return list(row[key])


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"{key}: expected a text, got {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{key}: is empty")
    return value


def _optional_text(row: Row, key: str) -> str | None:
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"{key}: expected a text, got {type(value).__name__}")
