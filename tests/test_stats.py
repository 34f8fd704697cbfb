"""Wilson intervals against published values and their definition; the bootstrap against the exact answer."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_fast.report.stats import paired_bootstrap, wilson_interval


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
    assert paired_bootstrap(before, before) == paired_bootstrap(before, before, seed=7)
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


def test_bootstrap_depends_on_its_seed_alone():
    before, after = [0, 1, 0, 1, 1], [1, 1, 0, 0, 1]
    assert paired_bootstrap(before, after, seed=3) == paired_bootstrap(before, after, seed=3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: wilson_interval(0, 0), "n:"),
        (lambda: wilson_interval(3, 2), "correct:"),
        (lambda: wilson_interval(1, 2, confidence=1.0), "confidence:"),
        (lambda: paired_bootstrap([], []), "before, after:"),
        (lambda: paired_bootstrap([0, 1], [0, 1], clusters=["a"]), "clusters:"),
    ],
)
def test_wrong_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
