"""Two runs are equal to the digit or not, whatever their clocks say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench/same_runs.py"


def write(folder: Path, records: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def compared(first: Path, second: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, first, second], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("other", "words", "ends_with"),
    [
        ([{"loss": 0.5, "time": 9}, {"loss": 0.25, "peak_memory_bytes": 4}], "2 of 2 records equal", 0),
        ([{"loss": 0.5, "time": 1}, {"loss": 0.2500001, "peak_memory_bytes": 3}], "1 of 2 records equal", 1),
        ([{"loss": 0.5, "time": 1}], "1 of 2 records equal", 1),
    ],
    ids=["the clock alone", "one digit", "one is shorter"],
)
def test_times_and_memory_alone_may_differ(tmp_path, other, words, ends_with) -> None:
    write(tmp_path / "a/seed-1/grpo", [{"loss": 0.5, "time": 1}, {"loss": 0.25, "peak_memory_bytes": 3}])
    write(tmp_path / "b/seed-1/grpo", other)
    write(tmp_path / "b/seed-2/grpo", other)  # the first folder has no such run
    result = compared(tmp_path / "a", tmp_path / "b")
    assert words in result.stdout
    assert "seed-2" not in result.stdout
    assert result.returncode == ends_with


def test_nothing_in_common_is_no_success(tmp_path) -> None:
    write(tmp_path / "a/seed-1/grpo", [{"loss": 0.5}])
    assert compared(tmp_path / "a", tmp_path).returncode == 1
