"""What a run watches in its oracle."""

from __future__ import annotations

import pytest
import torch

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import CircuitBreaker, Ranking, RankRequest, ReferenceOracle, build_oracle
from rlaif_fast.oracle.base import counters
from rlaif_fast.oracle.judge import Verdict
from rlaif_fast.oracle.monitors import blind_control, length_tau, oracle_stats, position_bias
from rlaif_fast.video.base import Clip

CLIP = Clip(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), (0.0,), key="clip")


def request(*responses, name="r", **kwargs):
    return RankRequest(name, "?", responses, **kwargs)


def test_a_judge_that_pays_for_words_shows():
    requests = [request("a", "a b", "a b c"), request("long answer", "short")]
    longest = build_oracle("callable", function=lambda r: [len(text) for text in r.responses])
    assert length_tau(requests, longest.rank(requests)) == 1.0
    shortest = build_oracle("callable", function=lambda r: [-len(text) for text in r.responses])
    assert length_tau(requests, shortest.rank(requests)) == -1.0
    assert length_tau([request("aa", "bb")], [Ranking((0, 1))]) is None


def test_agreement_with_the_reference_counts_groups_that_have_one():
    requests = [
        request("left", "right", reference="left"),
        request("left", "right", reference="right"),
        request("left", "right"),
    ]
    stats = oracle_stats(requests, [Ranking((0, 1))] * 3, reference=ReferenceOracle())
    assert stats["oracle/reference_tau"] == 0.0
    assert stats["oracle/reference_top1"] == 0.5
    assert "oracle/reference_tau" not in oracle_stats(requests, [Ranking((0, 1))] * 3)


def test_shares_and_costs():
    requests = [request("a", "b", "c")] * 4
    rankings = [
        Ranking((0, 1, None), 0.5, tokens=10),
        Ranking((0, 0, 0), 0.0, tokens=5),
        Ranking((None,) * 3, error="down", tokens=3),
        Ranking((0, 1, 2), 1.0),
    ]
    assert oracle_stats(requests, rankings) == {
        "oracle/groups": 4.0,
        "oracle/invalid": 0.25,
        "oracle/abstained": pytest.approx(1 / 9),
        "oracle/tied": pytest.approx(1 / 3),
        "oracle/confidence": 0.5,
        "oracle/tokens": 18.0,
    }
    assert oracle_stats([], []) == {"oracle/groups": 0.0, "oracle/tokens": 0.0}


def test_position_bias_reads_the_single_orders():
    first = [Verdict((0, 1, 2), (0, 1, 2)), Verdict((2, 1, 0), (2, 1, 0))]
    assert position_bias([Ranking((0, 0, 0), 0.0, tuple(first))]) == 1.0
    fair = [
        Verdict((0, 1, 2), (0, 1, 2)),
        Verdict((2, 1, 0), (0, 1, 2)),
        Verdict((0, 1, 2), (None,) * 3, (), "down"),
    ]
    assert position_bias([Ranking((0, 1, 2), 1.0, tuple(fair))]) == 0.0
    assert position_bias([Ranking((0, 1), verdicts=(0.5, 0.2))]) is None


def test_the_blind_control_tells_who_looks():
    requests = [request("a", "bb", "ccc", name=str(n), clips=(CLIP,) * (n > 0)) for n in range(5)]

    def looking(r):
        return [len(text) * (1 if r.clips else -1) for text in r.responses]

    seeing = build_oracle("callable", function=looking)
    rankings = seeing.rank(requests)
    assert blind_control(seeing, requests, rankings) == {"oracle/blind_tau": -1.0, "oracle/blind_top1": 0.0}
    asked = []

    def blind(r):
        asked.append(r)
        return [len(text) for text in r.responses]

    careless = build_oracle("callable", function=blind)
    stats = blind_control(careless, requests, careless.rank(requests), sample=2)
    assert stats == {"oracle/blind_tau": 1.0, "oracle/blind_top1": 1.0}
    assert len(asked) == 7
    assert all(r.clips == () for r in asked[5:])
    assert blind_control(careless, requests[:1], careless.rank(requests[:1])) == {}
    with pytest.raises(UsageError, match="sample"):
        blind_control(careless, requests, [], sample=0)


def test_a_judge_that_declines_to_judge_blindly_does_not_stop_the_run():
    class Looking:
        name = "looking"

        def rank(self, requests):
            none = (None,) * 2
            return [Ranking((0, 1)) if r.clips else Ranking(none, error="no frames") for r in requests]

    requests = [request("a", "b", name=str(n), clips=(CLIP,)) for n in range(64)]
    breaker = CircuitBreaker(Looking(), max_invalid_fraction=0.0)
    rankings = breaker.rank(requests)
    assert blind_control(breaker, requests, rankings) == {}
    assert breaker.rank(requests) == rankings
    assert blind_control(CircuitBreaker(breaker), requests, rankings, sample=32) == {}


def test_counters_pass_through_wrappers(tmp_path):
    oracle = build_oracle("reference", cache=tmp_path / "c")
    assert isinstance(oracle, CircuitBreaker)
    oracle.rank([request("a", "b", reference="a")])
    assert counters(oracle) == {"oracle/cache_hits": 0.0, "oracle/cache_misses": 1.0}
    assert counters(ReferenceOracle()) == {}
