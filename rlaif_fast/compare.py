"""`python -m rlaif_fast.compare`: what was learned by which method, side by side.

`compare --config FILE` runs a comparison: one supervised start a seed, every arm under every kind of feedback from it,
and a report with intervals. What is finished is not run again. `compare RUN...` shows runs that are there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlaif_fast.cli import run_command
from rlaif_fast.command_parser import CommandParser
from rlaif_fast.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        prog="python -m rlaif_fast.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="show these finished runs")
    parser.add_argument(
        "--categories", action="store_true", default=None, help="with RUN: add a table by category"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="run the comparison that this YAML file describes"
    )
    parser.add_argument(
        "--output_dir", type=Path, metavar="DIR", help="with --config: in place of the file's output_dir"
    )
    parser.add_argument(
        "--workers", type=int, help="with --config: runs at a time; without it one a GPU or core, as with 0"
    )
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="with --config: run these tables alone")
    parser.add_argument(
        "--report_only",
        action="store_true",
        default=None,
        help="with --config: run nothing, write the report",
    )
    arguments = parser.parse_args(argv)
    if (arguments.config is None) == (not arguments.runs):
        parser.error("give --config FILE, or the folders of finished runs")
    if arguments.config is None:
        unread, where = ["output_dir", "workers", "tables", "report_only"], "RUN"
    else:
        unread, where = ["categories"], "--config"
        if arguments.report_only:
            unread, where = [*unread, "workers"], "--report_only"
    given = [f"--{name}" for name in unread if getattr(arguments, name) is not None]
    if given:
        parser.error(f"{', '.join(given)}: not read with {where}; leave it out")
    return run_command(lambda: _show(arguments) if arguments.config is None else _compare(arguments))


def _show(arguments: argparse.Namespace) -> int:
    from rlaif_fast.comparison.runs import (
        category_table,
        group_results,
        provenance,
        read_result,
        results_table,
    )

    groups = group_results([read_result(run) for run in arguments.runs])
    print(results_table(groups))
    if arguments.categories:
        print(f"\n{category_table(groups)}")
    print(f"\n{provenance(groups)}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    import dataclasses

    from rlaif_fast.comparison import read_plan, write_report
    from rlaif_fast.comparison.runner import check_all_finished, refuse_changed
    from rlaif_fast.comparison.terminal import run_with_bar

    plan = read_plan(arguments.config, arguments.output_dir)
    if unused := plan.unused():
        print(f"in no table, so not run: {', '.join(unused)}", file=sys.stderr)
    if arguments.tables:
        unknown = sorted(set(arguments.tables) - {table.name for table in plan.tables})
        if unknown:
            known = ", ".join(table.name for table in plan.tables)
            raise UsageError(f"tables: {arguments.config} has {known}, got {', '.join(unknown)}")
        chosen = tuple(table for table in plan.tables if table.name in arguments.tables)
        plan = dataclasses.replace(plan, tables=chosen)
    refuse_changed(plan.jobs())
    progress = None
    if not arguments.report_only:
        progress = run_with_bar(plan, workers=arguments.workers or 0)
    print(f"report: {write_report(plan)}")
    if progress is not None:
        check_all_finished(progress)
    return 0


if __name__ == "__main__":
    sys.exit(main())
