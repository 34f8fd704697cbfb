"""Runs a property over many cases: some thousand by default, all of them under `-m slow`, the seed printed."""

import os
import random

import pytest
from hypothesis import HealthCheck, given, seed, settings


def fuzz(strategy, check, cases, name="cases"):
    """Check `cases` draws of `strategy`; RLAIF_FAST_FUZZ_SEED repeats a run whose seed was printed."""
    chosen = int(os.environ.get("RLAIF_FAST_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    print(f"{cases} {name}, RLAIF_FAST_FUZZ_SEED={chosen}")

    @seed(chosen)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(strategy)
    def run(case):
        check(case)

    run()


def counts(default, slow):
    """Numbers of cases as test parameters: few by default, many with `-m slow`."""
    return [pytest.param(default, id="some"), pytest.param(slow, id="all", marks=pytest.mark.slow)]
