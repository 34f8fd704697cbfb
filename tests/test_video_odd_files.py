"""Files that are whole and unusual: odd containers, sizes, times, turned and mirrored films."""

import dataclasses
import io
import shutil
import struct
from fractions import Fraction
from functools import partial

import av
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from video_file_parts import H264, changed, counters, scramble, whole_files

from rlaif_fast.video import (
    PatchSpec,
    VideoError,
    decode,
    load_clip,
    load_image,
    preprocess,
    probe,
    sample_indices,
)
from rlaif_fast.video.dali import DaliDecoder
from rlaif_fast.video.ffmpeg import _Reader, read_frames
from rlaif_fast.video.probe import scan_file
from rlaif_fast.video.testing import counter_frame, counter_frames, read_counter, write_video
from rlaif_fast.video.torchcodec import TorchCodecDecoder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return whole_files(tmp_path_factory.mktemp("good"))


def set_display_matrix(matrix, data):
    a, b, c, d = (x << 16 for x in matrix)
    start = data.find(b"tkhd") + 44  # the display matrix of a version 0 track header
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)


# --- files that are fine, however odd
# --------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["mp4", "webm", "avi", "mkv", "ts", "mov"])
def test_every_frame_of_a_whole_file(good, ending):
    info = probe(good[ending])
    assert (info.frames, info.fps, info.rotation) == (40, 30.0, 0)
    assert info.duration == pytest.approx(40 / 30)
    assert info.timestamps == pytest.approx([i / 30 for i in range(40)], abs=1e-3)
    assert counters(good[ending], range(40)) == list(range(40))


@pytest.mark.parametrize(
    ("ending", "how"),
    [
        ("webm", {"codec": "libvpx", "codec_options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
        ("mp4", {"codec": "libx265", "codec_options": {"x265-params": "log-level=none"}}),
        ("avi", H264),  # reordered frames in a container that knows no presentation times
        ("mp4", {"codec": "libx264", "codec_options": {"bf": "3", "preset": "medium"}, "gop": 8}),
        ("mkv", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
        ("ts", H264),  # seeking lands behind the key frame that the packets name
    ],
    ids=["vp8-hidden-frames", "hevc", "h264-avi", "h264-b-frames", "mjpeg", "h264-ts"],
)
def test_codecs_out_of_order_and_repeated(tmp_path, ending, how):
    path = write_video(tmp_path / f"a.{ending}", counter_frames(50), **how)
    assert probe(path).frames == 50
    order = [49, 0, 13, 13, 37, 1, 12, 49]
    assert counters(path, order) == order


def test_wrong_extension_is_no_fault(good, tmp_path):
    shutil.copy(good["webm"], tmp_path / "a.mp4")
    shutil.copy(good["mp4"], tmp_path / "b.jpg")
    assert counters(tmp_path / "a.mp4", [7]) == [7]
    assert counters(tmp_path / "b.jpg", [7]) == [7]


@pytest.mark.parametrize("name", ["ünï 视频 🎬.mp4", "line\nbreak.mp4", "a:b.mp4", "50%d #1?.mp4"])
def test_path_names(good, tmp_path, name, monkeypatch):
    shutil.copy(good["mp4"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert counters(tmp_path / name, [5]) == [5]
    assert counters(name, [5]) == [5]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_negative_timestamps_are_not_counted(tmp_path, ending):
    """The film starts at the seventh frame: MP4 says so in an edit list, Matroska by the times alone."""
    path = write_video(
        tmp_path / f"a.{ending}",
        counter_frames(40),
        times=[(i - 6) * 40 for i in range(40)],
        container_options={"avoid_negative_ts": "disabled"},
    )
    info = probe(path)
    assert info.frames == 34
    assert info.timestamps[:2] == pytest.approx((0.0, 0.04))
    assert counters(path, [0, 33, 10]) == [6, 39, 16]


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    ],
)
def test_mirrored_film_comes_out_as_players_show_it(good, tmp_path, matrix, shown):
    path = changed(good["mp4"], tmp_path / "a.mp4", partial(set_display_matrix, matrix))
    as_coded, frame = (decode(str(p), [5])[0].numpy() for p in (good["mp4"], path))
    np.testing.assert_array_equal(frame, shown(as_coded))
    scan = dataclasses.replace(scan_file(str(path)), codec="vp9", plain=True, rotation=0)
    for decoder in (DaliDecoder, TorchCodecDecoder):  # neither is told of a mirror
        assert decoder.refuses(scan, torch.device("cpu")) is not None


@pytest.mark.parametrize(
    ("matrix", "degrees"),
    [((0, 1, -1, 0), 90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 270)],
)
def test_rotated_film_comes_out_upright(good, tmp_path, matrix, degrees):
    path = changed(good["mp4"], tmp_path / "a.mp4", partial(set_display_matrix, matrix))
    info = probe(path)
    assert info.rotation == degrees
    frame = decode(str(path), [5])[0].numpy()
    assert frame.shape == ((96, 128, 3) if degrees == 180 else (128, 96, 3))
    # Turned back by as much, the counter can be read; a quarter turn to the right is np.rot90 with k = -1.
    assert read_counter(np.rot90(frame, degrees // 90)) == 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_film_of_jpegs_is_turned_by_their_exif(tmp_path, orientation):
    """Cameras write such films; PyAV does not know the EXIF that FFmpeg attaches to their frames."""
    jpegs = []
    for picture in counter_frames(4):
        upright = Image.fromarray(picture)
        exif = upright.getexif()
        exif[ExifTags.Base.Orientation] = orientation
        upright.save(held := io.BytesIO(), "JPEG", exif=exif, quality=95)
        jpegs.append(held)
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuvj420p"
        for number, jpeg in enumerate(jpegs):
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, number, number, True
            packet.time_base = Fraction(1, 10)
            film.mux(packet)
    frames = decode(str(path), range(4))
    for frame, jpeg in zip(frames, jpegs, strict=True):
        shown = np.asarray(ImageOps.exif_transpose(Image.open(jpeg)))
        assert np.abs(frame.numpy().astype(int) - shown).mean() < 2  # their YUV is read by two libraries


@pytest.fixture(scope="module")
def open_groups(tmp_path_factory):
    """Frames behind a key frame that build on frames before it: broadcasts and cameras write such files."""
    options = {"preset": "medium", "x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}
    folder = tmp_path_factory.mktemp("open")
    return {
        ending: write_video(
            folder / f"a.{ending}", counter_frames(60), codec="libx264", gop=10, codec_options=options
        )
        for ending in ("mp4", "mkv", "ts")
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_open_groups_of_pictures(open_groups, ending, threads):
    path = str(open_groups[ending])
    scan = scan_file(path)
    for wanted in ([59], [25, 26, 27, 50], *([i] for i in range(0, 60, 3))):
        found = read_frames(path, scan, wanted, threads=threads)
        assert [(i, read_counter(frame)) for i, frame in found] == [(i, i) for i in wanted]
    with _Reader(path, scan, [55], 1) as reader:
        reader.frame(55)
        assert not reader.linear and reader.sought  # from a key frame near by, not from the start


@pytest.mark.parametrize(
    ("ending", "codec", "options"),
    [
        (
            "ts",
            "libx265",
            {"x265-params": "open-gop=1:keyint=12:log-level=none"},
        ),  # a seek ends between key frames
        ("mp4", "libsvtav1", {"preset": "12"}),  # its decoder is a library of its own
    ],
)
def test_any_frame_alone(tmp_path, ending, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    path = write_video(tmp_path / f"a.{ending}", counter_frames(60), codec=codec, codec_options=options)
    for wanted in ([3, 30], *([i] for i in range(1, 60, 4))):
        assert counters(path, wanted) == wanted


def test_damage_in_an_open_group_is_noticed(open_groups, tmp_path):
    whole = decode(str(open_groups["mkv"]), range(60))
    refused = 0
    for packet in (0, 4, 13, 21):
        path = str(scramble(open_groups["mkv"], tmp_path / f"{packet}.mkv", {packet}))
        for index in range(60):
            try:
                [frame] = decode(path, [index])
            except VideoError:
                refused += 1
                continue
            assert torch.equal(frame, whole[index]), (packet, index)
    assert 0 < refused < 240


def test_odd_sizes(tmp_path):
    path = write_video(tmp_path / "a.webm", counter_frames(8, 91, 127))
    assert decode(str(path), [3]).shape == (1, 91, 127, 3)
    assert counters(path, [3]) == [3]


def test_one_pixel(tmp_path):
    path = write_video(tmp_path / "a.webm", (np.full((1, 1, 3), 200, np.uint8) for _ in range(8)))
    frames = decode(str(path), [0, 7])
    assert frames.shape == (2, 1, 1, 3)
    assert (frames.int() - 200).abs().max() < 8
    media = preprocess(load_clip(path), PatchSpec(8), min_pixels=256, max_pixels=4096)
    assert media.patches.shape[0] == np.prod(media.grid_thw)


def test_8k(tmp_path):
    picture = np.tile(counter_frame(5, 432, 768), (10, 10, 1))
    path = write_video(tmp_path / "a.avi", [picture] * 2, codec="mjpeg", pixel_format="yuvj420p")
    frame = decode(str(path), [1])[0]
    assert frame.shape == (4320, 7680, 3)
    assert read_counter(frame[:432, :768]) == 5


def test_10_bit(tmp_path):
    path = write_video(tmp_path / "a.mp4", counter_frames(8), pixel_format="yuv420p10le", **H264)
    assert probe(path).pixel_format == "yuv420p10le"
    assert counters(path, range(8)) == list(range(8))


@pytest.mark.parametrize(("ending", "how"), [("mp4", H264), ("webm", {})])
def test_variable_frame_rate(tmp_path, ending, how):
    times = [i * 40 if i < 20 else 800 + (i - 20) * 200 for i in range(40)]
    path = write_video(tmp_path / f"a.{ending}", counter_frames(40), times=times, **how)
    info = probe(path)
    assert info.variable_rate
    assert info.timestamps == pytest.approx([t / 1000 for t in times], abs=1e-3)
    chosen = sample_indices(info, nframes=6)
    moments = np.linspace(0, times[-1] / 1000, 6)
    assert chosen == [max(i for i, t in enumerate(info.timestamps) if t <= m + 1e-9) for m in moments]
    assert counters(path, chosen) == chosen


def test_declared_rate_of_zero(good, tmp_path):
    def stop(data):
        start = data.find(b"avih") + 8
        data[start : start + 4] = bytes(4)  # microseconds per frame
        start = data.find(b"strh") + 28
        data[start : start + 8] = bytes(8)  # scale and rate

    path = changed(good["avi"], tmp_path / "a.avi", stop)
    info = probe(path)
    assert info.frames == 40
    assert info.fps > 0
    assert counters(path, [0, 20, 39]) == [0, 20, 39]


@pytest.mark.parametrize("ending", ["webm", "mp4"])
def test_declared_duration_is_not_believed(good, tmp_path, ending):
    def lie(data):
        if ending == "webm":
            start = data.find(b"\x44\x89\x88") + 3
            data[start : start + 8] = struct.pack(">d", 1e12)
        else:
            for box in (b"mvhd", b"mdhd"):
                start = data.find(box) + 20
                data[start : start + 4] = b"\x7f\xff\xff\xff"

    path = changed(good[ending], tmp_path / f"a.{ending}", lie)
    assert path.read_bytes() != good[ending].read_bytes()
    assert probe(path).duration == pytest.approx(40 / 30, abs=1e-3)
    assert counters(path, sample_indices(probe(path))) == sample_indices(probe(path))


# --- images
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_become_eight_and_values_without_a_range_are_refused(tmp_path, name):
    image = pytest.importorskip("PIL.Image")
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    image.fromarray(grey).save(tmp_path / name)
    frames = load_image(tmp_path / name).frames
    assert frames[0, :, :, 1].flatten().tolist() == list(range(256))
    for kind in (np.float32, np.int32):
        image.fromarray(grey.astype(kind)).save(tmp_path / "b.tif")
        with pytest.raises(VideoError, match=r"b\.tif: holds values of 32 bits"):
            load_image(tmp_path / "b.tif")


def test_image_is_upright_and_on_white(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = image.new("RGBA", (6, 4), (255, 0, 0, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "a.png")
    clip = load_image(tmp_path / "a.png")
    assert clip.is_image
    assert clip.frames.shape == (1, 4, 6, 3)
    assert clip.frames[0, 0, 0].tolist() == [255, 255, 255]
    assert clip.frames[0, 1, 1].tolist() == [255, 0, 0]
    exif = image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    image.new("RGB", (6, 4)).save(tmp_path / "b.jpg", exif=exif)
    assert load_image(tmp_path / "b.jpg").frames.shape == (1, 6, 4, 3)
