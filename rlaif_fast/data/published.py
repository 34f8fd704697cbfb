"""Columns of published datasets that name the video, the options or the answer in their own way.

| dataset        | recognised by                       | video                     | options and answer          |
|----------------|-------------------------------------|---------------------------|-----------------------------|
| NExT-QA        | `a0` to `a4`                        | `video`                   | `a0`..., the index `answer` |
| MVBench        | `candidates` (or `choices`)         | `video`                   | `candidates`, text or letter |
| Video-MME      | `videoID`                           | `{videoID}`               | `options`, letter           |
| ActivityNet-QA | `video_name`                        | `v_{video_name}`, `{video_name}` | text                 |
| MSRVTT-QA      | `video_id`, `category_id`           | `video{video_id}`         | text                        |
| MSVD-QA        | `video_id`                          | `vid{video_id}`, or as `youtube_mapping.txt` says | text |

The suffixes .mp4, .avi, .mkv, .webm and .mov are tried in the folders of `reader.VIDEO_FOLDERS`. The evaluation packs
of Video-ChatGPT and Video-LLaVA name the videos of all their datasets by `video_name`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlaif_fast.data.errors import RowError
from rlaif_fast.data.media_keys import Medium, row_cut
from rlaif_fast.data.schema import option_letters

Row = Mapping[str, Any]


def unfold(row: Row) -> Row:
    """The row with its options and answer under the names that all formats share."""
    changed = dict(row)
    keys = [f"a{i}" for i in range(len(row)) if row.get(f"a{i}") is not None]
    if "a0" in keys and not row.get("options"):
        changed["options"] = [str(changed.pop(key)) for key in keys]
        changed["answer"] = _by_index(row.get("answer"), keys)
    model = row.get("reward_model")
    if isinstance(model, Mapping) and changed.get("answer") is None:  # verl
        changed["answer"] = model.get("ground_truth")
    if not changed.get("options"):
        listed = next((key for key in ("candidates", "choices") if row.get(key)), None)
        if listed is not None:
            if not _are_texts(row[listed]):
                raise RowError(
                    f"{listed}: expected a list of two or more texts, or letters with their texts, got "
                    f"{row[listed]!r:.60}; what is no option belongs into 'metadata'"
                )
            changed["options"] = changed.pop(listed)
    options = changed.get("options")
    if isinstance(options, Mapping):
        changed["options"] = _in_order(options)
    return changed


def _are_texts(value: Any) -> bool:
    """Whether a value lists two or more texts or numbers, or names them by letters."""
    texts = list(_present(value).values()) if isinstance(value, Mapping) else value
    return isinstance(texts, list) and len(texts) > 1 and all(isinstance(x, (str, int, float)) for x in texts)


def _present(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a row has: Arrow gives every row the letters of the longest one."""
    return {name: text for name, text in options.items() if text is not None}


def _by_index(answer: Any, keys: list[str]) -> Any:
    """The letter of the option whose key is "a" followed by the answer."""
    if answer is None:
        return None
    if f"a{answer}" not in keys:
        known = ", ".join(key[1:] for key in keys)
        raise RowError(f"answer: expected the index of an option ({known}), got {answer!r:.60}")
    return option_letters(len(keys))[keys.index(f"a{answer}")]


def _in_order(options: Mapping[str, Any]) -> list[Any]:
    """The options of a mapping from letters (or numbers) to texts, in the order of its keys."""
    options = _present(options)
    letters = option_letters(len(options))
    for names in (
        letters,
        [x.lower() for x in letters],
        *([str(i + k) for i in range(len(options))] for k in (0, 1)),
    ):
        if sorted(options) == sorted(names):
            return [options[name] for name in names]
    raise RowError(f"options: expected the letters A, B, ... as keys, got {list(options)!r:.60}")


def named_video(row: Row) -> Medium | None:
    """The video that a row names only by an id; None if it does not."""
    names: tuple[str, ...]
    if row.get("videoID"):
        names = (str(row["videoID"]),)
    elif row.get("video_name"):
        name = str(row["video_name"])
        names = (name,) if name.startswith("v_") else (f"v_{name}", name)
    elif row.get("video_id") is not None and "question" in row:
        name = str(row["video_id"])
        prefix = "video" if "category_id" in row else "vid"
        names = (f"{prefix}{name}" if name.isdecimal() else name,)
    else:
        return None
    for name in names:
        if "\0" in name or name.startswith("/") or ".." in name:
            raise RowError(f"the video's name {name!r:.60} is not a name")
    return Medium("video", names[0], row_cut(row, "video"), names=names)


def youtube_names(mapping: str) -> dict[str, str]:
    """File names of MSVD's videos from the text of its `youtube_mapping.txt`, by number ("vid12")."""
    pairs = (line.split() for line in mapping.splitlines())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}
