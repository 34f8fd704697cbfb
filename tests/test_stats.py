"""Intervals of a share against published values and how often they hold it; the bootstrap against the exact answer."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_fast.report.stats import RESAMPLES, paired_bootstrap, share_interval, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # scipy.stats.binomtest(correct, n).proportion_ci(method="wilson")
    [(15, 50, 0.1910, 0.4375), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_interval_matches_known_values(correct, n, low, high):
    interval = wilson_interval(correct, n)
    assert interval.mean == correct / n
    assert interval.low == pytest.approx(low, abs=1e-4)
    assert interval.high == pytest.approx(high, abs=1e-4)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_where_the_share_is_z_standard_errors_away(case):
    correct, n = case
    interval = wilson_interval(correct, n, confidence=0.9)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    z = 1.6448536269514722
    for bound in (interval.low, interval.high):
        if 0 < bound < 1:
            standard_error = math.sqrt(bound * (1 - bound) / n)
            assert abs(bound - interval.mean) == pytest.approx(z * standard_error, rel=1e-6, abs=1e-9)


def test_wider_confidence_gives_a_wider_interval():
    narrow, wide = wilson_interval(30, 80, 0.8), wilson_interval(30, 80, 0.99)
    assert wide.low < narrow.low and narrow.high < wide.high


def test_a_share_of_independent_answers_has_wilsons_interval():
    right = [1, 1, 0, 1, 0, 1, 1, 0, 1, 1]
    found, wilson = share_interval(right, range(10)), wilson_interval(7, 10)
    assert [found.mean, found.low, found.high] == pytest.approx([wilson.mean, wilson.low, wilson.high])


def test_answers_of_one_video_count_as_far_as_they_are_independent():
    right = [1, 1, 0, 1, 0, 1, 1, 0, 1, 1] * 5
    once = share_interval(right, range(50))
    repeated = share_interval(np.repeat(right, 8), np.repeat(range(50), 8).tolist())
    assert [repeated.low, repeated.high] == pytest.approx([once.low, once.high], abs=2e-3)
    # Nobody knows how far those that are all alike depend on one another: a video counts once.
    assert share_interval([1] * 40, [n // 4 for n in range(40)]) == wilson_interval(10, 10)
    assert share_interval([0] * 40, ["a"] * 40) == wilson_interval(0, 1)
    mixed = share_interval([1, 0] * 20, ["a"] * 40)
    assert [mixed.low, mixed.high] == pytest.approx(
        [0.0546, 0.9454], abs=1e-4
    )  # Wilson's of half an answer of one


@pytest.mark.parametrize(
    ("right", "independent"),
    # Answers of a video all alike; as many right ones of every video; nearly so, which counts no answer twice.
    [([1, 1, 0, 0, 1, 1, 1, 1], 24 / 7), ([1, 0] * 4, 8), ([1, 0, 1, 0, 1, 0, 1, 1], 8)],
)
def test_a_share_counts_as_many_answers_as_give_its_variance(right, independent):
    found = share_interval(right, [0, 0, 1, 1, 2, 2, 3, 3])
    for bound in (found.low, found.high):
        assert 1.959964**2 * bound * (1 - bound) / (bound - found.mean) ** 2 == pytest.approx(independent)


@pytest.mark.parametrize(("videos", "share"), [(48, 0.5), (10, 0.9), (5, 0.9)])
def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says(videos, share):
    """Four questions a video whose answers go together; without the videos it held it four times of five."""
    generator, clusters = np.random.default_rng(0), [n // 4 for n in range(4 * videos)]
    held = held_by_wilson = 0
    for _ in range(400):
        chances = generator.beta(
            share * 7 / 3, (1 - share) * 7 / 3, videos
        )  # answers of a video correlate by 0.3
        right = (generator.random((videos, 4)) < chances[:, None]).ravel().astype(int)
        found, wilson = (
            share_interval(right.tolist(), clusters),
            wilson_interval(int(right.sum()), len(right)),
        )
        held += found.low <= share <= found.high
        held_by_wilson += wilson.low <= share <= wilson.high
    assert held >= 0.93 * 400 > held_by_wilson


def test_bootstrap_agrees_with_the_normal_limit():
    generator = np.random.default_rng(1)
    before = generator.integers(0, 2, 2000)
    after = np.where(generator.random(2000) < 0.3, 1, before)
    change = after - before
    interval = paired_bootstrap(before, after)
    half = 1.96 * change.std() / math.sqrt(len(change))
    assert interval.mean == pytest.approx(change.mean())
    assert interval.low == pytest.approx(change.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(change.mean() + half, abs=0.1 * half)


def test_bootstrap_is_paired():
    before = [0, 1] * 50
    interval = paired_bootstrap(before, before)
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_repeating_every_question_of_a_video_does_not_narrow_the_interval():
    before, after = [0, 0, 1, 1, 0, 1, 0, 0], [1, 0, 1, 0, 1, 1, 1, 0]
    once = paired_bootstrap(before, after)
    videos = [index // 10 for index in range(80)]
    repeated = paired_bootstrap(np.repeat(before, 10), np.repeat(after, 10), clusters=videos)
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))
    unaware = paired_bootstrap(np.repeat(before, 10), np.repeat(after, 10))
    assert unaware.high - unaware.low < 0.5 * (once.high - once.low)


def test_bootstrap_draws_whole_videos_and_weighs_each_by_its_questions():
    generator = np.random.default_rng(5)
    before, change = generator.random(30), generator.normal(size=30)
    videos = [*range(5), *[5] * 10, *[6] * 15]
    parts = np.split(change, [1, 2, 3, 4, 5, 15])
    draws = np.random.default_rng(0).integers(7, size=(RESAMPLES, 7))
    means = [np.concatenate([parts[video] for video in drawn]).mean() for drawn in draws]
    interval = paired_bootstrap(before, before + change, clusters=videos)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: wilson_interval(0, 0), "n:"),
        (lambda: wilson_interval(3, 2), "correct:"),
        (lambda: wilson_interval(1, 2, confidence=1.0), "confidence:"),
        (lambda: paired_bootstrap([], []), "before, after:"),
        (lambda: paired_bootstrap([0, 1], [0, 1], clusters=["a"]), "clusters:"),
        (lambda: share_interval([], []), "right:"),
        (lambda: share_interval([0, 1], ["a"]), "clusters:"),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
