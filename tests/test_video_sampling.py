"""Frame choice against qwen-vl-utils."""

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_fast.video import FrameSampling, VideoError, VideoInfo, sample_indices
from rlaif_fast.video.scan import seconds_since_first


def video(frames, fps, timestamps=None):
    times = tuple(i / fps for i in range(frames)) if timestamps is None else tuple(timestamps)
    return VideoInfo(
        path="clip.mp4",
        codec="vp9",
        width=64,
        height=64,
        frames=frames,
        fps=fps,
        duration=frames / fps,
        timestamps=times,
        variable_rate=timestamps is not None,
    )


# Made by running `calculate_video_frame_range`, `smart_nframes` and the linspace of `_read_video_torchcodec`
# of qwen-vl-utils 0.0.14 on these arguments (with torchvision, which those functions do not use, replaced by
# a stub).
PUBLISHED = [
    ({}, 60, 30.0, [0, 20, 39, 59], 2.0),
    ({}, 100, 25.0, [0, 14, 28, 42, 57, 71, 85, 99], 2.0),
    (
        {},
        301,
        29.97,
        [0, 16, 32, 47, 63, 79, 95, 111, 126, 142, 158, 174, 189, 205, 221, 237, 253, 268, 284, 300],
        1.9913621262458472,
    ),
    ({"fps": 1.0, "max_frames": 8}, 900, 30.0, [0, 128, 257, 385, 514, 642, 771, 899], 8 / 30),
    ({"nframes": 7}, 50, 10.0, [0, 7, 14, 21, 28, 35, 42, 49], 1.6),
    ({"nframes": 9}, 50, 10.0, [0, 7, 14, 21, 28, 35, 42, 49], 1.6),
    ({"fps": 2.0, "max_frames": 7}, 600, 30.0, [0, 120, 240, 359, 479, 599], 0.3),
    ({"min_frames": 5}, 20, 30.0, [0, 4, 8, 11, 15, 19], 9.0),
    ({}, 5, 30.0, [0, 1, 3, 4], 24.0),
    ({"fps": 4.0}, 3, 30.0, [0, 2], 20.0),
    ({"video_start": 1.0, "video_end": 3.0}, 150, 25.0, [25, 42, 58, 75], 1.9607843137254901),
    ({"video_start": 0.99}, 75, 23.976, [24, 41, 57, 74], 1.8804705882352941),
    ({"video_end": 2.5, "nframes": 6}, 100, 12.0, [0, 6, 12, 18, 24, 30], 2.32258064516129),
]


@pytest.mark.parametrize(("options", "frames", "fps", "indices", "sample_fps"), PUBLISHED)
def test_even_rate_is_the_published_arithmetic(options, frames, fps, indices, sample_fps):
    info = video(frames, fps)
    assert sample_indices(info, **options) == indices
    assert FrameSampling(**options).sample(info)[1] == pytest.approx(sample_fps, rel=1e-12)


def test_long_video_is_capped_at_768_frames():
    indices = sample_indices(video(40_000, 24.0))
    assert len(indices) == 768
    assert indices[:5] == [0, 52, 104, 156, 209]
    assert indices[-5:] == [39790, 39843, 39895, 39947, 39999]


@given(
    frames=st.integers(2, 5000),
    fps=st.floats(1.0, 120.0),
    rate=st.floats(0.1, 60.0),
    least=st.integers(1, 32),
    more=st.integers(0, 500),
    factor=st.sampled_from([1, 2, 4]),
)
def test_count_order_and_range(frames, fps, rate, least, more, factor):
    try:
        indices = sample_indices(
            video(frames, fps), fps=rate, min_frames=least, max_frames=least + more, frame_factor=factor
        )
    except VideoError:
        assert frames < factor or (least + more) < factor
        return
    assert len(indices) % factor == 0
    assert len(indices) <= max(least + more, factor)
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    assert indices[-1] == (frames - 1 if len(indices) > 1 else 0)


def test_uneven_rate_takes_the_frame_on_screen():
    # Ten frames in the first second, then one that stays for nine seconds.
    times = [i / 10 for i in range(10)] + [1.0, 10.0]
    info = video(12, 12 / 10, timestamps=times)
    indices = sample_indices(info, nframes=6)
    wanted = [10.0 * k / 5 for k in range(6)]
    assert indices == [0, 10, 10, 10, 10, 11]
    for moment, index in zip(wanted, indices, strict=True):
        assert times[index] <= moment + 1e-9
        assert index == 11 or times[index + 1] > moment


def test_uneven_rate_respects_start_and_end():
    times = [0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 9.0]
    indices = sample_indices(video(7, 0.8, timestamps=times), nframes=2, video_start=2.5, video_end=4.0)
    assert indices == [3, 5]


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        (1, {}, "holds 1 frame, but 2"),
        (5, {"nframes": 8}, "holds 5 frames, but 8"),
        (5, {"nframes": 1}, "nframes is 1, and the model sees 2 frames at a time"),
        (5, {"min_frames": 1, "max_frames": 1}, "max_frames is 1, and the model sees 2 frames at a time"),
        (50, {"video_start": 9.0}, "no frames between 9 s"),
        (50, {"video_start": 3.0, "video_end": 2.0}, "no frames between 3 s and 2 s"),
    ],
)
def test_too_few_frames_names_the_file(frames, options, words):
    with pytest.raises(VideoError, match=words) as caught:
        sample_indices(video(frames, 10.0), **options)
    assert caught.value.path == "clip.mp4"


@pytest.mark.parametrize(
    "options",
    [{"fps": 0}, {"fps": math.nan}, {"nframes": 0}, {"frame_factor": 0}, {"min_frames": 9, "max_frames": 8}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FrameSampling(**options)


@pytest.mark.parametrize("name", ["video_start", "video_end"])
def test_no_part_of_a_video_begins_before_it(name):
    with pytest.raises(ValueError, match=f"{name} must be a finite number of seconds, at least 0, got -1"):
        FrameSampling(**{name: -1.0})


@pytest.mark.parametrize("name", ["video_start", "video_end", "fps"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        FrameSampling(**{name: value})


@given(
    st.lists(st.integers(-(10**15), 10**15), min_size=1, max_size=5),
    st.fractions(min_value=Fraction(1, 10**9), max_value=10**3),
)
def test_seconds_are_those_of_exact_fractions(pts, base):
    assert seconds_since_first(pts, base) == tuple(float((p - pts[0]) * base) for p in pts)


def test_the_times_of_an_hour_cost_little():
    """They are asked for with each use of a clip, also of one in the cache."""
    pts, base = range(0, 108_000 * 512, 512), Fraction(1, 15_360)
    began = time.process_time()
    seconds = seconds_since_first(pts, base)
    took, began = time.process_time() - began, time.process_time()
    assert seconds == tuple(float((p - pts[0]) * base) for p in pts)
    assert took < (time.process_time() - began) / 3
