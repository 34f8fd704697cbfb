"""`python -m rlaif_fast.data make|check|preview|label`: make the embedded dataset; check, draw or relabel any."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlaif_fast.cli import given_values, parse_config, run_command
from rlaif_fast.command_parser import CommandParser
from rlaif_fast.data.identity import contents
from rlaif_fast.data.reader import ReadReport, read_report
from rlaif_fast.data.schema import Example, named_categories
from rlaif_fast.data.splits import SPLITS, files_of_splits, is_one_table, rows_apart
from rlaif_fast.data.summary import summarise, summary_of_all
from rlaif_fast.data.synthetic.dataset import SyntheticConfig, make_dataset
from rlaif_fast.errors import RlaifFastError, UsageError, require_least
from rlaif_fast.machine import cores
from rlaif_fast.outputs import check_output
from rlaif_fast.video.refs import MediaRef


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for a failure, 2 for wrong usage or wrong data."""
    parser = CommandParser("rlaif_fast.data", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="make|check|preview|label")

    make = commands.add_parser(
        "make", help="Make the embedded dataset; --help shows every option.", add_help=False
    )
    make.add_argument("out", type=Path, nargs="?", help="Folder to make.")
    make.add_argument("--overwrite", action="store_true", help="Replace a dataset of another configuration.")

    check = commands.add_parser("check", help="Check a dataset and sum it up.")
    check.add_argument(
        "file", type=Path, help="JSONL, JSON, CSV, TSV or parquet, or a folder with a file for each split."
    )
    check.add_argument("--media_root", type=Path, help="Folder that relative paths start from.")
    check.add_argument("--allow_unanswered", action="store_true", help="Rows need no answer.")
    check.add_argument("--skip_decode", action="store_true", help="Do not open the videos.")
    check.add_argument("--shown", type=int, default=10, help="Most wrong rows to name.")

    preview = commands.add_parser("preview", help="Draw clips with their questions into a PNG.")
    preview.add_argument("file", type=Path, help="JSONL, JSON, CSV, TSV or parquet.")
    preview.add_argument("out", type=Path, help="PNG to write.")
    preview.add_argument("--media_root", type=Path, help="Folder that relative paths start from.")
    preview.add_argument("--clips", type=int, default=8, help="Most clips and images to draw.")
    preview.add_argument("--frames", type=int, default=6, help="Most frames of each, evenly spread.")

    relabel = commands.add_parser("label", help="Put a model's answers in place of the reference ones.")
    relabel.add_argument("file", type=Path, help="JSONL, one question a row.")
    relabel.add_argument("out", type=Path, help="JSONL to write.")
    relabel.add_argument(
        "--predictions", type=Path, required=True, help="What rlaif_fast.evaluate --output wrote for FILE."
    )
    relabel.add_argument("--media_root", type=Path, help="Folder that relative paths of FILE start from.")

    options, rest = parser.parse_known_args(argv)
    options.rest = rest  # the configuration of `make`
    if rest and options.command != "make":
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    command = {"make": _make, "check": _check, "preview": _preview, "label": _label}[options.command]
    return run_command(lambda: command(options), debug=options.debug, flag=f"--debug {options.command}")


def _make(options: argparse.Namespace) -> int:
    texts: dict[str, Any] = {
        "prog": "rlaif_fast.data make OUT [--overwrite]",
        "description": "Make the embedded dataset in the folder OUT, or find it made.",
    }
    config = parse_config(SyntheticConfig, options.rest, **texts)
    given = given_values(SyntheticConfig, options.rest, **texts)
    for name, where in config.unread().items():
        if name in given:
            raise UsageError(f"{name}: not read where {where}; leave it out")
    if options.out is None:
        raise UsageError("make: name the folder to make, e.g. python -m rlaif_fast.data make data/synthetic")
    start = time.perf_counter()
    with _progress("making clips") as advance:
        paths = make_dataset(
            options.out, config, overwrite=options.overwrite, workers=cores(), progress=advance
        )
    clips = sum(config.clips(split) for split in SPLITS)
    state = "is there already" if paths.reused else f"made in {time.perf_counter() - start:.1f} s"
    print(f"{paths.root}: {clips} clips, {', '.join(f'{split}.jsonl' for split in SPLITS)}; {state}")
    return 0


def _check(options: argparse.Namespace) -> int:
    require_least("shown", options.shown, 0)
    one = options.file.is_file() or is_one_table(options.file)
    files = {} if one or not options.file.is_dir() else files_of_splits(options.file)
    reports = {
        split: read_report(file, media_root=options.media_root, require_answer=not options.allow_unanswered)
        for split, file in (files or {"": options.file}).items()
    }
    for report in reports.values():
        _print_table(report)
        for note in report.notes:
            print(f"note: {note}")
    wrong = [report.describe_errors(options.shown) for report in reports.values() if report.errors]
    wrong += [
        f"{report.path}: no row; write one JSON object a line"
        for report in reports.values()
        if not report.examples and not report.errors
    ]
    if wrong:
        raise UsageError("\n".join(wrong))
    rows = {split: report.examples for split, report in reports.items()}
    for note in _shared(rows):
        print(f"note: {note}")
    if not options.skip_decode:
        _open_media(options.file, [row for split in rows.values() for row in split], options.shown)
    for report in reports.values():
        print(f"{report.path}: {report.rows} rows, {len(report.examples)} questions, all good")
    return 0


def _shared(rows: Mapping[str, list[Example]]) -> Iterator[str]:
    """A line for each split that shares media with an evaluated split."""
    if len(rows) == 1:
        return
    names = contents(row for split in rows.values() for row in split)
    for split, held, follows in (
        ("sft", ("validation", "test"), "training leaves them out"),
        ("rl", ("validation", "test"), "training leaves them out"),
        ("validation", ("test",), "the checkpoint that is tested is chosen by them"),
    ):
        own = rows.get(split, [])
        left = rows_apart(own, [row for other in held for row in rows.get(other, [])], names)
        if split == "rl" and own and not left:
            raise UsageError(
                f"all {len(own)} rl rows are about media of validation or test; give other media"
            )
        if len(left) < len(own):
            yield f"{len(own) - len(left)} {split} rows are about media of {' or '.join(held)}; {follows}"


def _open_media(file: Path, rows: Sequence[Example], shown: int) -> None:
    """Probe every video and open every image once."""
    from rlaif_fast.video import VideoError

    first: dict[MediaRef, str] = {}  # medium -> the first row that names it
    for example in rows:
        for medium in example.seen:
            first.setdefault(medium, example.source)
    errors = []
    with _progress("opening files") as advance:
        for done, (medium, source) in enumerate(first.items(), 1):
            try:
                _open_medium(medium)
            except VideoError as error:
                errors.append(f"{source}: {error}")
            advance(done, len(first))
    if errors:
        more = [f"... and {len(errors) - shown} more"] if len(errors) > shown else []
        head = f"{file}: {len(errors)} of {len(first)} files cannot be decoded"
        raise RlaifFastError("\n  ".join([head, *errors[:shown], *more]))


def _open_medium(medium: MediaRef) -> None:
    """Open one medium; for a video, find the frames that its row asks for."""
    from rlaif_fast.video import FrameSampling, load_medium, probe

    if not medium.is_video_file:
        load_medium(medium, FrameSampling())
        return
    FrameSampling().cut(medium).sample(probe(medium.path))


def _print_table(report: ReadReport) -> None:
    from rich.console import Console
    from rich.table import Table

    if not report.examples:
        return
    formats = ", ".join(f"{count} {name}" for name, count in report.formats.items())
    table = Table(
        title=f"{report.path.name}, rows: {formats}",
        caption="choice: multiple choice; words of question, answer, longest answer",
    )
    table.add_column("category", no_wrap=True)
    for name in ("asked", "choice", "chance", "question", "answer", "longest"):
        table.add_column(name, justify="right", no_wrap=True)
    named = named_categories({line.category: line for line in summarise(report.examples)})
    for name, line in (*named.items(), ("all", summary_of_all(report.examples))):
        if name == "all":
            table.add_section()
        table.add_row(
            name,
            str(line.questions),
            str(line.multiple_choice),
            f"{line.chance:.1%}",
            f"{line.mean_question_words:.1f}",
            f"{line.mean_answer_words:.1f}",
            str(line.max_answer_words),
        )
    Console().print(table)


def _preview(options: argparse.Namespace) -> int:
    from rlaif_fast.data.preview import draw_preview

    options.out = check_output("out", options.out, [options.file])
    report = read_report(options.file, media_root=options.media_root, require_answer=False)
    if not report.examples:
        raise UsageError(report.describe_errors() if report.errors else f"{report.path}: no row to draw")
    if report.errors:
        print(f"left out: {report.describe_errors()}", file=sys.stderr)
    check_output("out", options.out, [m.path for example in report.examples for m in example.seen])
    drawn = draw_preview(report.examples, options.out, clips=options.clips, frames=options.frames)
    print(f"{options.out}: {drawn} clips")
    return 0


def _label(options: argparse.Namespace) -> int:
    from rlaif_fast.data.label import label

    found = label(options.file, options.predictions, options.out, media_root=options.media_root)
    told = f"{options.out}: {found.written} rows, {found.missing} without a prediction left out"
    if found.cut_off:
        told += f", {found.cut_off} whose prediction was cut off at its length limit left out"
    if found.outside:
        told += f", {found.outside} whose prediction names none of their options left out"
    print(told)
    return 0


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, nothing elsewhere; called with the number done and the total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
