"""Corrupted feedback: what each kind does to known scores, and what none of them does."""

import statistics

import pytest

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Ranking, RankRequest
from rlaif_fast.oracle.feedback import CORRUPTIONS, CorruptedOracle
from rlaif_fast.oracle.fusion import ranks_from_scores

SCORES = (0.1, 0.9, 0.5, 0.5, 0.0, 1.0)


class Scored:
    name = "scored"
    gives_scores = True

    def rank(self, requests):
        return [Ranking(ranks=ranks_from_scores(SCORES), scores=SCORES) for _ in requests]


def requests(count=400):
    return [
        RankRequest(id=str(n), question="q", responses=tuple(f"r{i}" for i in range(len(SCORES))))
        for n in range(count)
    ]


def corrupted(kind, strength=None, count=400, seed=0):
    return CorruptedOracle(Scored(), kind=kind, strength=strength, seed=seed).rank(requests(count))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_ranks_follow_the_corrupted_scores_and_draws_do_not_depend_on_batches(kind):
    oracle = CorruptedOracle(Scored(), kind=kind, seed=3)
    together = oracle.rank(requests(20))
    alone = [oracle.rank([request])[0] for request in reversed(requests(20))][::-1]
    assert together == alone
    assert all(ranking.ranks == ranks_from_scores(ranking.scores) for ranking in together)
    assert together != CorruptedOracle(Scored(), kind=kind, seed=4).rank(requests(20)) or kind in (
        "grades",
        "slot_bias_debiased",
    )


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_equal_responses_stay_equal(kind):
    request = RankRequest(id="1", question="q", responses=("same",) * 2 + ("a", "b", "c", "d"))

    class Equal(Scored):
        def rank(self, requests):
            return [
                Ranking(ranks=(0, 0, 1, 2, 3, 4), scores=(1.0, 1.0, 0.8, 0.6, 0.3, 0.0)) for _ in requests
            ]

    for seed in range(20):
        scores = CorruptedOracle(Equal(), kind=kind, seed=seed).rank([request])[0].scores
        assert scores[0] == scores[1]


def test_gaussian_noise_has_its_deviation():
    noise = [ranking.scores[0] - SCORES[0] for ranking in corrupted("gaussian", 0.3)]
    assert statistics.stdev(noise) == pytest.approx(0.3, rel=0.15)


def test_noise_on_noise_is_drawn_anew():
    """As where a run has both `feedback` and `oracle_noise`, with its one seed."""
    once = CorruptedOracle(Scored(), kind="gaussian", strength=0.3)
    twice = CorruptedOracle(once, kind="gaussian", strength=0.3)
    first = [ranking.scores[0] - SCORES[0] for ranking in once.rank(requests())]
    both = [ranking.scores[0] - SCORES[0] for ranking in twice.rank(requests())]
    second = [total - part for total, part in zip(both, first)]
    assert statistics.stdev(both) == pytest.approx(0.3 * 2**0.5, rel=0.15)
    assert abs(statistics.correlation(first, second)) < 0.15
    assert twice.identity != CorruptedOracle(Scored(), kind="gaussian", strength=0.3).identity


def test_heavy_tails_are_small_mostly_and_enormous_at_times():
    noise = [
        abs(r.scores[i] - SCORES[i]) / 0.15
        for r in corrupted("heavy_tails", 0.15)
        for i in range(len(SCORES))
    ]
    # Quantiles of |t| with 1.5 degrees of freedom: 0.89 (50%), 3.19 (90%), 15.2 (99%).
    assert statistics.median(noise) == pytest.approx(0.89, rel=0.1)
    quantiles = statistics.quantiles(noise, n=100)
    assert quantiles[89] == pytest.approx(3.19, rel=0.2)
    assert quantiles[98] == pytest.approx(15.2, rel=0.5)


def test_a_warp_keeps_the_order_and_not_the_scale():
    rankings = corrupted("warp")
    assert {ranking.ranks for ranking in rankings} == {ranks_from_scores(SCORES)}
    spreads = [max(r.scores) - min(r.scores) for r in rankings]
    assert max(spreads) > 20 * min(spreads)


def test_scores_that_cannot_be_warped_are_named():
    class Large(Scored):
        def rank(self, requests):
            return [Ranking(ranks=(1, 0), scores=(-900.0, 900.0)) for _ in requests]

    some = [RankRequest(id=str(n), question="q", responses=("a", "b")) for n in range(20)]
    with pytest.raises(
        UsageError, match=r"feedback: warp takes scores of about 0 to 1; request '.*' has \[-900"
    ):
        CorruptedOracle(Large(), kind="warp").rank(some)


def test_grades_are_whole_and_tie():
    [ranking] = corrupted("grades", count=1)
    assert ranking.scores == (1.0, 5.0, 3.0, 3.0, 1.0, 5.0)
    assert ranking.ranks == (2, 0, 1, 1, 2, 0)


def test_flips_turn_their_share_of_comparisons():
    none = corrupted("flips", 0.0, count=1)[0]
    assert none.ranks == ranks_from_scores(SCORES)
    # the best against the worst, by wins
    wrong = [r.scores[5] < r.scores[4] for r in corrupted("flips", 0.4)]
    assert 0.05 < sum(wrong) / len(wrong) < 0.5
    chance = corrupted("flips", 0.5)
    assert sum(r.scores[5] > r.scores[4] for r in chance) / len(chance) == pytest.approx(0.42, abs=0.1)


def test_slot_bias_favours_slots_and_two_orders_cancel_it():
    moved = [tuple(a - b for a, b in zip(r.scores, SCORES)) for r in corrupted("slot_bias", 0.3)]
    assert all(
        sum(bias) == pytest.approx(0.0, abs=1e-9) and max(bias) == pytest.approx(0.3) for bias in moved
    )
    assert all(ranking.scores == SCORES for ranking in corrupted("slot_bias_debiased"))


def test_outliers_are_as_many_as_asked_for():
    scores = [score for ranking in corrupted("outliers", 0.05) for score in ranking.scores]
    far = [score for score in scores if abs(score) == 10.0]
    assert len(far) / len(scores) == pytest.approx(0.05, abs=0.015)
    assert any(score > 0 for score in far) and any(score < 0 for score in far)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "nois"}, "feedback: expected exact"),
        ({"kind": "flips", "strength": 1.7}, "feedback_strength: expected 0 to 1 for flips, got 1.7"),
        ({"kind": "grades", "strength": 1}, "expected 2 to 100"),
        ({"kind": "warp", "strength": float("nan")}, "got nan"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        CorruptedOracle(Scored(), **options)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_of_an_oracle_that_only_orders_the_order_is_corrupted(kind):
    class Unscored(Scored):
        gives_scores = False

        def rank(self, requests):
            return [Ranking(ranks=(2, 0, 1, 1)) for _ in requests]

    oracle = CorruptedOracle(Unscored(), kind=kind)
    rankings = oracle.rank(
        [RankRequest(id=str(n), question="q", responses=("a", "b", "c", "d")) for n in range(50)]
    )
    assert not oracle.gives_scores
    assert all(ranking.valid and ranking.scores is None for ranking in rankings)
    orders = {ranking.ranks for ranking in rankings}
    assert orders == {(2, 0, 1, 1)} if kind in ("warp", "grades", "slot_bias_debiased") else len(orders) > 1


def test_what_the_oracle_could_not_judge_stays_so():
    class Partial(Scored):
        def rank(self, requests):
            ranks, scores = (0, None, 1), (0.9, None, 0.1)
            return [Ranking(ranks=ranks, scores=scores), Ranking(ranks=(None,) * 3, error="no answer")]

    two = [RankRequest(id=str(n), question="q", responses=("a", "b", "c")) for n in range(2)]
    partial, failed = CorruptedOracle(Partial(), kind="gaussian").rank(two)
    assert partial.ranks[1] is None and partial.scores[1] is None and partial.scores[0] is not None
    assert failed.error == "no answer"


def test_a_score_without_a_rank_is_not_read():
    class Partial(Scored):
        def rank(self, requests):
            return [Ranking(ranks=(1, None, 0), scores=(0.1, score, 0.9)) for score in (None, 2.0)]

    two = [RankRequest(id="n", question="q", responses=("a", "b", "c"))] * 2
    without, with_one = CorruptedOracle(Partial(), kind="flips", strength=0.0).rank(two)
    assert without.scores == with_one.scores == (0.0, None, 1.0)


def test_a_listwise_judge_gets_better_with_orders_and_two_cancel_its_slots():
    def right(strength):  # share of the pairs of distinct scores that are ordered as they are
        pairs = [(i, j) for i in range(len(SCORES)) for j in range(len(SCORES)) if SCORES[i] > SCORES[j]]
        rankings = corrupted("listwise", strength)
        return statistics.fmean(
            (r.scores[i] > r.scores[j]) + 0.5 * (r.scores[i] == r.scores[j])
            for r in rankings
            for i, j in pairs
        )

    one, two, four = right(1), right(2), right(4)
    assert 0.7 < one < two < four < 1.0
    assert two - one > right(3) - two  # the third has no reverse
    for ranking in corrupted("listwise", 1, count=20):
        assert sorted(ranking.scores) == pytest.approx([i / 5 for i in range(6)])  # the shares of one order
