"""What the command that ranks a file shows a judge of each row."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
from oracle_file_parts import write

from rlaif_fast.oracle.__main__ import main
from rlaif_fast.video.testing import counter_frames, write_video


def shown(request):
    """What a judge is shown, for the row that was written."""
    return [[len(clip.frames), *clip.frames.shape[1:3], clip.is_image] for clip in request.clips]


def lengths(request):
    Path(request.metadata["note"]).write_text(json.dumps([request.question, shown(request)]))
    return [len(text) for text in request.responses]


@pytest.mark.parametrize(
    ("media", "expected"),
    [
        ({"video": "film.mp4"}, [[8, 32, 32, False]]),
        ({"video": "film.mp4", "nframes": 4}, [[4, 32, 32, False]]),
        ({"video": "film.mp4", "video_start": 2, "video_end": 4, "fps": 2}, [[4, 32, 32, False]]),
        ({"video": {"path": "film.mp4", "max_pixels": 256}}, [[8, 16, 16, False]]),
        (
            {"video": "film.mp4", "videos": ["film.mp4"], "image": "still.png"},
            [[8, 32, 32, False]] * 2 + [[1, 6, 8, True]],
        ),
        ({"video": ["still.png"] * 4, "nframes": 2}, [[2, 6, 8, False]]),
        (
            {"question": "<image> or <video>?", "video": "film.mp4", "image": "still.png"},
            [[1, 6, 8, True], [8, 32, 32, False]],
        ),
    ],
)
def test_rank_shows_the_media_as_the_row_says(tmp_path, media, expected):
    from PIL import Image

    write_video(tmp_path / "film.mp4", counter_frames(12, 32, 32), fps=2)
    Image.new("RGB", (8, 6)).save(tmp_path / "still.png")
    note = tmp_path / "note.json"
    row = {"question": "?", "responses": ["a", "bb"], "metadata": {"note": str(note)}, **media}
    source = write(tmp_path / "in.jsonl", row)
    function = f"function={__name__}:lengths"
    assert main(["rank", str(source), "--oracle", "callable", "--option", function]) == 0
    assert json.loads(note.read_text()) == [row["question"], expected]


SEEN = []  # weak references to the frames that a judge was shown


def alive(request):
    """How many of the groups that were shown before still have their frames."""
    values = [float(sum(frames() is not None for frames in SEEN)), 0.5]
    SEEN.append(weakref.ref(request.clips[0].frames))
    return values


def test_rank_lets_the_frames_of_a_batch_go(tmp_path):
    write_video(tmp_path / "film.mp4", counter_frames(12, 32, 32), fps=2)
    source = write(
        tmp_path / "in.jsonl", *[{"question": "?", "responses": ["a", "b"], "video": "film.mp4"}] * 6
    )
    arguments = ["--oracle", "callable", "--option", f"function={__name__}:alive", "--batch_size", "1"]
    assert main(["rank", str(source), *arguments]) == 0
    rows = map(json.loads, (tmp_path / "in.ranked.jsonl").read_text().splitlines())
    assert max(row["scores"][0] for row in rows) <= 1.0  # the batch before, until the next is there


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ({"video": "none.mp4"}, "none.mp4 does not exist"),
        ({"video": "broken.mp4"}, "broken.mp4"),
        ({"video": "film.mp4", "video_start": 90}, "no frames between 90 s"),
        ({"vidoe": "film.mp4"}, "did you mean 'video' by 'vidoe'?"),
        ({"video": {"path": "film.mp4", "speed": 2}}, "the key 'speed' of a video is not used"),
        ({"video": 7}, "video: expected the path of a file, got 7"),
        ({"video": "film.mp4", "fps": 2, "nframes": 4}, "fps: give it or nframes, not both"),
        ({"video_end": 2}, "video_end: the row has no video"),
    ],
)
def test_a_bad_medium_of_any_row_is_told_before_the_first_is_ranked(tmp_path, capsys, media, message):
    write_video(tmp_path / "film.mp4", counter_frames(12, 32, 32), fps=2)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    note = tmp_path / "note.json"
    row = {"question": "?", "responses": ["a", "bb"], "metadata": {"note": str(note)}}
    source = write(tmp_path / "in.jsonl", row, {**row, **media})
    arguments = ["--oracle", "callable", "--option", f"function={__name__}:lengths", "--batch_size", "1"]
    assert main(["rank", str(source), *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {source}:2: ")
    assert message in line
    assert not note.exists()


def test_rank_reads_the_form_and_the_solution_of_a_row(tmp_path):
    row = {
        "question": "?",
        "solution": "red 3",
        "form": r"(\w+) (\d)",
        "responses": ["red 3", "red 4", "red"],
    }
    source = write(tmp_path / "in.jsonl", row)
    assert main(["rank", str(source)]) == 0
    [ranked] = map(json.loads, (tmp_path / "in.ranked.jsonl").read_text().splitlines())
    assert ranked["scores"][:2] == [1.0, pytest.approx(0.6)]


def brightness(request):
    mean = float(request.clips[0].frames.float().mean())
    return [mean, -mean]


def test_rows_on_one_line_are_shown_their_own_media(tmp_path):
    """A JSON array may have all of its rows on one line."""
    from PIL import Image

    for name, value in (("black", 0), ("white", 255)):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"{name}.png")
    rows = [{"question": "?", "responses": ["x", "y"], "image": f"{name}.png"} for name in ("black", "white")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["--oracle", "callable", "--option", f"function={__name__}:brightness"]
    assert main(["rank", str(tmp_path / "rows.json"), *words]) == 0
    ranked = [json.loads(line) for line in (tmp_path / "rows.ranked.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in ranked] == [[0.0, 0.0], [255.0, -255.0]]
