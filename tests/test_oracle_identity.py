"""What tells one Python function from another in the verdict cache."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import RankRequest, build_oracle
from rlaif_fast.oracle.callable import CallableOracle


def request(responses):
    return RankRequest("0:row", "?", tuple(responses))


def scaled(request, *, by=1):
    return [by * len(text) for text in request.responses]


def closed(by):
    return lambda request: [by * len(text) for text in request.responses]


class Holder:
    def __init__(self, by):
        self.by = by

    def __call__(self, request):
        return scaled(request, by=self.by)


def edited(text, extra=""):
    """A function called `f` of a module whose text is given."""
    names = {"__name__": "judges"}
    exec(f"{extra}\ndef f(request):\n    return {text}", names)
    return names["f"]


OTHERS = {
    "lambdas": (lambda r: [len(t) for t in r.responses], lambda r: [-len(t) for t in r.responses]),
    "closures": (closed(1), closed(-1)),
    "partials": (functools.partial(scaled, by=1), functools.partial(scaled, by=-1)),
    "objects": (Holder(1), Holder(-1)),
    "edited": (edited("[1, 0]"), edited("[0, 1]")),
    "names": (edited("request.a"), edited("request.b")),
    "a helper": (edited("g()", "def g():\n    return [1, 0]"), edited("g()", "def g():\n    return [0, 1]")),
    "a global": (edited("[n, 0]", "n = 1"), edited("[n, 0]", "n = -1")),
    "inner": (edited("[*map(lambda t: 1, [2, 3])]"), edited("[*map(lambda t: 2, [2, 3])]")),
}


@pytest.mark.parametrize("pair", OTHERS.values(), ids=OTHERS)
def test_a_cache_tells_functions_apart(pair):
    first, second = (CallableOracle(function=function).identity for function in pair)
    assert first != second
    assert CallableOracle(function=pair[0]).identity == first


def test_an_equal_function_has_the_cached_verdicts(tmp_path):
    longest, shortest = (functools.partial(scaled, by=by) for by in (1, -1))
    for function, expected, hits in ((longest, (1, 0), 0), (shortest, (0, 1), 0), (longest, (1, 0), 1)):
        oracle = build_oracle(
            "callable", function=function, cache=tmp_path / "cache", max_invalid_fraction=None
        )
        assert oracle.rank([request(("a", "bb"))])[0].ranks == expected
        assert oracle.stats()["oracle/cache_hits"] == hits


def test_the_identity_of_a_function_is_the_same_in_every_process():
    code = (
        "from rlaif_fast.oracle.identity import function_digest\n"
        "def f(request, known=('a', 'b')):\n    return [t in {'x', 'y', 'z'} for t in request.responses]\n"
        "print(function_digest(f))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]


def test_a_function_without_an_identity_has_no_cache(tmp_path):
    function = closed(object())
    with pytest.raises(UsageError, match=r"^cache: no identity .*: 'by' holds a object"):
        build_oracle("callable", function=function, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    build_oracle("callable", function=function)
    function.identity = "object/1"
    build_oracle("callable", function=function, cache=tmp_path / "cache")
