"""Files that attack: playlists that name others, kinds that run programs, decoders that raise anything."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import pytest
from fuzzing import counts, fuzz
from hypothesis import strategies as st

pytest.importorskip("PIL")

from PIL import Image

from rlaif_fast.errors import RlaifFastError, UsageError, printable
from rlaif_fast.video import ClipStore, VideoError, image, isolate, load_clip, load_image, probe
from rlaif_fast.video.isolate import DecodeProcess
from rlaif_fast.video.testing import counter_frames, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "whole.mp4", counter_frames(20))


PLAYLISTS = {
    "relative": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{name}\n#EXT-X-ENDLIST\n",
    "absolute": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n",
    "url": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{path}\n#EXT-X-ENDLIST\n",
    "master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{name}\n",
    "byterange": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n#EXT-X-BYTERANGE:90@0\n{path}\n#EXT-X-ENDLIST\n",
    "map": '#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MAP:URI="{path}"\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n',
    "concat": "ffconcat version 1.0\nfile '{name}'\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{path}</BaseURL></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("suffix", [".m3u8", ".mp4", ".txt", ".ffconcat"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_list_of_files_is_never_followed(clip, kind, suffix):
    path = clip.with_name(f"list-{kind}{suffix}")
    path.write_text(PLAYLISTS[kind].format(name=clip.name, path=clip))
    for read in (probe, load_clip):
        with pytest.raises(VideoError):
            read(path)
    process = DecodeProcess()
    try:
        with pytest.raises(VideoError):
            process.scan(str(path), 30.0)
    finally:
        process.close()


def test_a_pattern_of_pictures_is_never_expanded(tmp_path):
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / f"a{number}.png")
    (tmp_path / "a%d.png").write_bytes((tmp_path / "a0.png").read_bytes())
    with pytest.raises(VideoError):
        probe(tmp_path / "a%d.png")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
OTHER_KINDS = {
    "a.eps": EPS,
    "eps.png": EPS,
    "a.pdf": b"%PDF-1.4\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
    "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/hostname"/></svg>',
    "a.psd": b"8BPS\x00\x01" + bytes(40),
    "a.fli": bytes([0x80, 0, 0, 0, 0x11, 0xAF]) + bytes(130),
    "a.wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "a.ico": b"\x00\x00\x01\x00\x01\x00" + bytes(40),
    "a.xbm": b"#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {0x01};\n",
    "a.m3u8": b"#EXTM3U\n",
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_only_raster_kinds_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(OTHER_KINDS[name])
    with pytest.raises(VideoError, match="not an image of a kind that is read"):
        load_image(tmp_path / name)


@pytest.mark.parametrize("raised", [ValueError, KeyError, struct.error, AssertionError, RuntimeError])
@pytest.mark.parametrize("stage", ["exif_transpose", "load"])
def test_whatever_a_picture_s_decoder_raises_is_a_bad_file(tmp_path, monkeypatch, raised, stage):
    from PIL import ImageFile, ImageOps

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def fail(*_, **__):
        raise raised("no")

    monkeypatch.setattr(
        *((ImageOps, stage) if stage == "exif_transpose" else (ImageFile.ImageFile, stage)), fail
    )
    with pytest.raises(VideoError, match=f"damaged image: {raised.__name__}"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "raised", [ValueError, KeyError, ZeroDivisionError, IndexError, RuntimeError, AssertionError]
)
def test_whatever_a_video_s_decoder_raises_is_a_bad_file(clip, tmp_path, monkeypatch, raised):
    def fail(*_, **__):
        raise raised("no")

    copy = tmp_path / "a.mp4"
    copy.write_bytes(clip.read_bytes())
    with monkeypatch.context() as patch, pytest.raises(VideoError, match=raised.__name__):
        patch.setattr("rlaif_fast.video.ffmpeg._packet_facts", fail)
        probe(copy)
    monkeypatch.setattr("rlaif_fast.video.ffmpeg.read_frames", fail)
    probe(clip)
    with pytest.raises(VideoError, match=raised.__name__), ClipStore(isolate=False) as store:
        store.load(str(clip))


def test_the_worker_outlives_what_it_does_not_expect(clip):
    process = DecodeProcess()
    try:
        process.scan(str(clip), 30.0)
        pid = process.pid
        with pytest.raises(VideoError):
            list(process.frames(str(clip), probe_scan(clip), ["no index"], 30.0))
        process.scan(str(clip), 30.0)
        assert process.pid == pid
    finally:
        process.close()


def test_the_worker_ends_quietly_with_a_process_that_was_killed():
    ours, theirs = Pipe()
    worker = subprocess.Popen(
        [sys.executable, Path(isolate.__file__).with_name("worker.py"), str(theirs.fileno()), "-1"],
        pass_fds=(theirs.fileno(),),
        stderr=subprocess.PIPE,
    )
    theirs.close()
    assert ours.poll(60)  # it is ready, and nobody reads that
    ours.close()
    assert (worker.communicate(timeout=30)[1], worker.returncode) == (b"", 0)


def probe_scan(path):
    from rlaif_fast.video.probe import scan_file

    return scan_file(str(path))


@pytest.mark.parametrize("kind", ["fifo", "folder", "nul", "surrogate", "long"])
@pytest.mark.parametrize("read", [probe, load_clip, load_image])
def test_a_path_that_is_no_file_is_refused_at_once(tmp_path, read, kind):
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    named = {"nul": f"{path}\0", "surrogate": f"{path}\ud800", "long": "a" * 9000}.get(kind, str(path))
    with pytest.raises(VideoError):
        read(named)


@pytest.mark.parametrize(
    "name", ["a\x1b[2J.mp4", "a\x07", "a\nb", "a\r", "a\x9b31m", "a\u202eb", "a\ud800", "\x1b]0;x\x07"]
)
def test_no_file_name_writes_to_the_terminal(tmp_path, name):
    with pytest.raises(VideoError) as caught:
        load_clip(f"{tmp_path}/{name}")
    for text in (str(caught.value), str(UsageError(name)), str(RlaifFastError(f"{name}: gone"))):
        assert all(character.isprintable() or character == "\n" for character in text)
        text.encode("utf-8")
    assert "\n" not in str(caught.value)


def test_plain_text_is_printed_as_it_is():
    assert printable("größer, 大, a\n  b 🎥") == "größer, 大, a\n  b 🎥"


def _pictures():
    picture = Image.effect_noise((24, 16), 80).convert("RGB")
    found = []
    for kind in image.FORMATS:
        if kind in Image.SAVE and kind != "MPO":
            buffer = io.BytesIO()
            picture.save(buffer, format=kind)
            found.append(buffer.getvalue())
    return found


@pytest.mark.parametrize("cases", counts(1_500, 20_000))
def test_a_damaged_picture_is_a_clip_or_a_bad_file(tmp_path, cases):
    Image.init()
    pictures, path = _pictures(), tmp_path / "a"

    def check(case):
        which, seed = case
        data = bytearray(pictures[which % len(pictures)])
        generator = random.Random(seed)
        for _ in range(generator.randrange(1, 5)):
            data[generator.randrange(min(len(data), 400))] = generator.randrange(256)
        path.write_bytes(data if generator.random() < 0.8 else data[: generator.randrange(len(data))])
        try:
            read = load_image(path)
        except VideoError as error:
            assert error.reason
        else:
            assert read.frames.shape[0] == 1

    fuzz(st.tuples(st.integers(0, 20), st.integers(0, 2**32)), check, cases, "pictures")
