"""The whole training step, from video file to optimizer, and the rollout alone, against two baselines.

Arms, interleaved in one process on the same prompts, weights, draws and samples:

- `ours`: shared prefix, vision once, fused loss.
- `sharing off`: the same trainer with `shared_prefix: false`; every response behind its own prompt.
- `plain`: the Hugging Face path as trl.GRPOTrainer takes it: `generate(num_return_sequences=G)`, a padded
  [B, P + R] forward with the logits of the completion, `selective_log_softmax`, the reference the same way.

Sizes: P prompt tokens (nearly all of them the video's), R response tokens, G responses; every response has
exactly R tokens. Tokens through the decoder in one pass: ours P + G (R - 1), the others G (P + R).

Run: `pytest bench/bench_step.py --benchmark-only`; every size of the README: `RLAIF_FAST_BENCH=full` before.
"""

from __future__ import annotations

import copy
import gc
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlaif_fast.benchmarking import FULL, SMOKE, bar
from rlaif_fast.losses import fused_linear_grpo_rank_loss, grpo_rank_loss
from rlaif_fast.machine import keep_freed_memory, peak_rss_bytes
from rlaif_fast.policy.plain import model_inputs
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt, Media
from rlaif_fast.policy.testing import IDS, TOKENIZER, words
from rlaif_fast.policy.tiny import TinySize, tiny_config
from rlaif_fast.rollout.base import Rollout, Sampler, SamplingParams
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler
from rlaif_fast.video import PatchSpec, load_clip, preprocess
from rlaif_fast.video.sampling import FrameSampling
from rlaif_fast.video.testing import counter_frames, write_video

SIZE = TinySize(
    hidden_size=256, layers=4, heads=8, intermediate_size=768, vision_hidden_size=128, vision_layers=2
)
SPEC = PatchSpec(patch_size=8, temporal_patch_size=2, merge_size=2)
FRAME = (96, 80)  # pixels, so 30 tokens a temporal patch; with its timestamp and two marks, 33
BETA = 0.04
STEP_SECONDS = 0 if SMOKE else 30 if FULL else 60  # of interleaved rounds, per size
MIN_ROUNDS, MAX_ROUNDS = (2 if SMOKE or FULL else 3), 30


@dataclass(frozen=True)
class Case:
    """One size: prompt tokens, response tokens, generations, videos a step."""

    prompt: int
    response: int
    generations: int
    videos: int = 1

    def __str__(self) -> str:
        return f"P={self.prompt}-R={self.response}-G={self.generations}"


BAR = Case(512, 32, 8)
STEP_CASES = [BAR]
ROLLOUT_CASES = [Case(512, 32, 8), Case(1024, 32, 8)]
if FULL:
    STEP_CASES = [Case(p, r, g) for p in (512, 1024, 4096) for r in (32, 128) for g in (4, 8, 16)]
    ROLLOUT_CASES = STEP_CASES
# Least ratio of the plain path's median to ours, on a CPU with one thread.
STEP_BAR = {BAR: 4.0}
ROLLOUT_BAR = {Case(512, 32, 8): 2.2, Case(1024, 32, 8): 3.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    keep_freed_memory()  # as the trainer does; it serves every arm
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the workload -------------------------------------------------------------------------------------------


def make_model():
    """A four-layer Qwen3-VL of random weights that never ends a response by itself."""
    from transformers import AutoModelForImageTextToText

    config = tiny_config("qwen3_vl", len(IDS), IDS, SIZE)
    config.text_config.num_key_value_heads = 4
    config.text_config.max_position_embeddings = 16384
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).train()
    model.generation_config.eos_token_id = IDS["<|im_end|>"]
    model.generation_config.pad_token_id = IDS["<|endoftext|>"]
    return model


def move(model) -> None:
    """Put the weights a little away from the reference, so that the KL term is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=2e-3)


def write_clips(folder: Path, case: Case) -> list[Path]:
    """One video file a prompt, as many frames as fill the prompt."""
    paths = []
    for index in range(case.videos):
        path = folder / f"{case}-{index}.webm"
        write_video(path, counter_frames(patches_in_time(case) * 2 + 30 * index, *FRAME), fps=10)
        paths.append(path)
    return paths


def patches_in_time(case: Case) -> int:
    return (case.prompt - 10) // 33


def read_prompt(path: Path, case: Case, seed: int) -> EncodedPrompt:
    """Decode a file and lay out its prompt, words filling it up to P tokens."""
    count = patches_in_time(case)
    clip = load_clip(path, sampling=FrameSampling(nframes=2 * count))
    media: Media = preprocess(clip, SPEC, min_pixels=FRAME[0] * FRAME[1], max_pixels=FRAME[0] * FRAME[1])
    start, end, pad = (IDS[f"<|{name}|>"] for name in ("vision_start", "vision_end", "video_pad"))
    ids = words(3, seed)
    t, h, w = media.grid_thw
    for frame in range(t):
        ids += [IDS[f"<{frame % 10:.1f} seconds>"], start, *[pad] * (h * w // 4), end]
    ids += words(case.prompt - len(ids), seed + 1)
    assert len(ids) == case.prompt
    return EncodedPrompt(torch.tensor(ids), (media,))


def sampling(case: Case) -> SamplingParams:
    return SamplingParams(max_new_tokens=case.response, min_new_tokens=case.response, seed=1)


def advantages(case: Case) -> Tensor:
    """What some oracle gave; the same for every arm."""
    return torch.linspace(-1, 0.5, case.generations).repeat(case.videos)


# --- the arms -----------------------------------------------------------------------------------------------


class Stopwatch:
    """Processor seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str):
        begin = time.process_time()
        yield
        self.seconds[stage] += time.process_time() - begin


class Ours:
    """The trainer's step, with sharing on or off; reads the files, samples, updates."""

    def __init__(self, paths: list[Path], case: Case, *, shared_prefix: bool) -> None:
        self.paths, self.case = paths, case
        self.policy = Policy(make_model(), TOKENIZER, shared_prefix=shared_prefix)
        self.policy.freeze_reference()
        move(self.policy.model)
        sampler = SharedPrefixSampler if shared_prefix else PlainSampler
        self.sampler: Sampler = sampler(self.policy)
        self.optimizer = torch.optim.AdamW(self.policy.model.parameters(), lr=1e-6)

    def step(self, watch: Stopwatch) -> tuple[float, Rollout]:
        with watch("decode"):
            prompts = [read_prompt(path, self.case, seed) for seed, path in enumerate(self.paths)]
        with watch("rollout"):
            features = self.policy.encode_media(prompts)  # once a step; the update goes back through it
            shared = {} if features is None else {"features": features.detach()}
            rollout = self.sampler.sample(prompts, self.case.generations, sampling(self.case), **shared)
        lengths = rollout.mask.sum(1)
        with watch("reference"):
            reference = self.policy.reference_logps(prompts, rollout.token_ids, lengths)
        with watch("forward"):
            hidden = self.policy.response_hidden(prompts, rollout.token_ids, lengths, features=features)
            output = fused_linear_grpo_rank_loss(
                hidden,
                self.policy.head_weight,
                rollout.token_ids[rollout.mask],
                advantages=advantages(self.case),
                bias=self.policy.head_bias,
                lengths=lengths,
                ref_logps=reference,
                beta=BETA,
            )
        with watch("backward"):
            output.loss.backward()
        with watch("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return output.loss.item(), rollout


class Plain:
    """The same step the way trl.GRPOTrainer takes it, on plain transformers."""

    def __init__(self, paths: list[Path], case: Case) -> None:
        self.paths, self.case = paths, case
        self.policy = Policy(make_model(), TOKENIZER, shared_prefix=False)
        self.model = self.policy.model
        self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
        move(self.model)
        self.sampler = PlainSampler(self.policy)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def logps(self, model, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
        kept = tokens.shape[1]
        logits = model(**inputs, use_cache=False, logits_to_keep=kept + 1).logits[:, :-1]
        logits = logits.float() + self.policy.head_bias
        rows = zip(logits, tokens)
        return torch.stack([row.log_softmax(-1).gather(-1, ids[:, None])[:, 0] for row, ids in rows])

    def step(self, watch: Stopwatch) -> tuple[float, Rollout]:
        case = self.case
        with watch("decode"):
            prompts = [read_prompt(path, case, seed) for seed, path in enumerate(self.paths)]
        with watch("rollout"):
            rollout = self.sampler.sample(prompts, case.generations, sampling(case))
        tokens = rollout.token_ids
        with watch("reference"), torch.no_grad():
            sizes = [case.generations] * case.videos
            inputs = model_inputs(self.model, prompts, tokens, rollout.mask.sum(1), group_sizes=sizes)
            reference = self.logps(self.reference, inputs, tokens)
        with watch("forward"):
            logps = self.logps(self.model, inputs, tokens)
            output = grpo_rank_loss(logps, advantages=advantages(case), ref_logps=reference, beta=BETA)
        with watch("backward"):
            output.loss.backward()
        with watch("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return output.loss.item(), rollout


# --- measuring ----------------------------------------------------------------------------------------------


def interleave(arms: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
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


def describe(times: list[float]) -> str:
    fifths = statistics.quantiles(times, n=5)
    middle, low, high = (x * 1e3 for x in (statistics.median(times), fifths[0], fifths[3]))
    return f"{middle:8.1f} ms (p20 {low:.1f}, p80 {high:.1f}, n={len(times)})"


def peak_memory(arm: str, paths: list[Path], case: Case) -> int:
    """Bytes that one step of `arm` adds to the resident set at its peak, in a process of its own."""
    sizes = (case.prompt, case.response, case.generations)
    command = [sys.executable, __file__, arm, *map(str, sizes), *map(str, paths)]
    root = Path(__file__).parents[1]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return int(answer.stdout.split()[-1])


def report(capsys, lines: list[str]) -> None:
    with capsys.disabled():
        print("\n" + "\n".join(lines))


# --- the benchmarks -----------------------------------------------------------------------------------------


def make_arms(paths: list[Path], case: Case) -> dict[str, Ours | Plain]:
    return {
        "ours": Ours(paths, case, shared_prefix=True),
        "sharing off": Ours(paths, case, shared_prefix=False),
        "plain": Plain(paths, case),
    }


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_step(benchmark, case: Case, tmp_path: Path, capsys) -> None:
    """The whole step; the arms draw the same tokens and get the same loss."""
    paths = write_clips(tmp_path, case)
    arms = make_arms(paths, case)
    first = {name: arm.step(Stopwatch()) for name, arm in arms.items()}
    for name, (loss, rollout) in first.items():
        assert rollout.mask.all()
        assert torch.equal(rollout.token_ids, first["ours"][1].token_ids), name
        assert loss == pytest.approx(first["ours"][0], rel=1e-5, abs=1e-6), name
    watches = {name: Stopwatch() for name in arms}
    runs = {name: partial(arm.step, watches[name]) for name, arm in arms.items()}
    times = interleave(runs, STEP_SECONDS)
    benchmark.pedantic(arms["ours"].step, args=(Stopwatch(),), rounds=1)
    middle = {name: statistics.median(values) for name, values in times.items()}
    memory = {name: peak_memory(name, paths, case) for name in arms}
    ratios = {name: middle[name] / middle["ours"] for name in arms}
    parameters = sum(p.numel() for p in arms["plain"].model.parameters())
    lines = [f"step {case}, {case.videos} videos, {parameters:,} parameters, torch {torch.__version__}"]
    for name in arms:
        total = sum(watches[name].seconds.values())
        stages = ", ".join(f"{stage} {value / total:.0%}" for stage, value in watches[name].seconds.items())
        peak = f"peak +{memory[name] / 2**20:,.0f} MiB"
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


@pytest.mark.parametrize("vision", [False, True], ids=["text", "video"])
@pytest.mark.parametrize("case", ROLLOUT_CASES, ids=str)
def test_rollout(benchmark, case: Case, vision: bool, tmp_path: Path, capsys) -> None:
    """The rollout alone against `generate(num_return_sequences=G)`; the bars are for text, where no tower
    helps.
    """
    model = make_model()
    policy = Policy(model, TOKENIZER, feature_cache_bytes=0)
    if vision:
        prompts = [read_prompt(path, case, seed) for seed, path in enumerate(write_clips(tmp_path, case))]
    else:
        prompts = [EncodedPrompt(torch.tensor(words(case.prompt, seed))) for seed in range(case.videos)]
    samplers = {"ours": SharedPrefixSampler(policy), "generate": PlainSampler(policy)}
    first = {name: s.sample(prompts, case.generations, sampling(case)) for name, s in samplers.items()}
    assert torch.equal(first["ours"].token_ids, first["generate"].token_ids)
    runs = {
        name: partial(sampler.sample, prompts, case.generations, sampling(case))
        for name, sampler in samplers.items()
    }
    times = interleave(runs, STEP_SECONDS / 5)
    benchmark.pedantic(runs["ours"], rounds=1)
    ratio = statistics.median(times["generate"]) / statistics.median(times["ours"])
    kind = "video" if vision else "text"
    lines = [f"rollout {case}, {case.videos} {kind} prompts: {ratio:.2f}x"]
    report(capsys, lines + [f"  {name:12} {describe(values)}" for name, values in times.items()])
    benchmark.extra_info |= {"case": str(case), "prompts": kind, "ratio_generate": ratio}
    least = 1.0 if vision else ROLLOUT_BAR.get(case, 1.0)
    bar(ratio >= least, f"a rollout at least {least} times faster, measured {ratio:.2f}")


def main() -> None:
    """`bench_step.py ARM P R G VIDEO...` prints the bytes that one step adds at its peak."""
    arm, prompt, response, generations, *videos = sys.argv[1:]
    torch.set_num_threads(1)
    paths = [Path(video) for video in videos]
    case = Case(int(prompt), int(response), int(generations), len(paths))
    runner = Plain(paths, case) if arm == "plain" else Ours(paths, case, shared_prefix=arm == "ours")
    before = peak_rss_bytes()
    runner.step(Stopwatch())
    print(peak_rss_bytes() - before)


if __name__ == "__main__":
    main()
