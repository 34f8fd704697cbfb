"""Runs a property over many cases: some thousand by default, all of them under `-m slow`, the seed printed.

The seed is 0, so that a commit passes or fails by what it changes. RLAIF_FAST_FUZZ_SEED gives another one, or a fresh
one each time where it is "random".
"""

import os
import random

import pytest
from hypothesis import HealthCheck, given, seed, settings


def fuzz_seed():
    """The seed that RLAIF_FAST_FUZZ_SEED asks for."""
    wanted = os.environ.get("RLAIF_FAST_FUZZ_SEED") or "0"
    return random.SystemRandom().randrange(2**32) if wanted == "random" else int(wanted)


def fuzz(strategy, check, cases, name="cases"):
    """Check `cases` draws of `strategy`."""
    chosen = fuzz_seed()
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
