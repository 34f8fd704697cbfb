"""Films of which a part is missing, or whose frames change their size: what the container and the frames say of it."""

import struct
from fractions import Fraction

import av
import pytest
import torch

from rlaif_fast.video import VideoError, probe
from rlaif_fast.video.decoders import DECODERS, decode
from rlaif_fast.video.probe import scan_file
from rlaif_fast.video.testing import counter_frame, counter_frames, write_video


def without_frames(path, dropped=range(10, 25)):
    """Take whole frames out of an AVI file; its lengths fit, its index stays as it was."""
    data = path.read_bytes()
    at, index = data.index(b"movi") + 4, data.index(b"idx1")
    begin, chunks = at - 8, []
    while at < index:
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append(data[at : (at := at + 8 + length + length % 2)])
    body = b"movi" + b"".join(chunk for i, chunk in enumerate(chunks) if i not in dropped)
    whole = bytearray(data[:begin] + struct.pack("<I", len(body)) + body + data[index:])
    whole[4:8] = struct.pack("<I", len(whole) - 8)
    path.write_bytes(whole)


@pytest.mark.parametrize(("codec", "pixels"), [("mpeg4", "yuv420p"), ("mjpeg", "yuvj420p")])
def test_an_avi_file_without_frames_that_its_index_names_is_refused(tmp_path, codec, pixels):
    path = write_video(tmp_path / "a.avi", counter_frames(40), codec=codec, pixel_format=pixels)
    assert probe(path).frames == 40
    without_frames(path)
    with pytest.raises(VideoError, match="damaged: the index names a part"):
        probe(path)


def test_an_avi_index_of_a_kind_of_its_own_says_nothing(tmp_path):
    path = write_video(tmp_path / "a.avi", counter_frames(40), codec="mpeg4")
    data = bytearray(path.read_bytes())
    for entry in range(data.index(b"idx1") + 8, len(data), 16):
        place = int.from_bytes(data[entry + 8 : entry + 12], "little") + 3
        data[entry + 8 : entry + 12] = struct.pack("<I", place)
    path.write_bytes(data)
    assert scan_file(str(path)).pts


@pytest.mark.parametrize("behind", [bytes(300), b"\x00\x01\x86\xa0\xff\xd8\x02\x81" * 40])
def test_what_follows_an_mp4_film_is_not_read(tmp_path, behind):
    path = write_video(tmp_path / "a.mp4", counter_frames(40), codec="mpeg4")
    path.write_bytes(path.read_bytes() + behind)
    assert probe(path).frames == 40


@pytest.fixture
def flv(tmp_path):
    path = write_video(tmp_path / "a.flv", counter_frames(80), codec="flv")
    return path, path.read_bytes()


def test_what_follows_an_flv_film_is_not_read(flv):
    path, data = flv
    for whole in (data, data + b"\xff" * 500):
        path.write_bytes(whole)
        assert probe(path).frames == 80


@pytest.mark.parametrize("fault", ["zeros", "cut", "end"])
@pytest.mark.parametrize("sized", [True, False])
def test_an_flv_file_of_which_a_part_is_missing_is_refused(flv, fault, sized):
    path, data = flv
    begin, end = len(data) * 2 // 5, len(data) * 3 // 5
    if not sized:
        data = data.replace(b"\0\x08filesize", b"\0\x08otherkey")
        path.write_bytes(data)
        assert probe(path).frames == 80
    holes = {
        "zeros": data[:begin] + bytes(end - begin) + data[end:],
        "cut": data[:begin] + data[end:],
        "end": data[:end],
    }
    path.write_bytes(holes[fault])
    with pytest.raises(
        VideoError, match=r"damaged: no part of the container at byte|truncated: the container"
    ):
        probe(path)


def of_two_sizes(path, codec, pixels, options):
    """20 frames of 128x96 and 20 of 96x64 in one film."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=20)
        for part, (height, width) in enumerate(((96, 128), (64, 96))):
            encoder = av.CodecContext.create(codec, "w") if part else stream.codec_context
            encoder.width, encoder.height, encoder.pix_fmt = width, height, pixels
            encoder.options = options
            encoder.time_base, encoder.framerate = Fraction(1, 20), Fraction(20)
            packets = []
            for number in range(20 * part, 20 * part + 20):
                frame = av.VideoFrame.from_ndarray(counter_frame(number, height, width), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 20)
                packets += encoder.encode(frame)
            for packet in [*packets, *encoder.encode(None)]:
                packet.stream, packet.time_base = stream, Fraction(1, 20)
                container.mux(packet)
    return str(path)


QUICK = {"deadline": "realtime", "cpu-used": "8"}


@pytest.mark.parametrize(
    ("codec", "pixels", "options"),
    [
        ("libvpx", "yuv420p", QUICK),
        ("libvpx-vp9", "yuv420p", QUICK),
        ("mjpeg", "yuvj420p", {}),
        ("libx264", "yuv420p", {"bf": "0"}),
        ("libx265", "yuv420p", {"x265-params": "bframes=0:log-level=none"}),
        ("mpeg4", "yuv420p", {}),
        ("libsvtav1", "yuv420p", {"preset": "12"}),
    ],
)
def test_a_film_that_changes_its_size_is_left_to_pyav(tmp_path, codec, pixels, options):
    path = of_two_sizes(tmp_path / "a.mkv", codec, pixels, options)
    scan = scan_file(path)
    assert len(scan.pts) == 40
    for name in ("dali", "torchcodec"):
        assert "several sizes" in DECODERS[name].refuses(scan, torch.device("cuda"))
    assert decode(path, [0, 19], decoder="auto").shape == (2, 96, 128, 3)
    with pytest.raises(VideoError, match="frame 25 is 96x64, the first 128x96"):
        decode(path, [0, 25], decoder="auto")


REPEATED = {
    "libx264": {"x264-params": "repeat-headers=1"},
    "libx265": {"x265-params": "repeat-headers=1:keyint=5:log-level=none"},
    "mpeg4": {},
}


@pytest.mark.parametrize("codec", REPEATED)
@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_a_film_that_says_its_size_again_is_plain(tmp_path, codec, container):
    path = tmp_path / f"a.{container}"
    write_video(path, counter_frames(20), codec=codec, gop=5, codec_options=REPEATED[codec])
    assert scan_file(str(path)).plain


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_an_av1_film_of_several_key_frames_is_plain(tmp_path, container):
    path = write_video(tmp_path / f"a.{container}", counter_frames(20), codec="libsvtav1", gop=5)
    scan = scan_file(str(path))
    assert len(scan.keys) > 1
    assert scan.plain
