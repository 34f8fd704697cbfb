"""Interleaved timing, peak memory, and the metadata of each number, for `bench/`.

CPU figures are processor seconds of one thread. These equal wall time on an idle machine and exclude the time that
other programs run. GPU figures are wall time.

The arms of a case are timed round by round in one process, so that other load on the machine affects them
all; medians, p20 and p80 go to `extra_info`, with bytes, FLOPs, peak memory, versions and commit.
pytest-benchmark's own columns come from one more run of the arm. `RLAIF_FAST_BENCH=full` adds slow peers
(torch.compile) on the CPU; `RLAIF_FAST_BENCH_SMOKE=1` runs everything briefly and judges no bar.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first custom operator of a process loads it: memory and seconds that are not a kernel's

SHORT_SECONDS = 5e-3  # below this, a GPU's wall time is mostly the host's
FULL = os.environ.get("RLAIF_FAST_BENCH") == "full"
SMOKE = os.environ.get("RLAIF_FAST_BENCH_SMOKE") == "1"


def bar(met: bool, text: str) -> None:
    """Fail if a performance bar is missed; a smoke run, too short to measure, only says so.

    Args:
        met: Whether the bar is met.
        text: The bar and the figure.
    """
    if SMOKE:
        print(f"smoke run, not judged: {text}: {'met' if met else 'missed'}")
    else:
        assert met, text


def cases_here(cases: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    """The devices of this machine, each with each of its cases; `cases` has them by device."""
    return [
        (device, case)
        for device, of_device in cases.items()
        for case in of_device
        if device == "cpu" or torch.cuda.is_available()
    ]


@dataclass(frozen=True)
class Arm:
    """One way to do the work of a case.

    Attributes:
        run: Does it once.
        rounds: Most rounds it is timed in; slow peers need fewer than the arms whose ratio is asserted.
        bytes: Bytes of tensors read and written, at least.
        flops: Floating point operations, at least.
    """

    run: Callable[[], Any]
    rounds: int = 30
    bytes: int = 0
    flops: int = 0


@dataclass
class Result:
    """What was measured of one arm."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    device_seconds: float | None = None  # of its kernels alone, launches not counted; where they are short

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(q))


@dataclass
class Case:
    """The arms of one case, measured.

    Attributes:
        arms: The arms to measure, by name.
        results: The measurements.
        floor: The arm that the others are compared with.
        failed: What an arm raised instead; its test raises it again.
        skipped: Why an arm is not here.
        device: "cpu" or "cuda".
    """

    arms: dict[str, Arm]
    results: dict[str, Result]
    floor: str
    failed: dict[str, Exception] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"

    def ratio(self, arm: str, over: str) -> float:
        """Return the ratio of two times at the 20th percentile, since other load on the machine can only add time."""
        return self.results[arm].quantile(0.2) / self.results[over].quantile(0.2)


def synchronise(device: str) -> None:
    """Wait for the device; a CPU needs no waiting."""
    if device == "cuda":
        torch.cuda.synchronize()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """Measure how far memory rises within; the list holds the bytes afterwards."""
    gc.collect()
    peak: list[int] = []
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield peak
        torch.cuda.synchronize()
        peak.append(torch.cuda.max_memory_allocated() - before)
        return
    before = most = _resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, _resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        most = max(most, _resident_bytes())
        done.set()
        watcher.join()
    peak.append(most - before)


def measure(
    arms: dict[str, Arm], floor: str, device: str, seconds: float, skipped: dict[str, str] | None = None
) -> Case:
    """Time the arms round by round for about `seconds`, after one round that warms up and measures memory.

    An arm that raises in that round is kept with its error and left out, so that the others are measured.
    """
    results: dict[str, Result] = {}
    failed: dict[str, Exception] = {}
    clock = time.perf_counter if device == "cuda" else time.process_time
    started = time.perf_counter()
    for name, arm in arms.items():
        try:
            if device == "cuda":
                arm.run()  # compiles
            with peak_memory(device) as peak:
                arm.run()
        except Exception as error:
            if name == floor:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold its tensors
            failed[name] = error
        else:
            results[name] = Result(peak_bytes=peak[0])
    if SMOKE:
        seconds = 0.0
    for done in range(max(arm.rounds for arm in arms.values())):
        for name in results:
            arm = arms[name]
            if done >= arm.rounds:
                continue
            synchronise(device)
            start = clock()
            arm.run()
            synchronise(device)
            results[name].seconds.append(clock() - start)
        if done >= (0 if SMOKE else 2) and time.perf_counter() - started > seconds:
            break
    if device == "cuda":
        for name, result in results.items():
            if result.median < SHORT_SECONDS:
                result.device_seconds = device_seconds(arms[name].run)
    return Case(arms, results, floor, failed, skipped or {}, device)


def device_seconds(run: Callable[[], Any], runs: int = 10) -> float:
    """Return what the kernels of one run take on the GPU, as PyTorch's profiler counts it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(runs):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / runs / 1e6


def append_line(**figures: Any) -> None:
    """Append figures as one line of JSON to the file that RLAIF_FAST_BENCH_LINES names, as soon as they exist, so a
    stopped session keeps what it has measured."""
    path = os.environ.get("RLAIF_FAST_BENCH_LINES")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures | versions()) + "\n")


def append_case(name: str, case: Case) -> None:
    """Append a line for each arm of a case: its figures, or why it has none."""
    for arm, result in case.results.items():
        append_line(
            case=name,
            arm=arm,
            device=device_name(case.device),
            median_s=result.median,
            p20_s=result.quantile(0.2),
            p80_s=result.quantile(0.8),
            samples=len(result.seconds),
            over_floor=case.ratio(arm, case.floor),
            floor=case.floor,
            device_s=result.device_seconds,
            peak_bytes=result.peak_bytes,
            bytes=case.arms[arm].bytes,
            flops=case.arms[arm].flops,
        )
    reasons = {arm: f"{type(error).__name__}: {error}" for arm, error in case.failed.items()} | case.skipped
    for arm, reason in reasons.items():
        append_line(case=name, arm=arm, not_measured=reason)


class Arena:
    """Measures each case once, whichever of its arms comes first."""

    def __init__(self) -> None:
        self._name = ""
        self._case: Case | None = None

    def case(self, name: str, build: Callable[[], Case]) -> Case:
        """Return the measurements of a case; only the latest case is kept, and its tensors with it."""
        if self._case is None or name != self._name:
            self._case = None
            gc.collect()
            self._case = build()
            append_case(name, self._case)
            self._name = name
        return self._case


def record(benchmark: Any, case: Case, arm: str, kernel: str, shape: str, device: str) -> None:
    """Run the arm once for pytest-benchmark and attach its measurements."""
    if arm in case.failed:
        raise case.failed[arm]
    if arm not in case.arms:
        import pytest

        pytest.skip(f"{arm}: {case.skipped.get(arm, f'not for {device}')}")
    benchmark.group = f"{kernel} {shape} {device}"
    benchmark.pedantic(case.arms[arm].run, rounds=1, iterations=1)
    result, floor = case.results[arm], case.results[case.floor]
    benchmark.extra_info.update(
        kernel=kernel,
        arm=arm,
        shape=shape,
        device=device_name(device),
        median_s=result.median,
        p20_s=result.quantile(0.2),
        p80_s=result.quantile(0.8),
        samples=len(result.seconds),
        floor=case.floor,
        floor_s=floor.median,
        over_floor=case.ratio(arm, case.floor),
        share_of_floor=1 / case.ratio(arm, case.floor),
        device_s=result.device_seconds,
        peak_bytes=result.peak_bytes,
        bytes=case.arms[arm].bytes,
        flops=case.arms[arm].flops,
        **versions(),
    )


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor and the number of threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{model}, 1 thread, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Return the versions that the figures belong to."""
    return {"torch": torch.__version__, "python": platform.python_version(), "commit": commit()}


def commit() -> str:
    """Return the commit that is measured, with a mark where files differ from it."""
    root = Path(__file__).parents[1]
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
