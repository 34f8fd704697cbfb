"""Fixtures of the kernel benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmarking import Arena


@pytest.fixture(scope="session")
def arena() -> Arena:
    return Arena()


@pytest.fixture
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Measure CPU figures with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
