"""`python -m rlaif_fast.video probe|check|preview`: look at files, vet a dataset, see what the model sees."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif_fast.cli import run_command
from rlaif_fast.command_parser import CommandParser, expanded
from rlaif_fast.errors import UsageError, require_least, require_positive
from rlaif_fast.machine import cores
from rlaif_fast.outputs import check_output, write_atomically
from rlaif_fast.video.base import VideoInfo
from rlaif_fast.video.clips import load_clip
from rlaif_fast.video.errors import VideoError, kind_of
from rlaif_fast.video.isolate import DecodePool
from rlaif_fast.video.loader import load_medium
from rlaif_fast.video.preview import describe, draw_contact_sheet
from rlaif_fast.video.probe import info_of, probe
from rlaif_fast.video.refs import MediaRef
from rlaif_fast.video.sampling import FrameSampling

MAX_FRAMES = 64  # as in training, whose other bounds are those of `FrameSampling`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 when a file is bad, 2 for wrong usage."""
    parser = CommandParser("rlaif_fast.video", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="probe|check|preview")

    look = commands.add_parser("probe", help="Say what files hold.")
    look.add_argument("files", nargs="+", type=expanded, metavar="FILE")
    look.add_argument(
        "--json",
        action="store_true",
        help="One JSON object a line, with every frame's time.",
    )
    _add_sampling(look)

    check = commands.add_parser("check", help="Decode the sampled frames of every file of a dataset.")
    check.add_argument("dataset", type=Path, metavar="DATASET.jsonl")
    check.add_argument("--media_root", type=Path, help="Folder that relative paths start from.")
    check.add_argument("--full", action="store_true", help="Decode every frame, not only the sampled ones.")
    check.add_argument("--workers", type=int, default=cores(), help="Decoding processes.")
    check.add_argument(
        "--timeout", type=float, default=300.0, help="Seconds to scan a file, and again to decode it."
    )
    check.add_argument("--quarantine", type=Path, help="File that gets one JSON line per bad file.")
    check.add_argument("--shown", type=int, default=20, help="Most bad files to name.")
    _add_sampling(check)

    preview = commands.add_parser("preview", help="Draw the sampled frames as a contact sheet.")
    preview.add_argument("file", type=expanded, metavar="FILE")
    preview.add_argument("--out", type=Path, required=True, help="PNG, JPEG, PDF or SVG to write.")
    preview.add_argument("--columns", type=int, default=6, help="Frames in a row.")
    preview.add_argument("--most", type=int, default=48, help="Most frames to draw.")
    _add_sampling(preview)

    options = parser.parse_args(argv)
    command = {"probe": _probe, "check": _check, "preview": _preview}[options.command]
    return run_command(lambda: command(options), debug=options.debug, flag=f"--debug {options.command}")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which frames")
    count = group.add_mutually_exclusive_group()
    count.add_argument("--fps", type=float, default=2.0, help="Frames per second of video.")
    count.add_argument("--nframes", type=int, help="This many frames, instead of --fps.")
    group.add_argument(
        "--min_frames", type=int, help=f"Fewest frames under --fps; {FrameSampling.min_frames} without it."
    )
    group.add_argument("--max_frames", type=int, help=f"Most frames under --fps; {MAX_FRAMES} without it.")
    group.add_argument("--video_start", type=float, help="Seconds.")
    group.add_argument("--video_end", type=float, help="Seconds.")


def _sampling(options: argparse.Namespace) -> FrameSampling:
    given = {name: getattr(options, name) for name in ("min_frames", "max_frames")}
    limits = {name: value for name, value in given.items() if value is not None}
    # The rows of a dataset may have rates of their own.
    if options.nframes is not None and limits and options.command != "check":
        names = ", ".join(limits)
        raise UsageError(f"{names}: not read with --nframes, which sets their number; leave it out")
    try:
        sampling = FrameSampling(
            fps=options.fps,
            nframes=options.nframes,
            **{"max_frames": MAX_FRAMES} | limits,
            video_start=options.video_start,
            video_end=options.video_end,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    fault = sampling.fault()
    if fault is not None:
        raise UsageError(fault)
    return sampling


def _probe(options: argparse.Namespace) -> int:
    from rich.console import Console

    sampling = _sampling(options)
    console = Console()
    any_bad = False
    for path in options.files:
        try:
            info = probe(path)
        except VideoError as error:
            any_bad = True
            if options.json:
                print(json.dumps({"path": error.path, "error": error.reason}))
            else:
                console.print(f"[red]bad[/red] {_escaped(str(error))}", highlight=False, soft_wrap=True)
            continue
        if options.json:
            print(json.dumps(vars(info) | _sampled_as_json(info, sampling)))
        else:
            console.print(f"[bold]{_escaped(path)}[/bold]", highlight=False, soft_wrap=True)
            console.print(
                f"    {describe(info)}; {_sampled(info, sampling)}", highlight=False, soft_wrap=True
            )
    return 1 if any_bad else 0


def _sampled_as_json(info: VideoInfo, sampling: FrameSampling) -> dict[str, Any]:
    try:
        return {"sampled": sampling.sample(info)[0]}
    except VideoError as error:
        return {"sampled": None, "error": error.reason}


def _sampled(info: VideoInfo, sampling: FrameSampling) -> str:
    try:
        indices, fps = sampling.sample(info)
    except VideoError as error:
        return error.reason
    return f"samples {len(indices)} at {fps:.3g} fps"


@dataclass(frozen=True)
class _Vetted:
    path: str
    frames: int
    reason: str = ""
    # Codec, width, height and seconds; None where it is no video.
    video: tuple[str, int, int, float] | None = None


def _check(options: argparse.Namespace) -> int:
    require_least("shown", options.shown, 0)
    require_least("workers", options.workers, 1)
    require_positive("timeout", options.timeout)
    from rich.console import Console

    from rlaif_fast.data.reader import read_report

    sampling = _sampling(options)
    if options.quarantine is not None:
        options.quarantine = check_output("quarantine", options.quarantine, [options.dataset])
    report = read_report(
        options.dataset, media_root=options.media_root, require_answer=False, check_files=False
    )
    media = dict.fromkeys(medium for example in report.examples for medium in example.seen)
    if options.quarantine is not None:
        check_output("quarantine", options.quarantine, [medium.path for medium in media])
    console = Console()
    for row in report.errors[: options.shown]:
        console.print(f"[red]row[/red] {_escaped(row)}", highlight=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {_escaped(note)}", highlight=False, soft_wrap=True)
    if not media:
        raise UsageError(f"{options.dataset}: no row names a video or an image")
    began = time.perf_counter()
    vetted = _vet_all(list(media), sampling, options, console)
    seconds = time.perf_counter() - began
    bad = [result for result in vetted if result.reason]
    for result in bad[: options.shown]:
        line = _escaped(f"{result.path}: {result.reason}")
        console.print(f"[red]bad[/red] {line}", highlight=False, soft_wrap=True)
    if len(bad) > options.shown:
        console.print(f"... and {len(bad) - options.shown} more")
    if options.quarantine is not None:
        lines = [json.dumps({"path": r.path, "reason": r.reason}, ensure_ascii=False) + "\n" for r in bad]
        write_atomically(options.quarantine, "".join(lines))
    gone = {medium for medium, result in zip(media, vetted, strict=True) if result.reason}
    _summarise(vetted, bad, gone, report.examples, len(report.errors), seconds, console)
    return 1 if bad or report.errors else 0


def _vet_all(
    media: list[MediaRef], sampling: FrameSampling, options: argparse.Namespace, console: Any
) -> list[_Vetted]:
    """Decode what is seen of every medium in processes that can be stopped; results are in the order of `media`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    results: list[_Vetted] = []
    columns = (
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[bad]} bad"),
        TimeRemainingColumn(),
    )
    waiting: deque[Future[_Vetted]] = deque()
    source = iter(media)
    workers = min(options.workers, len(media))
    pool = DecodePool(workers)
    try:
        with (
            ThreadPoolExecutor(workers) as threads,
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        ):
            task, bad = progress.add_task("", total=len(media), bad=0), 0
            while len(results) < len(media):
                while len(waiting) < 4 * workers and (item := next(source, None)) is not None:
                    waiting.append(threads.submit(_vet, item, sampling, options, pool))
                results.append(waiting.popleft().result())
                bad += bool(results[-1].reason)
                progress.update(task, advance=1, bad=bad)
    finally:
        pool.close()
    return results


def _vet(medium: MediaRef, sampling: FrameSampling, options: argparse.Namespace, pool: DecodePool) -> _Vetted:
    """Decode what is seen of one medium, or all of it."""
    path = medium.path
    try:
        if not medium.is_video_file:
            return _Vetted(path, len(load_medium(medium, sampling).frames))
        with pool.lend() as process:
            scan, _ = process.scan(path, options.timeout)
            info = info_of(path, scan)
            sampled = sampling.cut(medium).sample(info)[0]
            indices = range(info.frames) if options.full else sampled
            frames = sum(1 for _ in process.frames(path, scan, indices, options.timeout))
        # Not the times of its frames: those of a hundred thousand files would fill memory.
        return _Vetted(path, frames, video=(info.codec, info.width, info.height, info.duration))
    except VideoError as error:
        return _Vetted(error.path, 0, error.reason)


def _summarise(
    vetted: list[_Vetted],
    bad: list[_Vetted],
    gone: set[MediaRef],
    examples: Sequence[Any],
    wrong_rows: int,
    seconds: float,
    console: Any,
) -> None:
    from rich.table import Table

    kept = sum(1 for e in examples if not gone.intersection(e.seen))
    videos = [result.video for result in vetted if result.video is not None]
    frames = sum(result.frames for result in vetted)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("files", f"{len(vetted) - len(bad)} good, {len(bad)} bad of {len(vetted)}")
    for reason, count in Counter(kind_of(r.reason) for r in bad).most_common():
        table.add_row("", f"{count} x {_escaped(reason)}")
    table.add_row("questions", f"{kept} of {len(examples)} keep all their files; {wrong_rows} rows are wrong")
    if videos:
        codecs = Counter(codec for codec, *_ in videos)
        sizes = sorted((width * height, f"{width}x{height}") for _, width, height, _ in videos)
        lengths = sorted(length for *_, length in videos)
        table.add_row("codecs", ", ".join(f"{count} {name}" for name, count in codecs.most_common()))
        table.add_row("sizes", f"{sizes[0][1]} to {sizes[-1][1]}")
        table.add_row(
            "lengths",
            f"{lengths[0]:.1f} to {lengths[-1]:.1f} s, median {lengths[len(lengths) // 2]:.1f} s,"
            f" {sum(lengths) / 3600:.2f} h in all",
        )
    rate = f"{frames} frames in {seconds:.1f} s, {frames / seconds:.0f} a second"
    table.add_row("decoded", rate)
    console.print(table)


def _preview(options: argparse.Namespace) -> int:
    require_least("columns", options.columns, 1)
    require_least("most", options.most, 2)
    sampling = _sampling(options)
    options.out = check_output("out", options.out, [options.file])
    info = probe(options.file)
    indices, _ = sampling.sample(info)
    clip = load_clip(options.file, sampling=sampling)
    drawn = draw_contact_sheet(clip, info, indices, options.out, most=options.most, columns=options.columns)
    print(f"{options.out}: {drawn} of {len(indices)} sampled frames")
    return 0


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    raise SystemExit(main())
