"""The whole training step, from video file to optimizer, and the rollout alone, against two baselines.

The arms are those of `step_arms.py`: ours, the same trainer with sharing off, and the padded Hugging Face path. On
a CPU they take turns in one process on the same prompts, weights, draws and samples; on a GPU each has its own
process, since three 7B models do not fit on one device.

Sizes: P prompt tokens (nearly all of them the video's), R response tokens, G responses; every response has
exactly R tokens. Tokens through the decoder in one pass: ours P + G (R - 1), the others G (P + R).

Run: `pytest bench/bench_step.py --benchmark-only`; with `RLAIF_FAST_BENCH=full` set, every size of the README; on a
GPU: `-k cuda`.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import step_arms
import torch
from benchmarking import FULL, SMOKE, append_line, bar, device_name
from step_arms import ARMS, SCALES, Case, Measured, Stopwatch, make_arm, make_model, read_prompt, write_clips

from rlaif_fast.machine import keep_freed_memory
from rlaif_fast.policy.attention import ATTENTION_BACKENDS
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.testing import TOKENIZER, words
from rlaif_fast.rollout import PlainSampler, Sampler, SharedPrefixSampler

STEP_SECONDS = 0 if SMOKE else 30 if FULL else 60  # of interleaved rounds, per size
MIN_ROUNDS, MAX_ROUNDS = (2 if SMOKE or FULL else 3), 30
GPU_ROUNDS = 1 if SMOKE else 5

STEP_CASES = [Case(512, 32, 8)]
ROLLOUT_CASES = [Case(512, 32, 8), Case(768, 96, 6), Case(1024, 32, 8)]
if FULL:
    STEP_CASES = [Case(p, r, g) for p in (512, 1024, 4096) for r in (32, 128) for g in (4, 8, 16)]
    ROLLOUT_CASES = STEP_CASES
GPU_CASE = Case(4096, 128, 8)
# Least ratio of the plain path's median to ours, on a CPU with one thread.
STEP_BAR = {Case(512, 32, 8): 4.0}
ROLLOUT_BAR = {Case(512, 32, 8): 2.2, Case(768, 96, 6): 3.0, Case(1024, 32, 8): 4.0}
GPU_BAR, GPU_MEMORY_BAR = 4.0, 0.5
FIRST_ON_GPU = ("plain", "ours, CUDA graphs")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    keep_freed_memory()  # as the trainer does; it serves every arm
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def interleave(arms: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Processor seconds of the arms, each of which has run before, in turn until the time is up.

    With one thread that is the wall time of an idle machine, and it stays so on a busy one.
    """
    times: dict[str, list[float]] = {name: [] for name in arms}
    begin = time.perf_counter()
    for done in range(1, MAX_ROUNDS + 1):
        for name, run in arms.items():
            gc.collect()
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
        if done >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
            break
    return times


def alone(scale: str, arm: str, case: Case, paths: list[Path], rounds: int) -> Measured:
    """Measure one arm in a process of its own, to which this one leaves the GPU's memory."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
    numbers = (case.prompt, case.response, case.generations, rounds)
    command = [sys.executable, step_arms.__file__, scale, arm, *map(str, numbers), *map(str, paths)]
    root = Path(__file__).parents[1]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return Measured(**json.loads(answer.stdout.splitlines()[-1]))


def describe(times: list[float]) -> str:
    if len(times) == 1:
        return f"{times[0] * 1e3:8.1f} ms (n=1)"
    fifths = statistics.quantiles(times, n=5)
    middle, low, high = (x * 1e3 for x in (statistics.median(times), fifths[0], fifths[3]))
    return f"{middle:8.1f} ms (p20 {low:.1f}, p80 {high:.1f}, n={len(times)})"


def shares(stages: dict[str, float]) -> str:
    total = sum(stages.values())
    return ", ".join(f"{stage} {value / total:.0%}" for stage, value in stages.items())


def report(capsys, lines: list[str]) -> None:
    with capsys.disabled():
        print("\n" + "\n".join(lines))


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step(benchmark, case: Case, tmp_path: Path, capsys) -> None:
    """The whole step; the arms draw the same tokens and get the same loss."""
    scale = SCALES["cpu"]
    paths = write_clips(tmp_path, case, scale)
    arms = {name: make_arm(name, paths, case, scale) for name in ARMS["cpu"]}
    first = {name: arm.step(Stopwatch("cpu")) for name, arm in arms.items()}
    for name, (loss, rollout) in first.items():
        assert rollout.mask.all()
        assert torch.equal(rollout.token_ids, first["ours"][1].token_ids), name
        assert loss == pytest.approx(first["ours"][0], rel=1e-5, abs=1e-6), name
    watches = {name: Stopwatch("cpu") for name in arms}
    runs = {name: partial(arm.step, watches[name]) for name, arm in arms.items()}
    times = interleave(runs, STEP_SECONDS)
    benchmark.pedantic(arms["ours"].step, args=(Stopwatch("cpu"),), rounds=1)
    middle = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: alone("cpu", name, case, paths, 0).peak_bytes for name in arms}
    ratios = {name: middle[name] / middle["ours"] for name in arms}
    parameters = sum(p.numel() for p in arms["plain"].policy.model.parameters())
    lines = [f"step {case}, {case.videos} videos, {parameters:,} parameters, torch {torch.__version__}"]
    for name in arms:
        peak = f"peak +{memory[name] / 2**20:,.0f} MiB"
        stages = shares(watches[name].seconds)
        lines.append(f"  {name:12} {describe(times[name])} {ratios[name]:5.2f}x  {peak}  {stages}")
    report(capsys, lines)
    benchmark.extra_info |= {
        "case": str(case),
        "ratio_sharing_off": ratios["sharing off"],
        "ratio_plain": ratios["plain"],
        "peak_bytes": memory,
        "stages": {name: dict(watch.seconds) for name, watch in watches.items()},
    }
    least = STEP_BAR.get(case, 1.0)
    bar(ratios["plain"] >= least, f"a step at least {least} times faster, measured {ratios['plain']:.2f}")
    assert memory["ours"] < memory["plain"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_cuda(benchmark, tmp_path: Path, capsys) -> None:
    """The whole step of a 7B-shaped policy in bfloat16, wall time; exactness is tested in float32 elsewhere."""
    paths = write_clips(tmp_path, GPU_CASE, SCALES["cuda"])
    device, refused = torch.device("cuda"), {}
    for name, options in step_arms.OURS.items():
        if options.attention_backend != "auto":
            refused[name] = ATTENTION_BACKENDS[options.attention_backend].refuses(device, torch.bfloat16)
    lines = [
        f"step {GPU_CASE}, 7B-shaped, bfloat16, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    ]
    results: dict[str, Measured] = {}
    # What the comparison is about comes first, in case the time ends.
    for name in sorted(ARMS["cuda"], key=lambda name: name not in FIRST_ON_GPU):
        if refused.get(name):
            lines.append(f"  {name:32} not run: {refused[name]}")
            continue
        try:
            results[name] = alone("cuda", name, GPU_CASE, paths, GPU_ROUNDS)
            append_line(case=f"step {GPU_CASE}", arm=name, device=device_name("cuda"), **vars(results[name]))
        except subprocess.CalledProcessError as error:  # the others are measured all the same
            lines.append(f"  {name:32} FAILED with exit code {error.returncode}; its message is above")
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are in extra_info
    middle = {name: statistics.median(result.seconds) for name, result in results.items()}
    for name, result in results.items():
        peak = f"{result.held_bytes / 2**30:.1f} +{result.peak_bytes / 2**30:.1f} GiB"
        ratio = middle.get("plain", float("nan")) / middle[name]
        lines.append(f"  {name:32} {describe(result.seconds)} {ratio:5.2f}x  {peak}  {shares(result.stages)}")
    report(capsys, lines)
    benchmark.extra_info |= {
        name: vars(result) | {"median_s": middle[name]} for name, result in results.items()
    }
    assert set(results) == {name for name in ARMS["cuda"] if not refused.get(name)}, "an arm failed"
    # Weights of bfloat16 sample other tokens on another path, so the losses agree roughly.
    for name, result in results.items():
        assert result.losses[0] == pytest.approx(results["plain"].losses[0], rel=5e-2), name
    best = min((name for name in results if name.startswith("ours")), key=lambda name: middle[name])
    ratio = middle["plain"] / middle[best]
    bar(ratio >= GPU_BAR, f"a step at least {GPU_BAR} times faster, measured {ratio:.2f} ({best})")
    share = results[best].peak_bytes / results["plain"].peak_bytes
    bar(share <= GPU_MEMORY_BAR, f"at most {GPU_MEMORY_BAR:.0%} of the memory, measured {share:.0%} ({best})")


@pytest.mark.parametrize("vision", [False, True], ids=["text", "video"])
@pytest.mark.parametrize("case", ROLLOUT_CASES, ids=str)
def test_rollout(benchmark, case: Case, vision: bool, tmp_path: Path, capsys) -> None:
    """The rollout alone against `generate(num_return_sequences=G)`; the bars are for text, where no tower
    helps.
    """
    scale, params = SCALES["cpu"], step_arms.sampling(case)
    policy = Policy(make_model(scale), TOKENIZER, feature_cache_bytes=0)
    if vision:
        paths = write_clips(tmp_path, case, scale)
        prompts = [read_prompt(path, case, scale, seed) for seed, path in enumerate(paths)]
    else:
        prompts = [EncodedPrompt(torch.tensor(words(case.prompt, seed))) for seed in range(case.videos)]
    samplers: dict[str, Sampler] = {"ours": SharedPrefixSampler(policy), "generate": PlainSampler(policy)}
    runs = {name: partial(s.sample, prompts, case.generations, params) for name, s in samplers.items()}
    first = {name: run().token_ids for name, run in runs.items()}
    assert torch.equal(first["ours"], first["generate"])
    times = interleave(runs, STEP_SECONDS / 5)
    benchmark.pedantic(runs["ours"], rounds=1)
    ratio = statistics.median(times["generate"]) / statistics.median(times["ours"])
    kind = "video" if vision else "text"
    lines = [f"rollout {case}, {case.videos} {kind} prompts: {ratio:.2f}x"]
    report(capsys, lines + [f"  {name:12} {describe(values)}" for name, values in times.items()])
    benchmark.extra_info |= {"case": str(case), "prompts": kind, "ratio_generate": ratio}
    least = 1.0 if vision else ROLLOUT_BAR.get(case, 1.0)
    bar(ratio >= least, f"a rollout at least {least} times faster, measured {ratio:.2f}")
