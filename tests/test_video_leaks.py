"""Thousands of decodes of good and bad files leave no memory, file handles, threads or processes behind."""

import gc
import logging
import os
import threading
from pathlib import Path

import pytest

from rlaif_fast.video import ClipCache, ClipStore, FrameSampling, PixelBudget, VideoError, ffmpeg, load_clip
from rlaif_fast.video.dali import DaliDecoder
from rlaif_fast.video.testing import counter_frames, read_counter, write_video

GROWTH_MIB = 24  # allocators keep some slack; a leak of one 64x48 clip a decode would be 350 MiB after 10,000


@pytest.fixture(autouse=True)
def _no_log_records():
    """pytest keeps every record for its report."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five good files and five bad ones."""
    folder = tmp_path_factory.mktemp("v")
    kinds = [("a.webm", {}), ("b.mp4", {"codec": "libx264"}), ("c.avi", {"codec": "mpeg4"})]
    kinds += [("d.mkv", {"codec": "libx264"}), ("e.webm", {"codec": "libvpx"})]
    good = [write_video(folder / name, counter_frames(24, 48, 64), **how) for name, how in kinds]
    (folder / "cut.webm").write_bytes(good[0].read_bytes()[:-200])
    (folder / "text.mp4").write_text("no video\n" * 50)
    (folder / "empty.mp4").touch()
    data = bytearray(good[1].read_bytes())
    start = data.find(b"mdat") + 40
    data[start : start + 2000] = os.urandom(2000)
    (folder / "noise.mp4").write_bytes(data)
    bad = [folder / name for name in ("cut.webm", "text.mp4", "empty.mp4", "noise.mp4", "gone.mp4")]
    return [str(path) for path in good], [str(path) for path in bad]


def usage(pids):
    """Return MiB and open files of this process and of others, its threads and its children."""
    gc.collect()
    held = [os.getpid(), *pids]
    memory = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in held)
    handles = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in held)
    children = sum(len(file.read_text().split()) for file in Path("/proc/self/task").glob("*/children"))
    return memory * os.sysconf("SC_PAGE_SIZE") / 2**20, handles, threading.active_count(), children


def hammer(files, count, store):
    """Load good and bad files in turn; every good one must come out right, every bad one must fail."""
    good, bad = files
    for i in range(count):
        if i % 2:
            store.stats.bad_files.clear()  # otherwise quarantine would spare the decoder the work
            with pytest.raises(VideoError):
                store.load(bad[i // 2 % len(bad)])
        else:
            clip = store.load(good[i // 2 % len(good)])
            assert [read_counter(f) for f in clip.frames] == [0, 8, 15, 23]


def check(files, warm, count, isolate):
    options = {"cache": ClipCache(0), "max_bad_fraction": 1.0, "workers": 2, "isolate": isolate}
    others = usage([])[3]  # processes that earlier tests of this session left, such as a resource tracker
    with ClipStore(FrameSampling(nframes=4), **options) as store:
        # A pool starts a thread when it finds none idle, which one that just ended its work may not be yet.
        for load in [store.submit(path) for path in files[0][:2]]:
            load.result()
        hammer(files, warm, store)
        pids = store._pool.pids if isolate else []
        before = usage(pids)
        hammer(files, count, store)
        assert (store._pool.pids if isolate else []) == pids  # no process had to be replaced
        after = usage(pids)
    print(f"{count} decodes: {before} -> {after} (MiB, handles, threads, processes)")
    assert after[0] - before[0] < GROWTH_MIB
    assert after[1:] == before[1:]
    assert after[3] == others + len(pids)
    assert usage([])[3] == others


@pytest.mark.parametrize("isolate", [True, False])
def test_500_decodes(files, isolate):
    check(files, 100, 500, isolate)


@pytest.mark.slow
@pytest.mark.parametrize("isolate", [True, False])
def test_10000_decodes(files, isolate):
    check(files, 500, 10_000, isolate)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts this process's threads in /proc")
def test_small_frames_are_converted_without_threads(files):
    """FFmpeg starts one a core unless told otherwise, which takes ten times longer than the work."""
    for path in map(str, files[0]):
        found = ffmpeg.scan(path)
        before = len(list(Path("/proc/self/task").iterdir()))
        frames = ffmpeg.read_frames(path, found, [0, 5])
        next(frames)
        assert len(list(Path("/proc/self/task").iterdir())) == before, path
        frames.close()


def test_dali_pipelines_do_not_pile_up(files):
    if DaliDecoder.unavailable():
        pytest.skip(DaliDecoder.unavailable())
    dali = DaliDecoder()

    def work(count):
        for _ in range(count):
            frames = dali.decode(files[0][0], [0, 23])
            assert [read_counter(f) for f in frames] == [0, 23]

    work(50)
    before = usage([])
    work(300)
    after = usage([])
    dali.close()
    assert after[0] - before[0] < GROWTH_MIB
    assert after[1:] == before[1:]


def test_resized_clips_release_the_full_frames(tmp_path):
    path = write_video(tmp_path / "a.webm", counter_frames(16, 480, 640))
    kept = [load_clip(path, resize=PixelBudget(16, 256, 4096)) for _ in range(3)]
    before = usage([])[0]
    kept += [load_clip(path, resize=PixelBudget(16, 256, 4096)) for _ in range(40)]
    assert all(clip.frames.untyped_storage().nbytes() < 400_000 for clip in kept)
    assert usage([])[0] - before < 64  # 40 clips of full frames would be 560 MiB
