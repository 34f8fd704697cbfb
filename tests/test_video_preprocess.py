"""Resizing and the assembly of `Media`."""

import numpy as np
import pytest
import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.video import (
    Clip,
    PatchSpec,
    PixelBudget,
    VideoError,
    grid_timestamps,
    load_image,
    preprocess,
    smart_resize,
)
from rlaif_fast.video.preprocess import resize_frames
from rlaif_fast.video.testing import counter_frame

# Made by running `smart_resize` of qwen-vl-utils 0.0.14 (with torchvision replaced by a stub).
PUBLISHED = [
    (1080, 1920, 28, 3136, 602112, (560, 1008)),
    (1080, 1920, 28, 3136, 50176, (168, 280)),
    (1080, 1920, 32, 131072, 786432, (640, 1152)),
    (64, 64, 16, 1024, 196608, (64, 64)),
    (64, 64, 16, 32768, 196608, (192, 192)),
    (33, 47, 28, 3136, 602112, (56, 84)),
    (33, 47, 28, 100352, 602112, (280, 392)),
    (1, 1, 28, 3136, 602112, (56, 56)),
    (100, 19000, 28, 100352, 602112, (56, 10668)),
    (4320, 7680, 28, 100352, 602112, (560, 1008)),
    (360, 640, 32, 3136, 50176, (160, 288)),
    (479, 641, 28, 3136, 50176, (168, 252)),
    (98, 154, 28, 3136, 602112, (112, 168)),  # both halves are rounded to even
]


def clip(frames=4, height=48, width=64, **facts):
    pixels = torch.arange(frames * height * width * 3).remainder(251).to(torch.uint8)
    pixels = pixels.view(frames, height, width, 3)
    return Clip(pixels, tuple(i * 0.5 for i in range(frames)), "k", "clip.mp4", **facts)


@pytest.mark.parametrize(("height", "width", "factor", "least", "most", "size"), PUBLISHED)
def test_smart_resize_is_the_published_arithmetic(height, width, factor, least, most, size):
    assert smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most) == size


def test_smart_resize_never_gives_an_empty_side():
    assert smart_resize(100, 19000, factor=28, min_pixels=3136, max_pixels=50176) == (28, 3080)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 5, 2, 4, 9), "at least 1"), ((5, 5, 2, 9, 4), "min_pixels"), ((1, 201, 2, 4, 9), "aspect ratio")],
)
def test_smart_resize_refuses(arguments, words):
    height, width, factor, least, most = arguments
    with pytest.raises(ValueError, match=words):
        smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)


def test_budget_shares_total_pixels_over_the_frames():
    # qwen-vl-utils: max(min(max_pixels, total_pixels / nframes * 2), int(min_pixels * 1.05))
    budget = PixelBudget(28, 100352, 602112, total_pixels=28 * 28 * 2000)
    assert budget.size("p", 4, 1080, 1920) == smart_resize(
        1080, 1920, factor=28, min_pixels=100352, max_pixels=602112
    )
    assert budget.size("p", 16, 1080, 1920) == smart_resize(
        1080, 1920, factor=28, min_pixels=100352, max_pixels=196000
    )
    assert budget.size("p", 768, 1080, 1920) == smart_resize(
        1080, 1920, factor=28, min_pixels=100352, max_pixels=105369
    )


def test_budget_refuses_limits_that_exclude_each_other():
    with pytest.raises(UsageError, match="min_pixels"):
        PixelBudget(28, 100, 99)


def test_resizing_in_budget_is_idempotent():
    budget = PixelBudget(28, 3136, 50176)
    once = budget.size("p", 4, 1080, 1920)
    assert budget.size("p", 4, *once) == once


@pytest.mark.parametrize(("patch", "dim"), [(14, 1176), (16, 1536), (8, 384)])
def test_media_of_a_video(patch, dim):
    spec = PatchSpec(patch)
    media = preprocess(clip(sample_fps=2.0), spec, min_pixels=spec.factor**2, max_pixels=4 * spec.factor**2)
    t, h, w = media.grid_thw
    assert t == 2
    assert (h * patch) % spec.factor == 0
    assert h * w * patch**2 <= 4 * spec.factor**2
    assert media.patches.shape == (t * h * w, dim)
    assert media.patches.dtype == torch.float32
    assert media.is_video
    assert media.seconds_per_grid == 1.0
    assert media.timestamps == (0.25, 1.25)


def test_media_of_an_image_repeats_it_over_the_temporal_patch():
    spec = PatchSpec(8)
    media = preprocess(clip(1, is_image=True), spec, min_pixels=256, max_pixels=4096, total_pixels=256)
    assert media.grid_thw == (1, 6, 8)
    assert not media.is_video
    assert media.timestamps == ()
    both = media.patches.view(-1, 3, 2, 64)
    assert torch.equal(both[:, :, 0], both[:, :, 1])


def test_an_image_is_loaded_as_large_as_its_patches_are(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image.fromarray(counter_frame(3)).save(path)  # 96 x 128
    spec = PatchSpec(8)
    budget = spec.budget(256, 4096, 256)
    loaded = load_image(path, resize=budget)
    limits = {"min_pixels": 256, "max_pixels": 4096, "total_pixels": 256}
    grids = [preprocess(clip, spec, **limits).grid_thw for clip in (loaded, load_image(path))]
    assert loaded.frames.shape == (1, 48, 64, 3)
    assert grids == [(1, 6, 8)] * 2


def test_key_changes_with_what_changes_the_patches():
    limits = {"min_pixels": 256, "max_pixels": 4096}
    keys = {
        preprocess(clip(), PatchSpec(8), **limits).key,
        preprocess(clip(), PatchSpec(16), **limits).key,
        preprocess(clip(), PatchSpec(8, mean=(0.4, 0.5, 0.5)), **limits).key,
        preprocess(clip(), PatchSpec(8), min_pixels=256, max_pixels=1024).key,
        preprocess(clip(), PatchSpec(8), **limits, dtype=torch.bfloat16).key,
    }
    assert len(keys) == 5
    assert preprocess(clip(), PatchSpec(8), **limits).key in keys


def test_odd_number_of_frames_repeats_the_last_time():
    assert grid_timestamps((0.0, 1.0, 2.0), 2) == (0.5, 2.0)


def test_resize_equals_pil_bicubic():
    """Pillow is the other backend. Both round in fixed point; a picture, unlike noise, does not clip."""
    image = pytest.importorskip("PIL.Image")
    frames = torch.from_numpy(np.stack([counter_frame(n, 480, 640) for n in (3, 700)]))
    for size in ((224, 308), (960, 1280)):
        for mine, frame in zip(resize_frames(frames, size), frames, strict=True):
            theirs = image.fromarray(frame.numpy()).resize(size[::-1], image.Resampling.BICUBIC)
            assert (mine.int() - torch.from_numpy(np.array(theirs)).int()).abs().max() <= 2


def test_thread_like_video_is_a_bad_file():
    with pytest.raises(VideoError, match=r"clip\.mp4: 402x2"):
        preprocess(clip(2, 2, 402), PatchSpec(8), min_pixels=256, max_pixels=4096)
