"""Loading ahead, and decoders that hang or crash."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.video import (
    ClipCache,
    ClipStore,
    FrameSampling,
    PixelBudget,
    VideoError,
    load_clip,
)
from rlaif_fast.video.isolate import DecodeProcess
from rlaif_fast.video.testing import counter_frames, read_counter, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v")
    return [str(write_video(folder / f"{n}.webm", list(counter_frames(40 + n))[n:])) for n in range(6)]


def running(pid):
    """Whether a process exists that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("isolate", [True, False])
def test_order_images_and_repeats(videos, tmp_path, isolate):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (32, 32), (9, 8, 7)).save(tmp_path / "a.png")
    order = [3, 0, 0, 5, 1, 3, 4]
    with ClipStore(FrameSampling(nframes=4), isolate=isolate, workers=3) as store:
        futures = [store.submit(videos[n]) for n in order]
        pictures = [store.submit(str(tmp_path / "a.png"), image=True) for _ in range(3)]
        clips = [future.result() for future in futures]
        assert all(future.result().is_image for future in pictures)
    assert [read_counter(clip.frames[0]) for clip in clips] == order


def test_isolated_clip_equals_the_one_decoded_here(videos):
    budget = PixelBudget(16, 256, 4096)
    process = DecodeProcess()
    try:
        for resize in (None, budget):
            there = load_clip(videos[0], resize=resize, process=process, timeout=60)
            here = load_clip(videos[0], resize=resize)
            assert torch.equal(there.frames, here.frames)
            assert (there.key, there.timestamps) == (here.key, here.timestamps)
    finally:
        process.close()


def test_clip_larger_than_the_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("rlaif_fast.video.isolate.CHUNK_BYTES", 3 * 96 * 128 * 3)
    path = write_video(tmp_path / "a.webm", counter_frames(20))
    process = DecodeProcess()
    try:
        clip = load_clip(path, sampling=FrameSampling(nframes=20), process=process, timeout=60)
    finally:
        process.close()
    assert [read_counter(f) for f in clip.frames] == list(range(20))


def test_hung_decoder_is_timed_out_and_replaced(videos):
    with ClipStore(workers=1, max_bad_fraction=1.0, cache=ClipCache(0)) as store:
        first = store.load(videos[0])
        (pid,) = store._pool.pids
        os.kill(pid, signal.SIGSTOP)
        store.timeout = 1.0
        began = time.monotonic()
        with pytest.raises(VideoError, match=r"took longer than 1 s"):
            store.load(videos[1])
        assert time.monotonic() - began < 20
        assert not running(pid)
        store.timeout = 60.0
        assert store.load(videos[2]).frames.shape == first.frames.shape
        with pytest.raises(VideoError, match=r"took longer than 1 s"):
            store.load(videos[1])  # in quarantine: not tried again
        pids = store._pool.pids
    assert not any(running(pid) for pid in pids)


STOPPED_WHILE_WAITING = """
import os, sys
from rlaif_fast.video import ClipStore
with ClipStore(workers=1, timeout=6.0) as store:
    store.load(sys.argv[1])
    print(store._pool.pids[0], flush=True)
    os.read(0, 1)  # the decoding process is stopped before the next file is asked for
    pending = store.submit(sys.argv[2])
    print("asked", flush=True)
    print(len(pending.result().frames), flush=True)
"""


def test_time_in_which_the_run_itself_was_stopped_is_not_the_fault_of_a_file(videos):
    """As by Ctrl-Z: every process of the run stands still for longer than a file may take."""
    script = [sys.executable, "-c", STOPPED_WHILE_WAITING, videos[0], videos[1]]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        decoding = int(run.stdout.readline())
        os.kill(decoding, signal.SIGSTOP)
        run.stdin.write("x")
        run.stdin.flush()
        assert run.stdout.readline() == "asked\n"
        os.kill(run.pid, signal.SIGSTOP)
        time.sleep(8)
        for pid in (decoding, run.pid):
            os.kill(pid, signal.SIGCONT)
        assert int(run.stdout.readline()) > 0
        run.stdin.close()
    assert run.returncode == 0


def test_crashed_decoder_costs_one_file(videos):
    process = DecodeProcess()
    try:
        scan, _ = process.scan(videos[0], 60)
        os.kill(process.pid, signal.SIGSTOP)
        killer = threading.Timer(0.2, os.kill, (process.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(VideoError, match=r"decoder crashed on it \(signal 9\)"):
            list(process.frames(videos[0], scan, [0], 60))
        killer.join()
        assert [index for index, _ in process.frames(videos[0], scan, [3, 1], 60)] == [1, 3]
    finally:
        process.close()
    assert process.pid is None


def test_reader_that_stops_half_way_leaves_a_usable_process(videos):
    process = DecodeProcess()
    try:
        scan, _ = process.scan(videos[0], 60)
        frames = process.frames(videos[0], scan, range(40), 60)
        next(frames)
        frames.close()
        assert len(list(process.frames(videos[0], scan, range(40), 60))) == 40
    finally:
        process.close()


def test_what_is_given_up_at_the_end_is_no_bad_file(videos, tmp_path, caplog):
    store = ClipStore(FrameSampling(nframes=4), workers=1, quarantine=tmp_path / "bad.jsonl")
    store.load(videos[0])
    (pid,) = store._pool.pids
    os.kill(pid, signal.SIGSTOP)  # in the middle of the next file
    given_up = store.submit(videos[1])
    while store._threads._work_queue.qsize():
        time.sleep(0.01)
    store.close()
    with pytest.raises(VideoError, match="it was stopped"):
        given_up.result()
    assert not (tmp_path / "bad.jsonl").exists() and not store.stats.bad_files and not caplog.text


def test_closing_while_loading_does_not_hang(videos):
    store = ClipStore(workers=2, cache=ClipCache(0))
    futures = [store.submit(path) for path in videos]
    futures[0].result()
    pids = store._pool.pids
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 20
    assert not any(running(pid) for pid in pids)


@pytest.mark.parametrize("options", [{"workers": 0}, {"max_bad_fraction": 1.5}, {"timeout": 0}])
def test_bad_options(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        ClipStore(**options)
