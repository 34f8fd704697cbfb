"""Fusion and agreement against brute force and known values."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_fast.oracle.fusion import (
    agreement,
    borda,
    kemeny,
    kendall_tau,
    kendall_w,
    preferences,
    ranks_from_scores,
    top1_agreement,
)


def profiles(max_size=5, max_orders=5):
    return st.integers(2, max_size).flatmap(
        lambda g: st.lists(
            st.lists(st.integers(0, g - 1), min_size=g, max_size=g).map(tuple),
            min_size=1,
            max_size=max_orders,
        )
    )


def contradicted(order, orders):
    """Votes that placing the responses in this sequence contradicts."""
    wins, _ = preferences(orders)
    return sum(max(0.0, wins[b][a] - wins[a][b]) for a, b in itertools.combinations(order, 2))


def test_ranks_from_scores():
    assert ranks_from_scores([0.1, 0.9, 0.9, None, 0.5]) == (2, 0, 0, None, 1)
    assert ranks_from_scores([0.1 + 0.2, 0.3]) == (0, 0)
    assert ranks_from_scores([]) == ()
    with pytest.raises(ValueError, match="NaN"):
        ranks_from_scores([float("nan"), 1.0])


def upper_signs(values):
    matrix = np.sign(np.subtract.outer(values, values))
    return matrix[np.triu_indices(len(values), 1)]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8))
def test_tau_b_by_its_definition(pairs):
    first, second = (upper_signs(values) for values in zip(*pairs))
    norm = np.sqrt((first**2).sum() * (second**2).sum())
    tau = kendall_tau(*zip(*pairs))
    assert (tau is None) == (norm == 0)
    if tau is not None:
        assert tau == pytest.approx((first * second).sum() / norm, abs=1e-9)


@given(profiles())
@settings(max_examples=60)
def test_kemeny_is_the_mean_over_all_optimal_orders(orders):
    size = len(orders[0])
    costs = {order: contradicted(order, orders) for order in itertools.permutations(range(size))}
    optimal = [order for order, cost in costs.items() if cost < min(costs.values()) + 1e-9]
    means = [sum(order.index(i) for order in optimal) / len(optimal) for i in range(size)]
    assert kemeny(orders) == ranks_from_scores([-mean for mean in means])


def test_kemeny_exact_and_local_agree_on_easy_profiles():
    generator = random.Random(0)
    for size in (9, 12):
        truth = list(range(size))
        orders = [tuple(truth)] * 2
        for _ in range(3):
            swapped = list(truth)
            at = generator.randrange(size - 1)
            swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
            orders.append(tuple(swapped))
        assert kemeny(orders) == tuple(truth)


def test_kemeny_local_search_beats_its_start():
    generator = random.Random(1)
    for _ in range(10):
        orders = [tuple(generator.sample(range(10), 10)) for _ in range(5)]
        fused, start = kemeny(orders), borda(orders)
        cost = [
            contradicted(sorted(range(10), key=lambda i: order[i]), orders)  # type: ignore[index]
            for order in (fused, start)
        ]
        assert cost[0] <= cost[1]


@given(profiles(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_relabelling_relabels(orders, generator):
    size = len(orders[0])
    relabel = generator.sample(range(size), size)
    moved = [tuple(order[i] for i in relabel) for order in orders]
    for fuse in (borda, kemeny):
        fused = fuse(orders)
        assert fuse(moved) == tuple(fused[i] for i in relabel)
    assert kendall_w(moved) == pytest.approx(kendall_w(orders))


def test_the_local_search_does_not_depend_on_how_the_responses_are_numbered():
    generator = random.Random(0)
    for size in (9, 12, 16) * 60:
        count = generator.randint(2, 4)
        orders = [tuple(generator.randrange(size) for _ in range(size)) for _ in range(count)]
        relabel = generator.sample(range(size), size)
        fused = kemeny(orders)
        assert kemeny([tuple(order[i] for i in relabel) for order in orders]) == tuple(
            fused[i] for i in relabel
        )


@given(profiles(max_size=10))
@settings(max_examples=60)
def test_orders_and_their_reverses_cancel(orders):
    both = orders + [tuple(-rank for rank in order) for order in orders]
    for fuse in (borda, kemeny):
        assert set(fuse(both)) == {0}


@given(st.integers(3, 7), st.integers(2, 5), st.randoms(use_true_random=False))
def test_agreement_is_the_mean_spearman_correlation(size, k, generator):
    orders = [tuple(generator.sample(range(size), size)) for _ in range(k)]
    mean = np.corrcoef(orders)[np.triu_indices(k, 1)].mean()
    w = kendall_w(orders)
    assert (k * w - 1) / (k - 1) == pytest.approx(mean, abs=1e-9)
    assert agreement(orders) == pytest.approx(max(0.0, mean), abs=1e-9)


def test_w_with_ties():
    orders = [(0, 1, 1, 3, 4, 5), (0, 0, 2, 3, 4, 5), (0, 1, 1, 1, 2, 2)]
    sums = np.array([1 + 1.5 + 1, 2.5 + 1.5 + 3, 2.5 + 3 + 3, 4 + 4 + 3, 5 + 5 + 5.5, 6 + 6 + 5.5])
    spread = ((sums - sums.mean()) ** 2).sum()
    ties = 6 + 6 + (24 + 6)
    assert kendall_w(orders) == pytest.approx(12 * spread / (9 * 210 - 3 * ties))


def test_agreement_is_free_of_chance():
    assert agreement([(0, 1, 2)] * 4) == 1.0
    assert agreement([(0, 1, 2), (2, 1, 0)]) == 0.0
    assert agreement([(0, 0, 0)] * 2) == 1.0
    assert agreement([(0, 1, 2)]) == 1.0
    assert agreement([(0, None, None), (None, 0, 1)]) == 0.0
    generator = random.Random(2)
    noise = [agreement([generator.sample(range(6), 6) for _ in range(4)]) for _ in range(400)]
    assert sum(noise) / len(noise) < 0.12


def test_what_was_not_judged_stays_so():
    orders = [(0, None, 1), (0, None, 1), (None, None, 0)]
    assert borda(orders) == kemeny(orders) == (0, None, 1)
    assert kendall_tau((0, None, 1, 2), (0, 5, None, 1)) == 1.0
    assert kendall_tau((0, 0), (0, 1)) is None
    with pytest.raises(ValueError, match="one length"):
        borda([(0, 1), (0, 1, 2)])


def test_top1_agreement():
    assert top1_agreement((0, 1, 2), (0, 2, 1)) == 1.0
    assert top1_agreement((0, 0, 1), (0, 1, 1)) == 0.5
    assert top1_agreement((0, 1), (1, 0)) == 0.0
    assert top1_agreement((None, None), (0, 1)) is None
