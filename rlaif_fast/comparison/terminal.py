"""Runs a comparison interactively: one progress bar, and one run per GPU or core."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlaif_fast.comparison.plan import Plan
from rlaif_fast.comparison.report import write_report
from rlaif_fast.comparison.runner import Progress, run_jobs
from rlaif_fast.errors import UsageError
from rlaif_fast.machine import cores

TAIL_BYTES = 4096  # of a metrics file, enough for its last line


def run_with_bar(plan: Plan, *, workers: int = 0) -> Progress:
    """Run what is not finished and show progress; the report is rewritten after every finished run.

    Args:
        plan: What to run.
        workers: Runs at a time; 0 is one per GPU, or per core if there is no GPU.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    if workers < 0:
        raise UsageError(f"workers: expected 0 or more, got {workers}")
    gpus = gpu_count()
    workers = workers or gpus or cores()
    jobs = plan.jobs()
    steps = {job.folder: _steps(dict(job.values)) for job in jobs}

    def environment(slot: int) -> dict[str, str]:
        if gpus:
            return {"CUDA_VISIBLE_DEVICES": str(slot % gpus)}
        return {"OMP_NUM_THREADS": str(max(1, cores() // workers))}

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Bar(*columns) as bar:
        task = bar.add_task("runs", total=len(jobs))
        written = 0

        def show(progress: Progress) -> None:
            nonlocal written
            under_way = sum(min(1.0, last_step(folder) / steps[folder]) for folder in progress.running)
            names = ", ".join(str(folder.relative_to(plan.output_dir)) for folder in progress.running)
            bar.update(
                task, completed=progress.done + len(progress.failed) + under_way, description=names or "runs"
            )
            if progress.done > written:
                written = progress.done
                write_report(plan)

        return run_jobs(jobs, workers=workers, environment=environment, show=show)


def gpu_count() -> int:
    """GPUs that runs can be spread over."""
    import torch

    return torch.cuda.device_count()


def last_step(folder: Path) -> float:
    """The last logged step of a run in progress, within its current stage; 0 before the first."""
    file = folder / "metrics.jsonl"
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        try:
            return float(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0


def _steps(values: dict) -> int:
    """Steps of the longest stage of a run."""
    return max(1, int(values.get("max_steps") or values.get("sft_steps") or 1))
