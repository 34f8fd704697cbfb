"""The clip cache: what it returns, what it forgets, and what a killed process leaves behind."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlaif_fast.errors import UsageError
from rlaif_fast.video import (
    Clip,
    ClipCache,
    FrameSampling,
    PixelBudget,
    VideoError,
    clips,
    image,
    load_clip,
    load_frames,
    load_image,
)
from rlaif_fast.video.testing import counter_frames, read_counter, write_video


def clip(key="k1", size=8, value=0):
    frames = torch.full((2, size, size, 3), value, dtype=torch.uint8)
    frames[1, 0, 0] = torch.tensor([1, 2, 3])
    return Clip(frames, (0.0, 1 / 3), key, "some/путь.mp4", sample_fps=2.5)


def same(a, b):
    return torch.equal(a.frames, b.frames) and (a.timestamps, a.key, a.path, a.is_image, a.sample_fps) == (
        b.timestamps,
        b.key,
        b.path,
        b.is_image,
        b.sample_fps,
    )


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("v") / "a.webm", counter_frames(30))


def test_memory_then_disk(tmp_path):
    cache = ClipCache(disk_dir=tmp_path)
    assert cache.get("k1") is None
    cache.put(clip())
    assert cache.get("k1") is not None
    assert (cache.memory_hits, cache.disk_hits, cache.misses) == (1, 0, 1)
    fresh = ClipCache(disk_dir=tmp_path)
    assert same(fresh.get("k1"), clip())
    assert same(fresh.get("k1"), clip())
    assert (fresh.memory_hits, fresh.disk_hits, fresh.misses) == (1, 1, 0)


def test_memory_budget_forgets_the_least_recently_used():
    cache = ClipCache(memory_bytes=3 * clip().frames.nbytes)
    for key in "abc":
        cache.put(clip(key))
    cache.get("a")
    cache.put(clip("d"))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert cache.held_bytes[0] == 3 * clip().frames.nbytes
    cache.put(clip("huge", size=64))
    assert cache.get("huge") is None
    assert cache.get("a") is not None


def test_disk_budget_counts_what_others_wrote(tmp_path):
    one = ClipCache(memory_bytes=0, disk_dir=tmp_path)
    one.put(clip("a"))
    size = one.held_bytes[1]
    other = ClipCache(memory_bytes=0, disk_dir=tmp_path, disk_bytes=3 * size)
    for key in "bcd":
        one.put(clip(key))
        os.utime(tmp_path / f"{key}.clip", (1000 + ord(key),) * 2)
    other.put(clip("e"))
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 3 * size
    assert sorted(f.stem for f in tmp_path.iterdir()) == ["a", "d", "e"]  # "a" is younger than b, c and d
    assert other.held_bytes[1] == sum(f.stat().st_size for f in tmp_path.iterdir())


@pytest.mark.parametrize("where", [0, 9, 30, -1, -100])
def test_a_flipped_bit_is_a_miss(tmp_path, where):
    ClipCache(disk_dir=tmp_path).put(clip())
    file = tmp_path / "k1.clip"
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    assert ClipCache(disk_dir=tmp_path).get("k1") is None
    assert not file.exists()


@pytest.mark.parametrize("length", [0, 5, 20, 100, -1])
def test_a_short_file_is_a_miss(tmp_path, length):
    ClipCache(disk_dir=tmp_path).put(clip())
    file = tmp_path / "k1.clip"
    file.write_bytes(file.read_bytes()[:length])
    assert ClipCache(disk_dir=tmp_path).get("k1") is None


def test_file_under_another_name_is_a_miss(tmp_path):
    ClipCache(disk_dir=tmp_path).put(clip())
    (tmp_path / "k1.clip").rename(tmp_path / "k2.clip")
    assert ClipCache(disk_dir=tmp_path).get("k2") is None


def test_process_killed_while_writing(tmp_path):
    """A writer is killed again and again; whatever is then found under a clip's name is a whole clip."""
    code = """
        import sys, torch
        from rlaif_fast.video import Clip, ClipCache
        cache = ClipCache(memory_bytes=0, disk_dir=sys.argv[1])
        print("ready", flush=True)
        for i in range(100000):
            frames = torch.full((8, 256, 256, 3), i % 251, dtype=torch.uint8)
            cache.put(Clip(frames, (0.0,) * 8, f"k{i}"))
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE
    )
    writer.stdout.readline()
    while len(list(tmp_path.glob("*.clip"))) < 5:
        assert writer.poll() is None
        time.sleep(0.002)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    found = sorted(tmp_path.glob("*.clip"))
    cache = ClipCache(disk_dir=tmp_path)
    assert len(found) >= 5
    for file in found:
        number = int(file.stem[1:])
        assert (cache.get(file.stem).frames == number % 251).all()
    leftover = tmp_path / ".k9.1.2.tmp"
    leftover.write_bytes(b"half a clip")
    os.utime(leftover, (1, 1))
    ClipCache(disk_dir=tmp_path)
    assert not leftover.exists()


def test_threads_share_a_cache(tmp_path):
    cache = ClipCache(memory_bytes=4 * clip().frames.nbytes, disk_dir=tmp_path, disk_bytes=2 << 20)
    wrong = []

    def work(seed):
        for i in range(60):
            key = f"k{(i * seed) % 7}"
            found = cache.get(key)
            if found is None:
                cache.put(clip(key, value=int(key[1])))
            elif found.frames[0, 0, 0, 0] != int(key[1]):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.held_bytes[0] == 4 * clip().frames.nbytes


def test_key_is_what_decides_the_pixels(video, tmp_path):
    copy = tmp_path / "copy of it.webm"
    copy.write_bytes(video.read_bytes())
    budget = PixelBudget(16, 256, 4096)
    base = load_clip(video, resize=budget)
    assert load_clip(copy, resize=budget).key == base.key
    assert load_clip(video, sampling=FrameSampling(nframes=6), resize=budget).key != base.key
    assert load_clip(video, resize=PixelBudget(16, 256, 2048)).key != base.key
    copy.write_bytes(video.read_bytes() + b"\0" * 16)
    assert load_clip(copy, resize=budget).key != base.key


def test_cached_clip_is_not_decoded_again(video, tmp_path, monkeypatch):
    first = load_clip(video, cache=ClipCache(disk_dir=tmp_path))
    monkeypatch.setattr("rlaif_fast.video.clips.decode_sized", lambda *_: pytest.fail("decoded again"))
    assert same(load_clip(video, cache=ClipCache(disk_dir=tmp_path)), first)


def test_a_folder_that_refuses_what_is_done_to_it_costs_no_clip(tmp_path, monkeypatch):
    """As a read-only mount does: what is there is used, and nothing else ends."""
    ClipCache(disk_dir=tmp_path).put(clip())
    (tmp_path / "k3.clip").write_bytes(b"damaged")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    for name in ("unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    cache = ClipCache(memory_bytes=0, disk_dir=tmp_path)
    assert same(cache.get("k1"), clip())
    assert cache.get("k3") is None
    cache.put(clip("k2"))
    assert cache.get("k2") is None


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot use"):
        ClipCache(disk_dir=tmp_path / "file")


def test_key_cannot_leave_the_folder(tmp_path):
    with pytest.raises(ValueError, match="key"):
        ClipCache(disk_dir=tmp_path).get("../k1")


def replacing(path, other, function):
    """`function`, before which `path` becomes `other`."""

    def call(*args, **options):
        path.write_bytes(other.read_bytes())
        return function(*args, **options)

    return call


def test_a_video_replaced_while_it_is_read_is_not_kept(video, tmp_path, monkeypatch):
    path, cache, sampling = tmp_path / "a.webm", ClipCache(), FrameSampling(nframes=2)
    other = write_video(tmp_path / "b.webm", list(counter_frames(60))[30:])
    path.write_bytes(video.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(clips, "by_name", replacing(path, other, clips.by_name))
        with pytest.raises(VideoError, match="changed while it was read"):
            load_clip(path, sampling=sampling, cache=cache)
    assert list(map(read_counter, load_clip(path, sampling=sampling, cache=cache).frames)) == [30, 59]
    assert list(map(read_counter, load_clip(video, sampling=sampling, cache=cache).frames)) == [0, 29]


@pytest.mark.parametrize("as_video", [False, True])
def test_a_picture_replaced_while_it_is_read_is_not_kept(tmp_path, monkeypatch, as_video):
    path, other, cache = tmp_path / "a.png", tmp_path / "b.png", ClipCache()

    def load():
        if as_video:
            return load_frames("film", [str(path)] * 2, sampling=FrameSampling(), cache=cache)
        return load_image(path, cache=cache)

    Image.new("RGB", (8, 8), "red").save(path)
    first = path.read_bytes()
    Image.new("RGB", (8, 8), "navy").save(other)
    function = "load_image" if as_video else "_read"
    with monkeypatch.context() as patch:
        patch.setattr(image, function, replacing(path, other, getattr(image, function)))
        with pytest.raises(VideoError, match="changed while it was read"):
            load()
    assert load().frames[0, 0, 0].tolist() == [0, 0, 128]
    path.write_bytes(first)
    assert load().frames[0, 0, 0].tolist() == [255, 0, 0]
