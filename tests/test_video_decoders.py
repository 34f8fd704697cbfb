"""The decoders agree: the same frames, whatever order they are asked for in."""

import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.video import ClipStore, FrameSampling, VideoError, decode, decoders, load_clip, probe
from rlaif_fast.video.dali import BATCH_FILES, DaliDecoder
from rlaif_fast.video.decoders import DECODERS, choose, decoder
from rlaif_fast.video.probe import scan_file
from rlaif_fast.video.testing import counter_frame, counter_frames, read_counter, write_video

OTHERS = [name for name in DECODERS if name != "pyav"]
ORDERS = [[0], list(range(60)), [59, 0, 31, 31, 12, 13, 11, 59], [7] * 5, list(range(59, -1, -7))]
MEAN_TOLERANCE = 2.0  # levels of 255: decoders differ in how they interpolate the colour planes


def needs(name):
    reason = DECODERS[name].unavailable()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v")
    kinds = {
        "vp9": ("a.webm", {}),
        "vp9-mp4": ("a.mp4", {}),
        "vp8": ("b.webm", {"codec": "libvpx"}),
        "mjpeg": ("a.avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
        "h264": ("h.mp4", {"codec": "libx264"}),
    }
    made = {
        kind: write_video(folder / name, counter_frames(60), **how) for kind, (name, how) in kinds.items()
    }
    made["large"] = write_video(folder / "large.webm", counter_frames(60, 270, 480))
    made["large-mp4"] = write_video(folder / "large.mp4", counter_frames(60, 270, 480))
    made["odd"] = write_video(folder / "odd.webm", counter_frames(60, 91, 127))
    return {kind: str(path) for kind, path in made.items()}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["vp9", "vp9-mp4", "vp8", "mjpeg", "large", "odd"])
@pytest.mark.parametrize("order", ORDERS, ids=["one", "all", "mixed", "repeated", "backwards"])
def test_equal_to_pyav(files, name, kind, order):
    needs(name)
    ours = decode(files[kind], order, decoder="pyav")
    theirs = decode(files[kind], order, decoder=name)
    assert [read_counter(f) for f in ours] == order
    assert [read_counter(f) for f in theirs] == order
    assert theirs.shape == ours.shape
    assert theirs.dtype == torch.uint8
    assert (ours.float() - theirs.float()).abs().mean() <= MEAN_TOLERANCE


def one_colour(path, rgb, matrix, red, blue, full_range):
    """A film of one colour, encoded by a matrix of these shares of red and blue."""
    r, g, b = (value / 255 for value in rgb)
    light = red * r + (1 - red - blue) * g + blue * b
    to_blue, to_red = (b - light) / (2 - 2 * blue), (r - light) / (2 - 2 * red)
    low, span, chroma = (0, 255, 255) if full_range else (16, 219, 224)
    planes = [low + span * light, 128 + chroma * to_blue, 128 + chroma * to_red]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace = matrix
        stream.codec_context.color_range = 2 if full_range else 1
        picture = np.concatenate([np.full(n, round(v), np.uint8) for n, v in zip((1024, 256, 256), planes)])
        frame = av.VideoFrame.from_ndarray(picture.reshape(48, 32), format="yuv420p")
        container.mux([*stream.encode(frame), *stream.encode(None)])


@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(
    ("matrix", "red", "blue"),
    [(1, 0.2126, 0.0722), (2, 0.299, 0.114), (6, 0.299, 0.114), (7, 0.212, 0.087), (9, 0.2627, 0.0593)],
    ids=["bt709", "none", "bt601", "smpte240m", "bt2020"],
)
def test_colours_are_by_the_matrix_that_a_film_names(tmp_path, matrix, red, blue, full_range):
    needs("dali")
    path, colour = tmp_path / "a.webm", (170, 60, 40)
    one_colour(path, colour, matrix, red, blue, full_range)
    assert scan_file(str(path)).colorspace == matrix
    for name in ("pyav", "dali"):
        shown = decode(str(path), [0], decoder=name).float().mean((0, 1, 2))
        assert (shown - torch.tensor(colour)).abs().max() <= 4, (name, shown)


def test_films_of_other_matrices_are_left_to_ffmpeg(files):
    scan = replace(scan_file(files["vp9"]), colorspace=8)
    assert "colour matrix 8" in DaliDecoder.refuses(scan, torch.device("cuda"))


def test_more_files_than_a_batch_of_unequal_sizes(files):
    needs("dali")
    kinds = ["vp9", "large", "odd", "vp8"] * BATCH_FILES
    dali = DaliDecoder()
    futures = [dali.submit(files[kind], range(i % 7 + 1)) for i, kind in enumerate(kinds)]
    for i, (kind, future) in enumerate(zip(kinds, futures, strict=True)):
        frames = future.result(60)
        assert [read_counter(f) for f in frames] == list(range(i % 7 + 1))
        info = probe(files[kind])
        assert tuple(frames.shape[1:3]) == (info.height, info.width)
    assert dali.builds == 1
    dali.close()


def test_results_stay_valid_while_the_pipeline_goes_on(files):
    needs("dali")
    dali = DaliDecoder()
    kept = [dali.decode(files["vp9"], [i]) for i in range(60)]
    assert [read_counter(frames[0]) for frames in kept] == list(range(60))
    dali.close()


def test_bad_file_in_a_batch_fails_alone(files, tmp_path):
    needs("dali")
    bad = tmp_path / "bad.webm"
    shutil.copy(files["vp9"], bad)
    scan_file(str(bad))  # the file is sound when it is probed ...
    dali = DaliDecoder()
    real = dali._run

    def damage(batch):  # ... and broken when it is read
        for job in batch:
            if job.path == str(bad):
                job.data[600:] = 255
        return real(batch)

    dali._run = damage
    dali._gather, together = _held_back(dali)
    futures = [dali.submit(path, [3, 40]) for path in (files["vp9"], str(bad), files["vp8"])]
    together.set()
    assert [read_counter(f) for f in futures[0].result(60)] == [3, 40]
    assert [read_counter(f) for f in futures[2].result(60)] == [3, 40]
    with pytest.raises(VideoError, match="DALI cannot decode it: "):
        futures[1].result(60)
    assert [read_counter(f) for f in dali.decode(files["large"], [9])] == [9]
    dali.close()


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full")])
def test_a_full_memory_is_no_fault_of_the_file(files, error):
    needs("dali")
    dali = DaliDecoder(timeout=10)
    real = dali._run

    def fail(batch):
        dali._run = real
        raise error

    dali._run = fail
    with pytest.raises(type(error), match="full"):
        dali.decode(files["vp9"], [3])
    assert [read_counter(f) for f in dali.decode(files["vp9"], [3])] == [3]  # the thread has gone on
    dali.close()


def test_a_gpu_without_memory_is_no_fault_of_the_file(files, monkeypatch):
    def fail(frames, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoders, "to_device", fail)
    with ClipStore(FrameSampling(nframes=4), isolate=False, decoder="pyav") as store:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            store.load(files["vp9"])
        assert not store.stats.bad_files
        monkeypatch.undo()
        assert len(store.load(files["vp9"]).frames) == 4


def _held_back(dali):
    """Make the thread wait for an event before it gathers, so that files share a batch."""
    start = threading.Event()
    gather = dali._gather

    def wait_then_gather():
        start.wait(30)
        return gather()

    return wait_then_gather, start


def test_no_thread_is_left(files):
    needs("dali")
    before = threading.active_count()
    dali = DaliDecoder()
    dali.decode(files["vp9"], [0])
    assert threading.active_count() > before
    dali.close()
    dali.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["dali"])
def test_named_decoder_says_what_it_cannot_read(files, name):
    needs(name)
    with pytest.raises(VideoError, match="does not decode h264 on cpu"):
        decode(files["h264"], [0], decoder=name)
    with pytest.raises(VideoError, match="frame 60 of 60"):
        decode(files["vp9"], [60], decoder=name)
    assert decode(files["vp9"], [], decoder=name).shape == (0, 96, 128, 3)


@pytest.mark.parametrize("isolate", [False, True])
def test_what_dali_cannot_read_here_is_left_to_pyav(files, isolate, tmp_path, monkeypatch, caplog):
    """As on a GPU whose NVDEC lacks a codec: DALI has no H.264 on a CPU."""
    needs("dali")
    monkeypatch.setitem(decoders.AUTO, "cpu", ("dali", "pyav"))
    monkeypatch.setattr("rlaif_fast.video.dali.CPU_CODECS", ("vp9", "h264"))
    monkeypatch.setattr(decoders, "_CAN", set())
    monkeypatch.setattr(decoders, "_CANNOT", {})
    asked, submit = [], DaliDecoder.submit
    monkeypatch.setattr(DaliDecoder, "submit", lambda self, *a: (asked.append(a[0]), submit(self, *a))[1])
    with pytest.raises(VideoError, match="DALI cannot decode it"):
        decode(files["h264"], [3], decoder="dali")  # by name nothing else is tried
    assert not decoders._CANNOT
    asked.clear()
    again = str(shutil.copy(files["h264"], tmp_path / "again.mp4"))
    sampling = FrameSampling(nframes=4)
    with ClipStore(sampling, isolate=isolate, workers=1) as store:
        clips = [store.load(path) for path in (files["h264"], again, files["vp9"])]
        assert not store.stats.bad_files
    assert asked == [files["h264"], files["vp9"]]
    for clip, path in zip(clips, (files["h264"], again, files["vp9"])):
        expected = load_clip(path, sampling=sampling, decoder="pyav")
        assert clip.timestamps == expected.timestamps
        assert (clip.frames.float() - expected.frames.float()).abs().mean() <= MEAN_TOLERANCE
    bad = tmp_path / "bad.webm"
    bad.write_bytes((tmp_path / "again.mp4").read_bytes()[:3000])
    with pytest.raises(VideoError):
        decode(str(bad), [0])
    assert list(decoders._CANNOT) == [("dali", "cpu", "h264", "yuv420p", "small")]


def test_a_file_that_dali_cannot_read_leaves_its_kind_there(files, monkeypatch):
    monkeypatch.setitem(decoders.AUTO, "cpu", ("dali", "pyav"))
    monkeypatch.setattr(decoders, "_unavailable", lambda name: None)
    monkeypatch.setattr(decoders, "_CAN", set())
    monkeypatch.setattr(decoders, "_CANNOT", {})
    scan, tried = scan_file(files["vp9"]), []

    def attempt(name):
        tried.append(name)
        if len(tried) == 2:
            raise VideoError(files["vp9"], "DALI cannot decode it")
        return torch.zeros(1)

    for _ in range(3):
        decoders.by_name("auto", scan, torch.device("cpu"), attempt)
    assert tried == ["dali", "dali", "pyav", "dali"]


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_of_two_films_in_a_file_the_one_that_players_show_is_read(tmp_path, ending):
    path, none = str(tmp_path / f"a.{ending}"), av.stream.Disposition(0)
    with av.open(path, "w") as container:
        streams = [container.add_stream("libvpx-vp9", rate=10) for _ in range(2)]
        for stream, shown in zip(streams, (none, av.stream.Disposition.default), strict=True):
            stream.height, stream.width, stream.pix_fmt, stream.disposition = 96, 128, "yuv420p", shown
        for first, stream in zip((0, 100), streams, strict=True):
            for number in range(4):
                frame = av.VideoFrame.from_ndarray(counter_frame(first + number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert [read_counter(f) for f in decode(path, range(4), decoder="pyav")] == [100, 101, 102, 103]
    for other in OTHERS:
        assert "several videos" in DECODERS[other].refuses(scan_file(path), torch.device("cpu"))


def test_cut_film_is_left_to_ffmpeg(tmp_path, caplog):
    path = write_video(
        tmp_path / "a.mp4",
        counter_frames(40),
        times=[(i - 6) * 40 for i in range(40)],
        container_options={"avoid_negative_ts": "disabled"},
    )
    scan = scan_file(str(path))
    assert "numbers would differ" in DaliDecoder.refuses(scan, torch.device("cuda"))
    with caplog.at_level("INFO"):
        assert choose("auto", scan, torch.device("cuda")) == "pyav"
    assert re.search(r"video: \w+ is decoded by pyav \(no dali: .+\)", caplog.text)


def test_unknown_and_missing_decoders():
    with pytest.raises(UsageError, match="unknown decoder 'decord'"):
        choose("decord", None, torch.device("cpu"))
    for name in DECODERS:
        if DECODERS[name].unavailable():
            with pytest.raises(UsageError, match=f"decoder '{name}' cannot run here"):
                choose(name, None, torch.device("cpu"))


def test_decoder_of_another_package(tmp_path, monkeypatch):
    """A package that is installed beside ours adds its decoder by name."""
    (tmp_path / "grey_decoder.py").write_text(
        "import torch\n"
        "class Grey:\n"
        "    name = 'grey'\n"
        "    def __init__(self, device):\n"
        "        pass\n"
        "    @staticmethod\n"
        "    def unavailable():\n"
        "        return None\n"
        "    def decode(self, path, indices):\n"
        "        return torch.full((len(indices), 32, 32, 3), 128, dtype=torch.uint8)\n"
    )
    meta = tmp_path / "grey_decoder-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: grey-decoder\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[rlaif_fast.decoders]\ngrey = grey_decoder:Grey\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_video(tmp_path / "a.mp4", counter_frames(8))
    assert decode(str(path), [3, 1], decoder="grey").unique().tolist() == [128]


def test_one_decoder_a_process():
    assert decoder("pyav", "cpu") is decoder("pyav", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["large", "large-mp4", "h264"])  # NVDEC reads no VP9 below 128 pixels a side
@pytest.mark.parametrize("order", ORDERS, ids=["one", "all", "mixed", "repeated", "backwards"])
def test_nvdec_equals_pyav(files, kind, order):
    needs("dali")
    ours = decode(files[kind], order, decoder="pyav")
    theirs = decode(files[kind], order, decoder="dali", device="cuda")
    assert theirs.is_cuda
    assert [read_counter(f.cpu()) for f in theirs] == order
    assert (ours.float() - theirs.cpu().float()).abs().mean() <= MEAN_TOLERANCE


def test_threads_that_come_at_once_share_a_decoder(monkeypatch):
    begin = threading.Barrier(4)

    class Slow:
        def __init__(self, device):
            time.sleep(0.05)
            self.fallback = decoder("pyav", device)

    monkeypatch.setitem(DECODERS, "slow", Slow)

    def ask(_):
        begin.wait()
        return decoder("slow", "cpu")

    with ThreadPoolExecutor(4) as threads:
        assert len({id(found) for found in threads.map(ask, range(4))}) == 1
