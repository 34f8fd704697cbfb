"""Controls around an oracle, the circuit breaker, and the registry."""

import json
from collections import Counter

import numpy as np
import pytest

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import (
    CircuitBreaker,
    Oracle,
    OracleFailedError,
    Ranking,
    RankRequest,
    ReferenceOracle,
    ShuffledOracle,
    build_oracle,
    oracle_names,
)
from rlaif_fast.oracle.base import gives_scores, rank_all
from rlaif_fast.oracle.cache import CachedOracle
from rlaif_fast.oracle.ensemble import EnsembleOracle
from rlaif_fast.oracle.feedback import CorruptedOracle
from rlaif_fast.oracle.fusion import kendall_tau, ranks_from_scores
from rlaif_fast.oracle.records import ranking_to_json
from rlaif_fast.runs.files import json_line


def groups(count, size=5):
    words = [f"w{i}" for i in range(size)]
    return [
        RankRequest(
            id=f"g{n}",
            question="?",
            responses=tuple(" ".join(words[: size - i]) for i in range(size)),
            reference=" ".join(words),
        )
        for n in range(count)
    ]


class Says:
    """An oracle of somebody else's, which says the same of every group."""

    name = "says"

    def __init__(self, *ranks, rankings=1, **others):
        self.said = [Ranking(ranks, **others)] * rankings

    def rank(self, requests):
        return self.said * len(requests)


class SaysElse:
    """An oracle of somebody else's, which returns no rankings."""

    name = "says else"

    def __init__(self, said):
        self.said = said

    def rank(self, requests):
        return None if self.said is None else [self.said] * len(requests)


class SaysLater:
    """An oracle of somebody else's, which has to be awaited."""

    name = "says later"

    async def rank(self, requests):
        return []


AROUND = {
    "nothing": lambda oracle, folder: oracle,
    "breaker": lambda oracle, folder: CircuitBreaker(oracle),
    "cache": lambda oracle, folder: CachedOracle(oracle, path=folder / "verdicts.db"),
    "ensemble": lambda oracle, folder: EnsembleOracle([oracle, oracle]),
    "corrupted": lambda oracle, folder: CorruptedOracle(oracle, kind="flips", strength=0.0),
    "shuffled": lambda oracle, folder: ShuffledOracle(oracle),
}


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        (Says(0, 1, 2, rankings=2), r"oracle says: expected \d rankings, got \d"),
        (SaysLater(), "oracle says later: expected a list of rankings, got <coroutine"),
        (SaysElse(None), r"oracle says else: expected \d rankings, got 0"),
        (SaysElse((0, 1, 2)), r"request g0: expected a Ranking, got \(0, 1, 2\)"),
        (Says(0, 1), "oracle says, request g0: expected 3 ranks, got 2"),
        (Says(0, 1, float("nan")), "request g0: expected ranks that are numbers or None"),
        (Says("0", "1", "2"), "request g0: expected ranks that are numbers or None"),
        (Says(0, 1, 2, scores=(1.0, 0.5)), "request g0: expected 3 scores"),
        (Says(0, 1, 2, scores=(1.0, None, 0.5)), "request g0: expected a score for each ranked response"),
        (Says(0, 1, 2, scores=(1.0, float("nan"), 0.5)), "expected a score for each ranked response"),
        (Says(0, 1, 2, confidence=None), r"request g0: expected a confidence in \[0, 1\], got None"),
        (Says(0, 1, 2, confidence=float("nan")), r"request g0: expected a confidence in \[0, 1\], got nan"),
    ],
)
def test_what_is_no_ranking_of_the_requests_is_refused_wherever_the_oracle_stands(
    oracle, message, around, tmp_path
):
    with pytest.raises(UsageError, match=message):
        rank_all(AROUND[around](oracle, tmp_path), groups(2, size=3))


def test_a_verdict_that_json_lacks_is_kept_as_text(tmp_path):
    said = Says(0, 1, 2, verdicts=({"why"}, {(0, 1): np.array([1.0])}), tokens=np.int64(3))
    for oracle in (said, CachedOracle(said, path=tmp_path / "verdicts.db")):
        [ranking] = rank_all(oracle, groups(1, size=3))
        line = json.loads(json_line(ranking_to_json(ranking)))
        assert line["verdicts"] == ["{'why'}", {"(0, 1)": [1.0]}] and line["tokens"] == 3
    assert rank_all(oracle, groups(1, size=3))[0].verdicts == tuple(line["verdicts"])  # from the file


@pytest.mark.parametrize("around", [name for name in AROUND if name != "shuffled"])
@pytest.mark.parametrize("ranks", [(0.5, 0.75, 0.5), (1, 2, 1), (-3, -1, -3), (0, 2, 0), np.array([0, 1, 0])])
def test_of_ranks_the_order_counts(ranks, around, tmp_path):
    """Also those that int64 would cut off, and those that begin elsewhere: 0 is best whoever reads them."""
    [ranking] = rank_all(AROUND[around](Says(*ranks), tmp_path), groups(1, size=3))
    assert ranking.ranks == (0, 1, 0) and {type(rank) for rank in ranking.ranks} == {int}


def corrupted(kind, strength, seed=0):
    return CorruptedOracle(ReferenceOracle(), kind=kind, strength=strength, seed=seed)


def mean_tau(oracle, requests):
    truth = tuple(range(len(requests[0].responses)))
    taus = [kendall_tau(ranking.ranks, truth) for ranking in oracle.rank(requests)]
    return sum(tau or 0.0 for tau in taus) / len(taus)


def test_noise_lowers_agreement_and_is_deterministic():
    requests = groups(200)
    exact, mild, strong = (mean_tau(corrupted("flips", flip), requests) for flip in (0.0, 0.1, 0.4))
    assert exact == pytest.approx(1.0)
    assert exact > mild > strong > 0.0
    first = corrupted("gaussian", 0.5, seed=1)
    whole = first.rank(requests)
    assert [r.ranks for r in whole] == [first.rank([request])[0].ranks for request in requests]
    other = corrupted("gaussian", 0.5, seed=2).rank(requests)
    assert [r.ranks for r in whole] != [r.ranks for r in other]
    assert 0.2 < mean_tau(first, requests) < 0.95


def test_flipping_everything_reverses_the_order():
    assert mean_tau(corrupted("flips", 1.0), groups(5)) == pytest.approx(-1.0)


def test_shuffled_ranks_keep_their_counts_and_teach_nothing():
    requests = groups(600)
    oracle = ShuffledOracle(ReferenceOracle(), seed=3)
    ranked = oracle.rank(requests)
    for ranking in ranked:
        assert Counter(ranking.ranks) == Counter(range(5))
    assert abs(mean_tau(oracle, requests)) < 0.06  # sd of the mean of 600 tau at G = 5 is 0.017
    assert [r.ranks for r in ranked] == [r.ranks for r in oracle.rank(requests)]


@pytest.mark.parametrize(
    "wrap", [lambda inner: CorruptedOracle(inner, kind="flips", strength=0.5), ShuffledOracle]
)
def test_wrapped_scores_tell_the_order_that_the_ranks_tell(wrap):
    requests = groups(20)
    oracle = CircuitBreaker(wrap(ReferenceOracle()))
    assert gives_scores(oracle)
    for clean, ranking in zip(ReferenceOracle().rank(requests), oracle.rank(requests)):
        assert ranking.ranks == ranks_from_scores(ranking.scores)
        if wrap is ShuffledOracle:
            assert Counter(ranking.scores) == Counter(clean.scores)


@pytest.mark.parametrize(
    "wrap", [lambda inner: CorruptedOracle(inner, kind="flips", strength=0.5), ShuffledOracle, CircuitBreaker]
)
def test_what_the_inner_oracle_counts_is_not_lost(wrap):
    counting = ReferenceOracle()
    counting.stats = lambda: {"oracle/api/requests": 3.0}
    assert wrap(counting).stats() == {"oracle/api/requests": 3.0}


def test_noise_on_an_oracle_that_only_orders_gives_no_scores():
    oracle = CorruptedOracle(_Failing(lambda request: False), kind="gaussian", strength=1.0)
    assert not gives_scores(oracle)
    [ranking] = oracle.rank([RankRequest("r", "?", ("a", "b"))])
    assert ranking.valid
    assert ranking.scores is None


class _Failing:
    name = "failing"

    def __init__(self, fail):
        self.fail = fail

    def rank(self, requests):
        return [
            Ranking((None, None), error="timed out") if self.fail(request) else Ranking((0, 1))
            for request in requests
        ]


def _lines(request):
    raise RuntimeError("down\nsince noon")


def test_the_breaker_stops_the_run_with_the_reason():
    requests = [RankRequest(str(i), "?", ("a", "b")) for i in range(40)]
    breaker = CircuitBreaker(_Failing(lambda r: int(r.id) >= 20), max_invalid_fraction=0.25, window=20)
    assert len(breaker.rank(requests[:20])) == 20
    breaker.rank(requests[20:25])  # five of the last twenty: exactly a quarter, still allowed
    with pytest.raises(OracleFailedError, match=r"6 of the last 20.*timed out") as caught:
        breaker.rank(requests[25:26])
    assert caught.value.exit_code == 1
    told = CircuitBreaker(
        build_oracle("callable", function=_lines, max_invalid_fraction=None), max_invalid_fraction=0
    )
    with pytest.raises(OracleFailedError, match=r"RuntimeError: down since noon\. Check the judge"):
        told.rank(requests)  # in one line, as every error is printed


@pytest.mark.parametrize("window", [1, 8, 20, 64, 1000])
def test_the_breaker_stops_at_the_first_groups_where_all_fail(window):
    breaker = CircuitBreaker(_Failing(lambda r: True), window=window)
    requests = [RankRequest(str(i), "?", ("a", "b")) for i in range(8)]
    few = min(8, (window + 1) // 2) - 1
    if few:
        assert breaker.rank(requests[:few])[0].error == "timed out"
    with pytest.raises(OracleFailedError, match="timed out"):
        breaker.rank(requests[few:])


def test_the_breaker_waits_for_half_a_window_where_one_of_the_first_could_be_ranked():
    breaker = CircuitBreaker(_Failing(lambda r: r.id != "0"), window=40)
    requests = [RankRequest(str(i), "?", ("a", "b")) for i in range(20)]
    assert breaker.rank(requests[:19])[1].error == "timed out"
    with pytest.raises(OracleFailedError):
        breaker.rank(requests[19:])


def test_a_breaker_that_allows_every_failure_never_stops():
    breaker = CircuitBreaker(_Failing(lambda r: True), max_invalid_fraction=1.0, window=8)
    assert len(breaker.rank([RankRequest(str(i), "?", ("a", "b")) for i in range(50)])) == 50


def test_build_by_name():
    oracle = build_oracle(
        "corrupted", inner={"name": "reference", "tolerance": 0.1}, kind="flips", strength=0.2, seed=4
    )
    assert isinstance(oracle, Oracle)
    assert oracle.name == "corrupted"
    assert (
        oracle.identity
        == "corrupted/1 kind=flips strength=0.2 seed=4 (reference/6 tolerance=0.1 extract=None)"
    )
    assert isinstance(build_oracle("reference", max_invalid_fraction=None), ReferenceOracle)
    assert {"reference", "corrupted", "shuffled"} <= set(oracle_names())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("referense", {}, "did you mean 'reference'"),
        ("reference", {"tolerence": 1}, "did you mean 'tolerance'"),
        ("reference", {"inner": "reference"}, "no option .inner."),
        ("corrupted", {"kind": "flips"}, "needs option .inner."),
        ("corrupted", {"inner": 3, "kind": "flips"}, "must be an oracle.s name or a mapping"),
        ("corrupted", {"inner": "reference", "kind": "flips", "strength": 2.0}, "expected 0 to 1"),
        ("reference", {"max_invalid_fraction": 3.0}, "must be in"),
        ("reference", {"max_invalid_fraction": True}, "must be in"),
    ],
)
def test_wrong_options_are_usage_errors(name, options, message):
    with pytest.raises(UsageError, match=message):
        build_oracle(name, **options)


def test_other_packages_register_through_the_entry_point_group(tmp_path, monkeypatch):
    (tmp_path / "longest_oracle.py").write_text(
        "from rlaif_fast.oracle import Ranking\n"
        "from rlaif_fast.oracle.fusion import ranks_from_scores\n"
        "class Longest:\n"
        "    name = 'longest'\n"
        "    def __init__(self, *, weight=1.0):\n"
        "        self.weight = weight\n"
        "    def rank(self, requests):\n"
        "        lengths = [[self.weight * len(t) for t in r.responses] for r in requests]\n"
        "        return [Ranking(ranks_from_scores(row)) for row in lengths]\n"
    )
    meta = tmp_path / "longest_oracle-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: longest-oracle\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[rlaif_fast.oracles]\nlongest = longest_oracle:Longest\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "longest" in oracle_names()
    oracle = build_oracle("longest", weight=-1.0)
    assert oracle.rank([RankRequest("r", "?", ("aaa", "b", "cc"))])[0].ranks == (2, 0, 1)
    with pytest.raises(UsageError, match="no option 'wait'"):
        build_oracle("longest", wait=1)
