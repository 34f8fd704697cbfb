"""Every key of a medium is used or refused, and media stand where the text puts them."""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("PIL")
from media_parts import counters, example_of, load, make_encoder, media_folder, write_rows

from rlaif_fast.data import read_examples
from rlaif_fast.data.__main__ import main
from rlaif_fast.errors import UsageError
from rlaif_fast.prompts.batches import BatchMaker
from rlaif_fast.video import ClipStore


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return media_folder(tmp_path_factory.mktemp("media"))


@pytest.fixture
def write(tmp_path):
    return partial(write_rows, tmp_path)


PART = "messages"


def row_of(where, keys):
    """The keys on the row, in a message part, or beside the path in `videos`."""
    if where == "row":
        return {"video": "a.mp4", **keys}
    if where == "videos":
        return {"videos": [{"path": "a.mp4", **keys}]}
    content = [{"type": "video", "video": "a.mp4", **keys}, {"type": "text", "text": "what?"}]
    return {"question": None, "messages": [{"role": "user", "content": content}]}


# counter_frames are 10 a second: 40 frames, 4 seconds
USED = [
    ({"video_start": 0.0, "video_end": 1.0}, lambda seen: max(seen) <= 10),
    ({"video_start": 2.0, "video_end": 3.0}, lambda seen: min(seen) >= 20 and max(seen) <= 30),
    ({"video_start": 3.0}, lambda seen: min(seen) >= 30),
    ({"video_end": 0.5}, lambda seen: max(seen) <= 5),
    ({"fps": 5.0}, lambda seen: len(seen) == 20),
    ({"nframes": 10}, lambda seen: len(seen) == 10),
    ({"min_frames": 12}, lambda seen: len(seen) == 12),
    ({"max_frames": 2}, lambda seen: len(seen) == 2),
    ({"fps": 10, "max_frames": 6}, lambda seen: len(seen) == 6),
]


@pytest.mark.parametrize("where", ["row", "part", "videos"])
@pytest.mark.parametrize(("keys", "holds"), USED)
@pytest.mark.parametrize("configured", [{}, {"nframes": 4}])
def test_every_key_of_a_video_changes_its_frames(write, media, where, keys, holds, configured):
    if configured and set(keys) <= {"video_start", "video_end"} and "fps" not in keys:
        configured = {}
    [clip] = load(example_of(write, media, row_of(where, keys)), **configured)
    assert holds(counters(clip)), counters(clip)


def test_two_segments_of_one_clip_differ(write, media):
    rows = [
        {"question": "what?", "answer": "x", "video": "a.mp4", "video_start": s, "video_end": s + 1}
        for s in (0, 2)
    ]
    first, second = (load(example)[0] for example in read_examples(write(*rows), media_root=media))
    assert first.key != second.key
    assert set(counters(first)).isdisjoint(counters(second))


@pytest.mark.parametrize("where", ["row", "part", "videos"])
@pytest.mark.parametrize(
    "keys", [{"max_pixels": 1024}, {"min_pixels": 64 * 256, "max_pixels": 64 * 512}, {"total_pixels": 8192}]
)
def test_pixel_bounds_are_used(write, media, where, keys, encoder):
    plain, bound = (example_of(write, media, row_of(where, given)) for given in ({}, keys))
    with ClipStore(resize=encoder.pixels, isolate=False) as store:
        maker = BatchMaker(encoder, store)
        grids = [maker([example])[0].media[0].grid_thw for example in (plain, bound)]
    assert grids[0] != grids[1]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("tiny") / "model")


REFUSED = {
    "resized_height": 64,
    "start": 1,
    "sample_fps": 2,
    "detail": "high",
    "max_pixel": 9,
    "video_strat": 1,
    "image": "p0.png",
    "bytes": "abc",
}


@pytest.mark.parametrize("where", ["part", "videos"])
@pytest.mark.parametrize("key", REFUSED)
def test_any_other_key_of_a_part_is_refused_by_name(write, media, where, key):
    row = {"question": "what?", "answer": "x", **row_of(where, {key: REFUSED[key]})}
    with pytest.raises(UsageError, match=key if key != "image" else "expected the path of a video"):
        read_examples(write(row), media_root=media)


WRONG = [
    {"fps": 0}, {"fps": -1}, {"fps": "2"}, {"fps": True}, {"nframes": 0}, {"nframes": 2.5}, {"video_start": -1},
    {"video_start": 2, "video_end": 1}, {"video_end": 0}, {"min_frames": 9, "max_frames": 3}, {"fps": 1, "nframes": 4},
    {"min_frames": 2, "nframes": 4}, {"max_frames": 8, "nframes": 4},
    {"min_pixels": 9, "max_pixels": 3}, {"max_pixels": 0}, {"fps": float("inf")}, {"video_start": [1]},
]  # fmt: skip


@pytest.mark.parametrize("where", ["row", "part", "videos"])
@pytest.mark.parametrize("keys", WRONG, ids=str)
def test_a_value_that_cannot_be_is_refused_by_name(write, media, where, keys):
    with pytest.raises(UsageError, match=rf"data\.jsonl:1: ({'|'.join(keys)}|Infinity)"):
        example_of(write, media, row_of(where, keys))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "p0.png", "fps": 2}, "fps: the row has no video"),
        ({"images": ["p0.png"], "nframes": 4}, "nframes: the row has no video"),
        ({"image": "p0.png", "total_pixels": 4096}, "total_pixels: the row has no video"),
        ({"video_start": 1}, "video_start: the row has no video"),
        ({"max_pixels": 4096}, "max_pixels: the row has no video or picture"),
    ],
)
def test_a_key_of_a_row_that_none_of_its_media_reads_is_refused(write, media, row, message):
    asked = {"question": "what?", "answer": "x"}
    with pytest.raises(UsageError, match=rf"data\.jsonl:1: {message}$"):
        read_examples(write(asked | row), media_root=media)
    unset = asked | row | dict.fromkeys(row.keys() - {"image", "images"})
    assert read_examples(write(unset), media_root=media)


def test_a_key_for_the_videos_of_a_row_may_stand_beside_its_pictures(write, media):
    row = {
        "question": "what?",
        "answer": "x",
        "video": "v.mp4",
        "image": "p0.png",
        "fps": 2,
        "max_pixels": 4096,
    }
    [example] = read_examples(write(row), media_root=media, check_files=False)
    cuts = [medium.cut.given() for medium in example.seen]
    assert cuts == [{"fps": 2.0, "max_pixels": 4096}, {"max_pixels": 4096}]


def test_a_picture_has_no_seconds(write, media):
    part = {"type": "image", "image": "p0.png", "video_start": 1}
    with pytest.raises(UsageError, match="video_start: a picture has none"):
        read_examples(
            write(
                {
                    "messages": [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}],
                    "answer": "y",
                }
            ),
            media_root=media,
        )


@pytest.mark.parametrize(
    "keys",
    [{"video_start": 90}, {"video_start": 3.99}, {"nframes": 400}, {"video_start": 0, "video_end": 0.01}],
)
def test_check_looks_at_the_part_that_is_asked_for(write, media, keys, capsys):
    path = write({"question": "what?", "answer": "x", "video": "a.mp4", **keys})
    assert main(["check", str(path), "--media_root", str(media)]) == 1
    assert "data.jsonl:1" in capsys.readouterr().err
    assert (
        main(
            [
                "check",
                str(write({"question": "what?", "answer": "x", "video": "a.mp4"})),
                "--media_root",
                str(media),
            ]
        )
        == 0
    )


def test_a_part_that_is_not_there_costs_no_other_part(write, media):
    good, bad = (example_of(write, media, {"video": "a.mp4", "video_start": start}) for start in (0, 90))
    with ClipStore(isolate=False, max_bad_fraction=1.0) as store:
        for _ in range(2):
            with pytest.raises(Exception, match="no frames between"):
                store.load(bad.seen[0])
        assert store.load(good.seen[0]).frames.shape[0] >= 4
        assert list(store.stats.bad_files) == [f"{media}/a.mp4 [video_start=90]"]


# --- where media stand

V, P = "V", "P"


PLACED = [
    (
        {"question": "before <image> after <image> end", "images": ["p0.png", "p1.png"]},
        ["before", P, "after", P, "end"],
    ),
    ({"question": "<image> then <video> what", "image": "p0.png", "video": "a.mp4"}, [P, "then", V, "what"]),
    ({"question": "<image><video> what", "image": "p0.png", "video": "a.mp4"}, [P, V, "what"]),
    ({"question": "what then <video>", "video": "a.mp4"}, ["what", "then", V]),
    ({"question": "<video> what", "videos": ["a.mp4", "b.mp4"]}, [V, V, "what"]),
    ({"question": "what", "image": "p0.png", "video": "a.mp4"}, [V, P, "what"]),
    ({"question": "before <video>a.mp4</video> end"}, ["before", V, "end"]),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "before"},
                        {"type": "video", "video": "a.mp4"},
                        {"type": "text", "text": "then"},
                        {"type": "image", "image": "p0.png"},
                        {"type": "text", "text": "end"},
                    ],
                }
            ]
        },
        ["before", V, "then", P, "end"],
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "before"}, {"type": "image"}, {"type": "video"}],
                }
            ],
            "videos": ["a.mp4"],
            "images": ["p1.png"],
        },
        ["before", P, V],
    ),
    ({"conversations": [{"from": "human", "value": "<image>\nwhat"}], "video": "a.mp4"}, [V, "what"]),
    (
        {"question": "what", "image": "p0.png", "options": ["before", "after"], "answer": "A"},
        [P, "what", "A", ".", "before", "B", ".", "after"],
    ),
    ({"question": "what", "answer": "x"}, ["what"]),
]


@pytest.mark.parametrize(("row", "order"), PLACED, ids=range(len(PLACED)))
def test_media_stand_where_the_text_puts_them(write, media, encoder, row, order):
    [example] = read_examples(write({"answer": "x", **row}), media_root=media)
    clips = load(example, nframes=2)
    [prompt] = [encoder.encode(example, clips)]
    tokens = encoder.tokenizer.convert_ids_to_tokens(prompt.input_ids.tolist())
    start = tokens.index("user") + 1 if "user" in tokens else 0
    found = []
    for token in tokens[start:]:
        kind = {"<|video_pad|>": V, "<|image_pad|>": P}.get(token)
        if token == "<|vision_start|>":
            found.append(None)
        elif kind is not None:
            found[-1] = kind
        elif token in order:
            found.append(token)
    assert [item for item in found if item in order] == order
    assert len(prompt.media) == order.count(V) + order.count(P)
    for clip, item in zip(clips, prompt.media):
        assert clip.is_image != item.is_video


def test_a_picture_and_a_video_are_not_swapped(write, media):
    example = example_of(
        write,
        media,
        {"question": "<image> <video>", "image": "p3.png", "video": "a.mp4"}
        | {"question": "x <image> y <video>"},
    )
    picture, video = load(example)
    assert picture.is_image and not video.is_image
    assert counters(picture) == [3]
