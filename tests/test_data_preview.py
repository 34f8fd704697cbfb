"""The contact sheet of a dataset draws what its rows see, and says what it leaves out."""

import json
import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rlaif_fast.data.__main__ import main
from rlaif_fast.data.preview import _pictures
from rlaif_fast.data.synthetic.encode import encode_video
from rlaif_fast.video.refs import Cut, MediaRef

ROW = {"video": "a.mp4", "question": "what moves?", "answer": "the cat."}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder with a video, a red image and the pictures of another video."""
    folder = tmp_path_factory.mktemp("media")
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    encode_video(folder / "a.mp4", frames)
    Image.new("RGB", (64, 64), (255, 0, 0)).save(folder / "red.png")
    (folder / "pictures").mkdir()
    for k, frame in enumerate(frames[:4]):
        Image.fromarray(frame).save(folder / "pictures" / f"{k}.png")
    return folder


@pytest.fixture
def preview(media, tmp_path):
    """Run the command on rows; returns the exit code and the sheet."""

    def run(*rows, words=(), out="sheet.png"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / out
        return main(["preview", str(path), str(out), "--media_root", str(media), *words]), out

    return run


def test_an_image_is_drawn_and_a_wrong_row_is_told(preview, capsys):
    content = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "what colour?"}]
    image = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}
    code, out = preview(ROW, image, {"question": "", "video": "a.mp4"}, words=["--frames", "3"])
    caught = capsys.readouterr()
    assert code == 0 and "2 clips" in caught.out
    assert (
        "left out" in caught.err and "1 of 3 rows are wrong" in caught.err and "rows.jsonl:3:" in caught.err
    )
    red = (np.asarray(Image.open(out).convert("RGB")) == (255, 0, 0)).all(-1)
    assert red.sum() > 5000


def test_a_dollar_sign_is_a_dollar_sign(preview, capsys):
    """It is no formula: such a question was drawn without its signs, or not at all."""
    code, _ = preview(ROW | {"question": r"is $\frac{a$ right?"})
    assert code == 0, capsys.readouterr().err


def test_only_the_part_that_a_row_sees_is_drawn(media):
    whole = MediaRef(str(media / "a.mp4"))
    late = replace(whole, cut=Cut(video_start=0.5))
    first, last = _pictures([whole], 2)
    (begins,) = _pictures([late], 1)
    assert not torch.equal(begins, first)
    both = _pictures([whole, late], 4)
    assert len(both) == 4 and torch.equal(both[1], last) and torch.equal(both[2], begins)
    assert len(_pictures([whole, late], 1)) == 1


def test_the_pictures_of_a_video_are_drawn(media):
    names = tuple(str(path) for path in sorted((media / "pictures").iterdir()))
    drawn = _pictures([MediaRef(str(media / "pictures"), frames=names)], 2)
    expected = [torch.from_numpy(np.asarray(Image.open(names[k])).copy()) for k in (0, 3)]
    assert len(drawn) == 2 and all(torch.equal(a, b) for a, b in zip(drawn, expected))


@pytest.mark.parametrize("words", [["--frames", "0"], ["--frames", "-2"], ["--clips", "0"]])
def test_numbers_that_draw_nothing_are_refused(preview, capsys, words):
    assert preview(ROW, words=words)[0] == 2
    assert f"{words[0][2:]}: expected 1 or more, got {words[1]}" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_said(preview, capsys):
    assert preview(ROW, out="none/sheet.png")[0] == 2
    assert "none does not exist" in capsys.readouterr().err


def test_a_sheet_that_cannot_be_written_whole_leaves_the_earlier_one(preview, capsys):
    _, out = preview(ROW)
    before = out.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as on a disk that fills up
    try:
        code, _ = preview(ROW | {"question": "what else moves?"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "cannot be written" in capsys.readouterr().err
    assert out.read_bytes() == before and not [*out.parent.glob(".sheet*")]


def test_a_line_is_as_wide_as_its_pictures(preview):
    """As many columns as `--frames` allows were drawn, empty ones too, until no file could hold them."""
    _, eight = preview(ROW, words=["--frames", "8"], out="eight.png")
    code, many = preview(ROW, words=["--frames", str(10**23)], out="many.png")
    assert code == 0
    assert many.read_bytes() == eight.read_bytes()
