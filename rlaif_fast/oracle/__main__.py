"""`python -m rlaif_fast.oracle rank|agree|pairs|list`: rank responses, compare rankings, make pairs, name oracles."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from rlaif_fast.cli import run_command, tell
from rlaif_fast.command_parser import CommandParser, expanded
from rlaif_fast.data.schema import NO_CATEGORY, named_categories
from rlaif_fast.data.sources import objects_of
from rlaif_fast.errors import UsageError, needed_by, require_least
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest, counters, rank_all
from rlaif_fast.oracle.fusion import kendall_tau, top1_agreement
from rlaif_fast.oracle.monitors import oracle_stats
from rlaif_fast.oracle.pairs import pair_rows
from rlaif_fast.oracle.records import (
    ranking_to_json,
    row_category,
    row_id,
    row_ranks,
    row_request,
    row_responses,
)
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.oracle.registry import build_oracle, oracle_names
from rlaif_fast.oracle.row_clips import RowClips
from rlaif_fast.outputs import check_output, is_same
from rlaif_fast.runs.files import json_line
from rlaif_fast.video.base import Clip

USUAL_FRAMES = 8  # of a video
_FLAGS = {"name": "--oracle", "cache": "--cache", "max_invalid_fraction": "--max_invalid_fraction"}
_Row = tuple[str, dict[str, Any]]  # "file:line" and its content
_Group = tuple[str, frozenset[str]]  # its id or question, and the responses
_Ranked = tuple[str, dict[str, int | None]]  # category, and the rank of each response


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for a failure, 2 for wrong usage or wrong data."""
    parser = CommandParser("rlaif_fast.oracle", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="rank|agree|pairs|list")

    rank = commands.add_parser("rank", help="Rank the responses of each row of a file.")
    rank.add_argument("file", type=Path, help="JSONL: dataset rows, each with `responses`, a list of texts.")
    rank.add_argument("--oracle", default="reference", help="One of: see `list`.")
    rank.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="An oracle's option, as JSON or text.",
    )
    rank.add_argument("--cache", type=Path, help="Keep verdicts in this file; ranking again is then free.")
    rank.add_argument("--output", type=Path, help="File to write; FILE.ranked.jsonl without it.")
    rank.add_argument(
        "--media_root", type=Path, help="Folder that relative paths start from; that of FILE without it."
    )
    rank.add_argument("--no_clips", action="store_true", help="Do not decode the videos.")
    rank.add_argument(
        "--nframes",
        type=int,
        help=f"Frames of a video whose row does not say which; {USUAL_FRAMES} without it.",
    )
    rank.add_argument("--batch_size", type=int, default=64, help="Groups ranked at a time.")
    rank.add_argument(
        "--max_invalid_fraction",
        type=float,
        default=0.5,
        help="Fail when more of the groups could not be ranked; a long file stops at once.",
    )

    agree = commands.add_parser("agree", help="Compare the rankings of two files.")
    agree.add_argument("first", type=Path, help="JSONL with `responses` and `ranks`.")
    agree.add_argument("second", type=Path, help="The same groups, ranked otherwise.")

    pairs = commands.add_parser("pairs", help="Make preference pairs of a file of rankings.")
    pairs.add_argument("file", type=Path, help="JSONL with `responses` and `ranks`: what `rank` wrote.")
    pairs.add_argument(
        "--pairs",
        choices=("best_worst", "all"),
        default="best_worst",
        help="One pair a group, the best response against the worst; or every two of different rank.",
    )
    pairs.add_argument("--output", type=Path, help="File to write; FILE.pairs.jsonl without it.")

    commands.add_parser("list", help="Name the oracles there are.")

    options = parser.parse_args(argv)
    command = {"rank": _rank, "agree": _agree, "pairs": _pairs, "list": _list}[options.command]
    return run_command(lambda: command(options), debug=options.debug, flag=f"--debug {options.command}")


def _list(options: argparse.Namespace) -> int:
    print("\n".join(oracle_names()))
    return 0


def _rank(options: argparse.Namespace) -> int:
    require_least("batch_size", options.batch_size, 1)
    if options.no_clips:
        for name in ("nframes", "media_root"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name}: not read with --no_clips, which decodes no video")
    require_least("nframes", options.nframes, 1)
    rows = list(objects_of(options.file))
    if not rows:
        raise UsageError(f"{options.file} holds no rows")
    given = _options(options.option)
    output = _output(options, "ranked", _files_in(given))
    media = _checked(rows, options, output)  # a wrong row is reported before anything is paid for
    for role, file in (("rank", options.file), ("write", output)):
        if options.cache is not None and is_same(options.cache, file):
            raise UsageError(f"cache: {options.cache} is the file to {role}; give another")
    oracle = build_oracle(
        options.oracle,
        cache=options.cache,
        max_invalid_fraction=options.max_invalid_fraction,
        **given,
    )
    requests, rankings = _rank_rows(oracle, rows, media, options, output)
    stats = {**oracle_stats(requests, rankings, reference=ReferenceOracle()), **counters(oracle)}
    for key, value in stats.items():
        print(f"{key:<28} {value:.4g}", file=sys.stderr)
    failures = [ranking.failure for ranking in rankings if not ranking.valid]
    if failures:
        counted = f"{len(failures)} of {len(rankings)} groups could not be ranked"
        print(f"{counted}; the last: {failures[-1]}", file=sys.stderr)
    print(output)
    # A file too short for the circuit breaker ends here whatever failed.
    return int(len(failures) > options.max_invalid_fraction * len(rankings))


def _checked(rows: Sequence[_Row], options: argparse.Namespace, output: Path) -> Callable[[_Row], list[Clip]]:
    """Check every row and every file; return the function that decodes a row's media."""
    for where, row in rows:
        row_request(row, where)
    if options.no_clips:
        return lambda _: []
    clips = RowClips(options.media_root or options.file.parent, options.nframes or USUAL_FRAMES)
    media = {where: clips.find(row, where) for where, row in rows}
    if options.media_root is not None and not clips.files.root_read:
        tell("media_root: not read, since no path is relative")
    if options.nframes is not None and not any(m.is_video_file for found in media.values() for m in found):
        tell("nframes: not read, since no row has a video")
    read = [medium.path for found in media.values() for medium in found]
    check_output("output", output, read)
    if options.cache is not None and any(is_same(options.cache, Path(path)) for path in read):
        raise UsageError(f"cache: {options.cache} is read, and would be lost; give another file")
    for where, found in media.items():
        clips.check(found, where)
    return lambda pair: clips.load(media[pair[0]], pair[0])


def _output(options: argparse.Namespace, suffix: str, reads: Iterable[str] = ()) -> Path:
    """The file to write; it must be neither FILE nor one of `reads`."""
    output: Path = options.output or options.file.with_name(f"{options.file.stem}.{suffix}.jsonl")
    return check_output("output", output, [options.file, *reads])


@contextlib.contextmanager
def _writing(output: Path, *, keep: bool = False) -> Iterator[TextIO]:
    """A file that appears under its name only once it is complete.

    With `keep`, what was written before an error is saved beside it under another name, which is printed.
    """
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
    try:
        with file:
            yield file
        partial.replace(output)
    except BaseException:
        if keep and partial.is_file() and partial.stat().st_size:
            rest = output.with_name(f"{output.stem}.part-{time.time_ns()}{output.suffix}")
            partial.replace(rest)
            print(
                f"what was ranked before is in {rest}; with --cache it need not be asked again",
                file=sys.stderr,
            )
        raise
    finally:
        partial.unlink(missing_ok=True)


def _rank_rows(
    oracle: Oracle,
    rows: Sequence[_Row],
    clips_of: Callable[[_Row], list[Clip]],
    options: argparse.Namespace,
    output: Path,
) -> tuple[list[RankRequest], list[Ranking]]:
    """Rank in batches, and write each batch's rankings."""
    with needed_by("this command", "train"):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    requests: list[RankRequest] = []
    rankings: list[Ranking] = []
    columns = ("ranking", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _writing(output, keep=True) as file, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("ranking", total=len(rows))
        for start in range(0, len(rows), options.batch_size):
            part = rows[start : start + options.batch_size]
            batch = [row_request(row, where, clips_of((where, row))) for where, row in part]
            ranked = rank_all(oracle, batch)
            for (_, row), ranking in zip(part, ranked):
                file.write(json_line({**row, **ranking_to_json(ranking)}))
            requests += [replace(request, clips=()) for request in batch]  # all frames would fill memory
            rankings += ranked
            progress.advance(task, len(part))
    return requests, rankings


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """The oracle's options by name."""
    found: dict[str, Any] = {}
    for text in texts:
        key, value = _option(text)
        if key in _FLAGS:
            raise UsageError(f"--option {key}: give it as {_FLAGS[key]}")
        if key in found:
            raise UsageError(f"--option {key}: expected it once, got {found[key]!r} and {value!r}")
        found[key] = value
    return found


def _files_in(value: Any) -> Iterator[str]:
    """The files that options name, including those in the options of nested oracles."""
    if isinstance(value, str):
        if os.path.isfile(expanded(value)):  # noqa: PTH113 - a text may be too long for pathlib's
            yield expanded(value)
    elif isinstance(value, (dict, list)):
        for held in value.values() if isinstance(value, dict) else value:
            yield from _files_in(held)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--option must look like KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _pairs(options: argparse.Namespace) -> int:
    groups, written, without = 0, 0, 0
    output = _output(options, "pairs")
    with _writing(output) as file:
        for where, row in objects_of(options.file):
            found = list(pair_rows(row, where, options.pairs))
            groups, written, without = groups + 1, written + len(found), without + (not found)
            file.writelines(map(json_line, found))
        if not written:
            raise UsageError(
                f"{options.file}: none of its {groups} groups has two responses of different rank"
            )
    print(f"{written} pairs of {groups} groups; {without} groups have none", file=sys.stderr)
    print(output)
    return 0


def _agree(options: argparse.Namespace) -> int:
    first, second = _read_rankings(options.first), _read_rankings(options.second)
    shared = [key for key in first if key in second]
    if not shared:
        raise UsageError(
            f"{options.first} and {options.second} share no group (same id or question, same responses)"
        )
    by_category: dict[str, list[tuple[float | None, float | None]]] = defaultdict(list)
    for key in shared:
        category, ranks = first[key]
        other = second[key][1]
        texts = sorted(ranks)
        pair = [ranks[text] for text in texts], [other[text] for text in texts]
        by_category[category or NO_CATEGORY].append((kendall_tau(*pair), top1_agreement(*pair)))
    rows = [*sorted(named_categories(by_category).items()), ("all", list(chain(*by_category.values())))]
    width = max(len(category) for category, _ in rows)
    print(f"{'category':<{max(width, 8)}}  {'groups':>6}  {'tau':>6}  {'top-1':>6}")
    for category, values in rows:
        tau, top1 = (_mean([value[i] for value in values]) for i in (0, 1))
        print(f"{category:<{max(width, 8)}}  {len(values):>6}  {tau:>6}  {top1:>6}")
    for name, own, other_keys in (("first", first, second), ("second", second, first)):
        alone = sum(key not in other_keys for key in own)
        if alone:
            print(f"{alone} groups are in the {name} file alone", file=sys.stderr)
    return 0


def _read_rankings(path: Path) -> dict[_Group, _Ranked]:
    """The rankings of a file by group."""
    rankings: dict[_Group, _Ranked] = {}
    places: dict[_Group, str] = {}
    for where, row in objects_of(path):
        responses, ranks = row_responses(row, where), row_ranks(row, where)
        name = row_id(row) or str(row.get("question"))
        key, found = (name, frozenset(responses)), dict(zip(responses, ranks))
        unlike = [text for text, rank in zip(responses, ranks) if found[text] != rank]
        if unlike:
            raise UsageError(f"{where}: gives the response {unlike[0]!r:.60} two ranks")
        if key in rankings and rankings[key][1] != found:
            raise UsageError(f"{where}: ranks the group {name!r:.60} otherwise than {places[key]}")
        rankings[key] = row_category(row), found
        places[key] = where
    if not rankings:
        raise UsageError(f"{path} holds no rows")
    return rankings


def _mean(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    return f"{sum(present) / len(present):.3f}" if present else "-"


if __name__ == "__main__":
    sys.exit(main())
