"""Check that two sets of runs are equal to the digit: every record of their logs except times and memory.

`python bench/same_runs.py FIRST SECOND` takes two output folders (of `rlaif_fast.compare`, or of one run), looks for
`metrics.jsonl` below both and prints a line for each run that both have. It fails if one differs, or if there is none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rlaif_fast.command_parser import CommandParser

MEASURED = ("time", "seconds", "memory", "bytes")  # parts of a key whose value is of the machine


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a log without what depends on the machine."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in row.items() if not any(part in k for part in MEASURED)} for row in rows]


def equal_records(first: Path, second: Path) -> tuple[int, int]:
    """How many records of two logs are equal, place by place, and how many the longer one has."""
    a, b = records(first), records(second)
    return sum(x == y for x, y in zip(a, b)), max(len(a), len(b))


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args()
    logs = {path.parent.relative_to(options.first) for path in options.first.rglob("metrics.jsonl")}
    shared = sorted(run for run in logs if (options.second / run / "metrics.jsonl").exists())
    different = 0
    for run in shared:
        equal, length = equal_records(*(folder / run / "metrics.jsonl" for folder in vars(options).values()))
        different += equal < length
        print(f"{run!s:44} {equal} of {length} records equal")
    print(f"{len(shared) - different} of {len(shared)} runs equal to the digit")
    if different or not shared:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
