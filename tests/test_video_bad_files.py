"""Every kind of file that a dataset holds sooner or later: it decodes exactly or it says why not."""

import contextlib
import errno
import json
import os
import shutil
import signal
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_file_parts import H264, changed, counters, scramble, whole_files

from rlaif_fast.errors import RlaifFastError
from rlaif_fast.video import (
    ClipCache,
    ClipStore,
    TooManyBadFiles,
    VideoError,
    decode,
    image,
    load_clip,
    load_image,
    probe,
)
from rlaif_fast.video.isolate import DecodeProcess
from rlaif_fast.video.probe import check_same, file_version
from rlaif_fast.video.refs import MediaRef
from rlaif_fast.video.testing import counter_frames, read_counter, write_video


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return whole_files(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("ending", ["webm", "mp4", "mkv", "avi"])
def test_undamaged_part_of_a_damaged_film(good, tmp_path, ending):
    """Frames before the damage are whole and decode; those that build on it are refused, never concealed."""
    path = scramble(good[ending], tmp_path / f"a.{ending}", {20, 21})
    assert counters(path, [0, 5, 11]) == [0, 5, 11]
    assert counters(path, [36, 39]) == [36, 39]  # after the next key frame
    refused = set()
    for index in range(40):
        try:
            assert counters(path, [index]) == [index]
        except VideoError as error:
            assert f"frame {index} " in error.reason
            refused.add(index)
    assert refused & {19, 20, 21, 22}  # B-frames come out a place or two from where they are stored
    assert refused <= set(range(18, 36))


# --- files that are not
# ----------------------------------------------------------------------------------------


def _truncated(good, folder):
    return changed(
        good["mp4"], folder / "a.mp4", lambda data: data.__delitem__(slice(len(data) * 6 // 10, None))
    )


def _truncated_after_the_index(good, folder):
    whole = write_video(
        folder / "w.mp4", counter_frames(40), container_options={"movflags": "faststart"}, **H264
    )
    return changed(whole, folder / "a.mp4", lambda data: data.__delitem__(slice(len(data) * 6 // 10, None)))


def _truncated_webm(good, folder):
    return changed(good["webm"], folder / "a.webm", lambda data: data.__delitem__(slice(-100, None)))


def _truncated_avi(good, folder):
    return changed(good["avi"], folder / "a.avi", lambda data: data.__delitem__(slice(-2000, None)))


def _half_downloaded(ending, share):
    """A download into a file of full size: what has not come yet are zeros."""

    def make(good, folder):
        def blank(data):
            data[int(len(data) * share) :] = bytes(len(data) - int(len(data) * share))

        return changed(good[ending], folder / f"a.{ending}", blank)

    make.__name__ = f"_half_downloaded_{ending}_{share}"
    return make


def _empty(good, folder):
    (folder / "a.mp4").touch()
    return folder / "a.mp4"


def _text(good, folder):
    (folder / "a.mp4").write_text("Not found\n" * 1000)
    return folder / "a.mp4"


def _text_file(good, folder):
    (folder / "a.txt").write_text("FFmpeg would draw this as a picture of a terminal.\n" * 100)
    return folder / "a.txt"


def _zeros(good, folder):
    (folder / "a.mp4").write_bytes(bytes(100_000))
    return folder / "a.mp4"


def _audio_only(good, folder):
    with av.open(str(folder / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return folder / "a.mp4"


def _subtitles_only(good, folder):
    (folder / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    return folder / "a.srt"


def _missing(good, folder):
    return folder / "a.mp4"


def _folder(good, folder):
    (folder / "a.mp4").mkdir()
    return folder / "a.mp4"


def _pipe(good, folder):
    os.mkfifo(folder / "a.mp4")
    return folder / "a.mp4"


def _link_to_itself(good, folder):
    (folder / "a.mp4").symlink_to(folder / "a.mp4")
    return folder / "a.mp4"


def _all_frames_corrupt(good, folder):
    return scramble(good["mp4"], folder / "a.mp4", None)


def _some_frames_corrupt(good, folder):
    return scramble(good["mp4"], folder / "a.mp4", {10, 11, 12, 13})


def _one_frame(good, folder):
    return write_video(folder / "a.webm", counter_frames(1))


def _still_picture(good, folder):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (64, 64)).save(folder / "a.png")
    return (folder / "a.png").rename(folder / "a.mp4")


BAD = [
    (_truncated, "truncated: the container spans"),
    (_truncated_after_the_index, "truncated: the container spans"),
    (_truncated_webm, "truncated: the container spans"),
    (_truncated_avi, "truncated: the container spans"),
    (_half_downloaded("webm", 0.4), "damaged: no element of the container at byte"),
    (_half_downloaded("webm", 0.8), "damaged: no element of the container at byte"),
    (_half_downloaded("mkv", 0.6), "damaged: no element of the container at byte"),
    (_empty, "empty file"),
    (_text, "not a readable video"),
    (_text_file, "not a video"),
    (_zeros, "not a readable video"),
    (_audio_only, r"no video stream \(audio\)"),
    (_subtitles_only, "not a video of a kind that is read"),
    (_missing, "does not exist"),
    (_folder, "is a folder"),
    (_pipe, "not a regular file"),
    (_link_to_itself, "cannot be read: Too many levels"),
    (_all_frames_corrupt, "no frame can be decoded|frame 0 depends on damaged data"),
    (_some_frames_corrupt, r"frame \d+ (depends on damaged data|is damaged)"),
    (_one_frame, "holds 1 frame, but 2"),
    (_still_picture, "not a video of a kind that is read"),
]


@pytest.fixture(scope="module")
def process():
    decoding = DecodeProcess()
    yield decoding
    decoding.close()


@pytest.mark.parametrize(("make", "reason"), BAD, ids=[make.__name__[1:] for make, _ in BAD])
@pytest.mark.parametrize("isolated", [False, True], ids=["here", "isolated"])
def test_bad_file_says_why(good, tmp_path, make, reason, isolated, process):
    path = make(good, tmp_path)
    with pytest.raises(VideoError, match=reason) as caught:
        load_clip(path, process=process if isolated else None)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(good, tmp_path):
    path = Path(shutil.copy(good["mp4"], tmp_path / "a.mp4"))
    path.chmod(0)
    with pytest.raises(VideoError, match="cannot be read: Permission denied"):
        probe(path)


def test_vanished_between_scan_and_decode(good, tmp_path, process):
    path = Path(shutil.copy(good["mp4"], tmp_path / "a.mp4"))
    scan, _ = process.scan(str(path), 30.0)
    path.unlink()
    with pytest.raises(VideoError, match="no such file"):
        list(process.frames(str(path), scan, [0], 30.0))


def test_replaced_file_is_scanned_again(good, tmp_path):
    path = Path(shutil.copy(good["mp4"], tmp_path / "a.mp4"))
    assert probe(path).codec == "h264"
    shutil.copy(good["webm"], path)
    assert probe(path).codec == "vp9"
    assert counters(path, [9]) == [9]


@pytest.mark.parametrize("ending", ["webm", "mkv"])
def test_a_live_recording_does_not_say_how_long_its_parts_are(tmp_path, ending):
    options = {"container_options": {"live": "1"}}
    path = write_video(
        tmp_path / f"a.{ending}", counter_frames(20), **(options if ending == "webm" else H264 | options)
    )
    assert counters(path, [0, 19]) == [0, 19]


def test_a_copy_with_the_size_and_time_of_the_file_it_replaces_is_read_anew(tmp_path):
    """`cp -p` and `rsync --inplace` write into the file that is there."""
    image = pytest.importorskip("PIL.Image")
    cache = ClipCache()
    for colour in ((255, 0, 0), (0, 0, 255)):
        image.new("RGB", (32, 32), colour).save(tmp_path / "new.bmp")
        os.utime(tmp_path / "new.bmp", (1e9, 1e9))
        shutil.copy2(tmp_path / "new.bmp", tmp_path / "seen.bmp")
        clip = load_image(tmp_path / "seen.bmp", cache=cache)
        assert tuple(clip.frames[0, 0, 0].tolist()) == colour


def test_a_new_link_to_a_file_is_no_change_of_it(good, tmp_path):
    path = shutil.copy(good["mp4"], tmp_path / "a.mp4")
    version = file_version(path)
    os.link(path, tmp_path / "b.mp4")
    assert file_version(path) != version
    check_same(path, version)


def test_frame_that_does_not_exist(good):
    for indices in ([40], [-1], [0, 99]):
        with pytest.raises(VideoError, match=f"frame {max(indices, key=abs)} of 40"):
            decode(str(good["mp4"]), indices)


def test_no_frames_asked_for(good):
    assert decode(str(good["mp4"]), []).shape == (0, 96, 128, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"plain text", "not an image"),
        (None, "does not exist"),
        ("cut", "damaged image"),
    ],
)
def test_bad_image_says_why(tmp_path, content, reason):
    path = tmp_path / "a.png"
    if content == "cut":
        image = pytest.importorskip("PIL.Image")
        image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError, match=reason):
        load_image(path)


# --- the store counts, and stops when there are too many


def test_a_bad_file_is_read_once_and_costs_one_line(good, tmp_path):
    bad, gone = _truncated(good, tmp_path), tmp_path / "gone.mp4"
    paths = [good["mp4"], bad, good["webm"], gone, bad, good["avi"]]
    quarantine = tmp_path / "quarantine.jsonl"
    kept = []
    with ClipStore(quarantine=quarantine, max_bad_fraction=0.5) as store:
        for path in paths:
            with contextlib.suppress(VideoError):
                kept.append(store.load(str(path)))
    assert [clip.path for clip in kept] == [str(good[name]) for name in ("mp4", "webm", "avi")]
    for clip in kept:
        assert [read_counter(frame) for frame in clip.frames] == [0, 13, 26, 39]
    assert set(store.stats.bad_files) == {str(bad), str(gone)}
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {line["path"]: line["reason"] for line in lines} == store.stats.bad_files
    assert len(lines) == 2


def test_a_video_of_pictures_is_read_once_where_one_is_bad(tmp_path, monkeypatch):
    pictures = tuple(str(tmp_path / f"{number}.png") for number in range(6))
    for picture, frame in zip(pictures, counter_frames(6)):
        Image.fromarray(frame).save(picture)
    Path(pictures[3]).write_bytes(b"no picture")
    read = []
    monkeypatch.setattr(
        "rlaif_fast.video.image._read", lambda path, real=image._read: read.append(path) or real(path)
    )
    with ClipStore() as store:
        for _ in range(2):
            with pytest.raises(VideoError, match=r"3\.png: not an image") as caught:
                store.load(MediaRef(str(tmp_path), frames=pictures))
            assert caught.value.path == pictures[3]
        part = store.load(MediaRef(str(tmp_path), frames=pictures[:2]))
    assert len(read) == 4 + 2
    assert [read_counter(frame) for frame in part.frames] == [0, 1]
    assert set(store.stats.bad_files) == {pictures[3]}


def test_too_many_bad_files_stop_with_a_summary(tmp_path, monkeypatch):
    monkeypatch.setattr("rlaif_fast.video.loader.MIN_FILES_JUDGED", 6)
    with (
        ClipStore(quarantine=tmp_path / "q.jsonl", max_bad_fraction=0.5, workers=1) as store,
        pytest.raises(TooManyBadFiles, match=r"4 of 6 files are bad.*4 x does not exist.*q\.jsonl"),
    ):
        for number in range(5):
            with contextlib.suppress(VideoError):
                store.load(str(tmp_path / f"gone{number}.mp4"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_group_makes_no_file_bad(good, process, name):
    """Schedulers and terminals send it to every process; this one ends when its channel closes."""
    first = load_clip(good["mp4"], process=process)
    os.kill(process.pid, getattr(signal, name))
    assert (load_clip(good["mp4"], process=process).frames == first.frames).all()


def test_no_memory_for_frames_is_not_the_fault_of_the_file(good, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(RlaifFastError, match="no memory for decoded frames") as caught:
        load_clip(good["mp4"], process=DecodeProcess())
    assert not isinstance(caught.value, VideoError)
