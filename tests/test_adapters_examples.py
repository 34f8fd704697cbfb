"""The plain loop of examples/ learns."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_the_plain_loop_learns(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plain_loop

    right = plain_loop.main(steps=60)
    first, last = sum(right[:10]) / 10, sum(right[-10:]) / 10
    assert last > first + 0.1
