"""Turns pytest-benchmark JSON into a Markdown table and a figure.

    pytest bench/bench_linear_loss.py --benchmark-only --benchmark-json=linear.json
    python bench/report.py linear.json [more.json ...] --out DIR

It also reads the file that RLAIF_FAST_BENCH_LINES names (`.jsonl`), which even a stopped session leaves behind.
Writes DIR/kernels.md and DIR/kernels.png: time and extra memory of each arm, the floor as a line.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from rlaif_fast.command_parser import CommandParser

Row = dict[str, Any]


def load(paths: list[Path]) -> dict[str, list[Row]]:
    """Return the measured arms by group, in the order of the files; benchmarks of another kind are left
    out.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for path in paths:
        if path.suffix == ".jsonl":
            for row in map(json.loads, path.read_text().splitlines()):
                if "over_floor" in row:
                    groups[row["case"]].append(row)
            continue
        for entry in json.loads(path.read_text())["benchmarks"]:
            if "over_floor" in entry["extra_info"]:
                groups[entry["group"]].append(entry["extra_info"])
    for rows in groups.values():
        for row in rows:
            row.setdefault("floor_s", next(r["median_s"] for r in rows if r["arm"] == row["floor"]))
    return groups


def duration(seconds: float) -> str:
    """Write seconds in a suitable unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def on_device(row: Row) -> str:
    """Write the time of an arm's kernels, if it was measured."""
    seconds = row.get("device_s")
    return "" if seconds is None else duration(seconds)


def rate(row: Row) -> str:
    """Say what the arm moves or computes in a second."""
    if row["flops"]:
        giga = row["flops"] / row["median_s"] / 1e9
        return f"{giga / 1e3:,.0f} TFLOP/s" if giga >= 1e4 else f"{giga:,.0f} GFLOP/s"
    return f"{row['bytes'] / row['median_s'] / 1e9:,.0f} GB/s"


def table(groups: dict[str, list[Row]]) -> str:
    """Return one Markdown table for each group."""
    parts = []
    for group, rows in groups.items():
        first = rows[0]
        parts.append(
            f"### {group}\n\n{first['device']}, torch {first['torch']}, Python {first['python']}, "
            f"commit {first['commit']}. Floor: {first['floor']}.\n\n"
            "| arm | median | of it on the GPU | p20 - p80 | over the floor | rate | extra memory | samples |\n"
            "|---|---:|---:|---:|---:|---:|---:|---:|"
        )
        for row in sorted(rows, key=lambda row: row["median_s"]):
            parts.append(
                f"| {row['arm']} | {duration(row['median_s'])} | {on_device(row)} "
                f"| {duration(row['p20_s'])} - {duration(row['p80_s'])} | {row['over_floor']:.3g} "
                f"| {rate(row)} | {row['peak_bytes'] / 1e6:,.0f} MB | {row['samples']} |"
            )
        parts.append("")
    return "\n".join(parts)


def figure(groups: dict[str, list[Row]], path: Path) -> None:
    """Draw time (left) and extra memory (right) of each arm, one row a group, the floor as a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = sum(len(rows) for rows in groups.values()) * 0.32 + 1.1 * len(groups)
    ratios = [len(rows) + 2 for rows in groups.values()]
    panels, axes = plt.subplots(
        len(groups), 2, figsize=(12, height), squeeze=False, height_ratios=ratios, layout="constrained"
    )
    for (group, rows), (time_axis, memory_axis) in zip(groups.items(), axes):
        rows = sorted(rows, key=lambda row: -row["median_s"])
        names = [row["arm"] for row in rows]
        colours = ["tab:orange" if "kernel" in name else "tab:gray" for name in names]
        medians = [1e3 * row["median_s"] for row in rows]
        low = [1e3 * (row["median_s"] - row["p20_s"]) for row in rows]
        high = [1e3 * (row["p80_s"] - row["median_s"]) for row in rows]
        time_axis.barh(names, medians, xerr=(low, high), color=colours, error_kw={"lw": 1})
        time_axis.axvline(
            1e3 * rows[0]["floor_s"], color="black", ls="--", lw=1, label=f"floor: {rows[0]['floor']}"
        )
        time_axis.set_xlabel("median time, ms (bars: p20 to p80)")
        time_axis.set_title(group, fontsize=9, loc="left")
        time_axis.legend(fontsize=7, loc="lower right")
        memory_axis.barh(names, [row["peak_bytes"] / 1e6 for row in rows], color=colours)
        memory_axis.set_xlabel("extra peak memory, MB")
        memory_axis.set_yticklabels([])
        for axis in (time_axis, memory_axis):
            axis.tick_params(labelsize=8)
        if all(row["peak_bytes"] < 1e6 for row in rows):  # a graph's replay allocates nothing
            memory_axis.axis("off")
    panels.savefig(path, dpi=130)
    plt.close(panels)


def main() -> int:
    """Read the JSON files, write table and figure, print the table."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", type=Path, help="files of --benchmark-json")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for kernels.md and kernels.png")
    options = parser.parse_args()
    groups = load(options.json)
    if not groups:
        print("no kernel benchmark in these files")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(groups)
    (options.out / "kernels.md").write_text(text)
    figure(groups, options.out / "kernels.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
