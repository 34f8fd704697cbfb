"""Video files to model-ready patches: frames a second by decoder, waiting in a step, memory over time.

    python bench/bench_video.py [--seconds 60] [--heights 360 1080] [--samples 30] [--out video.md]
    RLAIF_FAST_BENCH_SMOKE=1 python bench/bench_video.py      # a minute, small sizes

One row is one kind of file: 32 frames spread over the clip (sparse) or 32 consecutive ones (dense), decoded,
resized to at most 768 merged patches a frame, normalised and put in patch order (Qwen2.5-VL: patch 14). The
decoders take turns within each sample, so that whatever else the machine does hits them alike; the ratio is
to `pyav`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from rlaif_fast.command_parser import CommandParser
from rlaif_fast.errors import RlaifFastError
from rlaif_fast.video import (
    ClipCache,
    ClipStore,
    FrameSampling,
    PatchSpec,
    PixelBudget,
    patchify,
    probe,
)
from rlaif_fast.video.decoders import DECODERS, PyAVDecoder
from rlaif_fast.video.preprocess import resize_frames
from rlaif_fast.video.probe import scan_file
from rlaif_fast.video.testing import counter_frame, write_video

SMOKE = os.environ.get("RLAIF_FAST_BENCH_SMOKE") == "1"
SPEC = PatchSpec(14)
BUDGET = PixelBudget(SPEC.factor, 4 * SPEC.factor**2, 768 * SPEC.factor**2)
FRAMES = 32
CODECS = {
    "h264": ("mp4", {"codec": "libx264", "codec_options": {"preset": "veryfast", "bf": "2"}}),
    "vp9": ("webm", {"codec": "libvpx-vp9"}),
    "hevc": (
        "mp4",
        {"codec": "libx265", "codec_options": {"preset": "ultrafast", "x265-params": "log-level=none"}},
    ),
}


def natural_frames(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Yield frames with the detail and motion of a slow pan over a textured scene, and a counter on top."""
    rng = np.random.default_rng(0)
    scene = np.zeros((height + 256, width + 256, 3), np.float32)
    for scale in (4, 16, 64):
        small = rng.normal(size=((height + 256) // scale + 1, (width + 256) // scale + 1, 3))
        scene += (
            np.kron(small, np.ones((scale, scale, 1)))[: height + 256, : width + 256] * 8 * np.log2(scale)
        )
    picture = np.clip(scene + 128, 0, 255).astype(np.uint8)
    for number in range(count):
        y, x = (int(128 + 127 * np.sin(number / 40 + phase)) for phase in (0.0, 1.3))
        frame = picture[y : y + height, x : x + width].copy()
        frame[: height // 8] = counter_frame(number % 1024, height // 4, width)[: height // 8]
        yield frame


def make(folder: Path, codec: str, height: int, seconds: float) -> str:
    """Return the path of a clip at 30 frames a second, made once per folder."""
    ending, how = CODECS[codec]
    width = height * 16 // 9 // 2 * 2
    path = folder / f"{codec}_{height}_{seconds:g}.{ending}"
    if not path.exists():
        write_video(path, natural_frames(int(30 * seconds), height, width), gop=120, **how)
    return str(path)


def to_patches(
    decode: Callable[[str, Sequence[int]], torch.Tensor], path: str, indices: Sequence[int]
) -> int:
    """Decode, resize, patchify; return the number of patches."""
    frames = decode(path, indices)
    size = BUDGET.size(path, *frames.shape[:3])
    patches = patchify(resize_frames(frames, size), SPEC, torch.bfloat16)
    if patches.is_cuda:
        torch.cuda.synchronize()
    return len(patches)


def contestants(path: str) -> dict[str, Callable[[str, Sequence[int]], torch.Tensor]]:
    """Return every decoder that can read `path` here."""
    one, many = PyAVDecoder(threads=1), PyAVDecoder(threads=0)
    found: dict[str, Callable[[str, Sequence[int]], torch.Tensor]] = {
        "pyav": lambda p, i: one.decode_resized(p, i, BUDGET.size(p, len(i), *scan_file(p).shape)),
        "pyav, all threads": lambda p, i: many.decode_resized(
            p, i, BUDGET.size(p, len(i), *scan_file(p).shape)
        ),
    }
    for device in ["cpu"] + ["cuda"] * (nvdec() == "NVDEC works"):
        for name in ("dali", "torchcodec"):
            kind = DECODERS[name]
            if kind.unavailable() is None and kind.refuses(scan_file(path), torch.device(device)) is None:
                found[f"{name} {device}"] = kind(device).decode
    return found


@cache
def nvdec() -> str:
    """Return whether frames come off NVDEC here, by decoding one."""
    if not torch.cuda.is_available():
        return "no GPU"
    if DECODERS["dali"].unavailable():
        return f"no NVDEC: {DECODERS['dali'].unavailable()}"
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder), "h264", 180, 1)
        try:
            DECODERS["dali"]("cuda").decode(path, [0])
        except RlaifFastError as error:
            return f"no NVDEC: {error}"
    return "NVDEC works"


def race(path: str, indices: Sequence[int], samples: int) -> dict[str, list[float]]:
    """Return seconds per decoder, `samples` each, taken in turns after one warm-up."""
    runners = contestants(path)
    counts = {name: to_patches(run, path, indices) for name, run in runners.items()}
    assert len(set(counts.values())) == 1, f"decoders disagree on the number of patches: {counts}"
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(samples):
        for name, run in runners.items():
            began = time.perf_counter()
            to_patches(run, path, indices)
            times[name].append(time.perf_counter() - began)
    return times


def decoding_table(
    folder: Path, heights: Sequence[int], codecs: Sequence[str], seconds: float, samples: int
) -> str:
    """Return the race of every codec, size and sparsity as Markdown."""
    lines = [
        f"| file, {seconds:g} s | sampling | decoder | ms a clip: median (p20, p80) | frames/s | to pyav |",
        "|---|---|---|---|---|---|",
    ]
    for codec in codecs:
        for height in heights:
            path = make(folder, codec, height, seconds)
            total = probe(path).frames
            chosen = {
                "sparse": torch.linspace(0, total - 1, FRAMES).round().long().tolist(),
                "dense": list(range(total // 2, total // 2 + FRAMES)),
            }
            for how, indices in chosen.items():
                times = race(path, indices, samples)
                base = statistics.median(times["pyav"])
                for name, taken in times.items():
                    low, middle, high = (float(np.quantile(taken, q)) for q in (0.2, 0.5, 0.8))
                    spread = f"{middle * 1e3:.0f} ({low * 1e3:.0f}, {high * 1e3:.0f})"
                    lines.append(
                        f"| {codec} {height}p | {how} | {name} | {spread}"
                        f" | {FRAMES / middle:.0f} | {base / middle:.2f}x |"
                    )
    return "\n".join(lines)


def waiting_table(folder: Path, height: int, seconds: float, steps: int, step_seconds: float) -> str:
    """Return the share of training steps spent waiting for frames, with and without loading ahead.

    The step is a sleep, as one on a GPU is to the CPU; two clips are used a step, none of them cached.
    """
    paths = [make(folder, codec, height, seconds) for codec in ("h264", "vp9")]
    lines = [
        f"| {height}p, 16 frames of {seconds:g} s, 2 clips a step of {step_seconds * 1e3:.0f} ms | waiting |",
        "|---|---|",
    ]
    for name, prefetch, workers in (("one ahead, 1 worker", 1, 1), ("8 ahead, 2 workers", 8, 2)):
        sampling = FrameSampling(nframes=16)
        with ClipStore(sampling, resize=BUDGET, cache=ClipCache(0), workers=workers) as store:
            clips = ahead(store, [paths[i % 2] for i in range(2 * steps)], prefetch)
            next(clips), next(clips)
            time.sleep(step_seconds)
            waited, began = 0.0, time.perf_counter()
            for _ in range(steps - 1):
                waited += next(clips) + next(clips)
                time.sleep(step_seconds)
            share = waited / (time.perf_counter() - began)
        lines.append(f"| {name} | {share:.1%} |")
    return "\n".join(lines)


def ahead(store: ClipStore, paths: Sequence[str], prefetch: int) -> Iterator[float]:
    """Load clips in order, `prefetch` of them ahead, and give the seconds that each was waited for."""
    futures = [store.submit(path) for path in paths[:prefetch]]
    for number in range(len(paths)):
        began = time.perf_counter()
        futures[number].result()
        yield time.perf_counter() - began
        futures += [store.submit(path) for path in paths[len(futures) : number + 1 + prefetch]]


def memory_table(folder: Path, clips: int) -> str:
    """Return the resident memory of this process and its decoding processes while clips go by uncached."""
    paths = [make(folder, codec, 360, 2) for codec in ("h264", "vp9")]
    marks = sorted({clips // 10, clips // 2, clips})
    lines = ["| clips decoded | this process, MiB | decoding processes, MiB |", "|---|---|---|"]
    with ClipStore(FrameSampling(nframes=8), resize=BUDGET, cache=ClipCache(0), workers=2) as store:
        for number in range(1, clips + 1):
            store.load(paths[number % 2])
            if number in marks:
                assert store._pool is not None
                own, theirs = resident(os.getpid()), [resident(pid) for pid in store._pool.pids]
                lines.append(f"| {number} | {own:.0f} | {', '.join(f'{x:.0f}' for x in theirs)} |")
    return "\n".join(lines)


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine() -> str:
    """Return what the figures depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    gpu = f"{torch.cuda.get_device_name()}, {nvdec()}" if torch.cuda.is_available() else "no GPU"
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in facts if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return (
        f"{model}, {os.cpu_count()} cores, {gpu}; torch {torch.__version__}, PyAV {av.__version__}; "
        f"{torch.get_num_threads()} threads; commit {commit}; load {os.getloadavg()[0]:.1f} at the start"
    )


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "torch"),
        ("cpu", "reference"),
        *([("cuda", "triton"), ("cuda", "reference")] if torch.cuda.is_available() else []),
    ],
)
def test_patchify(benchmark, device, backend):  # type: ignore[no-untyped-def]
    """Frames of 336x448 to bfloat16 patches, 8 on a CPU and 512 on a GPU; reads 1 byte and writes 2 a value."""
    count = 8 if device == "cpu" else 512
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 336, 448, 3), dtype=np.uint8))
    frames = frames.to(device)

    def run() -> torch.Tensor:
        patches = patchify(frames, SPEC, torch.bfloat16, backend)
        if device == "cuda":
            torch.cuda.synchronize()
        return patches

    patches = benchmark.pedantic(run, rounds=20, warmup_rounds=2)
    assert patches.shape == (count // 2 * 24 * 32, 1176)
    benchmark.extra_info["bytes"] = frames.numel() * 3


@pytest.mark.parametrize("decoder", ["pyav", "dali"])
@pytest.mark.parametrize("how", ["sparse", "dense"])
def test_decode(benchmark, tmp_path, decoder, how):  # type: ignore[no-untyped-def]
    """8 frames of a 2 s clip of 180p VP9."""
    if DECODERS[decoder].unavailable():
        pytest.skip(DECODERS[decoder].unavailable())
    path = make(tmp_path, "vp9", 180, 2)
    indices = list(range(0, 60, 8)) if how == "sparse" else list(range(20, 28))
    frames = benchmark(DECODERS[decoder]("cpu").decode, path, indices)
    assert frames.shape == (8, 180, 320, 3)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the three tables."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4 if SMOKE else 60, help="Length of the clips.")
    parser.add_argument("--heights", type=int, nargs="+", default=[180] if SMOKE else [360, 1080])
    parser.add_argument(
        "--codecs", nargs="+", default=["vp9"] if SMOKE else ["h264", "vp9"], choices=list(CODECS)
    )
    parser.add_argument("--samples", type=int, default=3 if SMOKE else 30)
    parser.add_argument("--clips", type=int, default=60 if SMOKE else 2000, help="Clips of the memory run.")
    parser.add_argument("--steps", type=int, default=4 if SMOKE else 30, help="Steps of the waiting run.")
    parser.add_argument("--step_ms", type=float, default=1000, help="Length of a training step.")
    parser.add_argument("--work", type=Path, help="Folder where the clips are kept between runs.")
    parser.add_argument("--out", type=Path, help="Markdown file to write as well.")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        parts = [machine()]
        print(parts[0], flush=True)
        for table in (
            lambda: decoding_table(folder, options.heights, options.codecs, options.seconds, options.samples),
            lambda: waiting_table(
                folder, options.heights[0], options.seconds, options.steps, options.step_ms / 1e3
            ),
            lambda: memory_table(folder, options.clips),
        ):
            parts.append(table())
            print(f"\n{parts[-1]}", flush=True)
    if options.out is not None:
        options.out.write_text("\n\n".join(parts) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
