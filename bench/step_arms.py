"""The ways to take one training step that `bench_step.py` compares, on a small model for a CPU and a 7B-shaped one
for a GPU.

- `ours`: shared prefix, vision once, fused loss; `ours, ...` with another sampler or attention.
- `sharing off`: the same trainer with `shared_prefix: false`; every response after its own prompt.
- `plain`: the Hugging Face path as trl.GRPOTrainer takes it: `generate(num_return_sequences=G)`, a padded
  [B, P + R] forward with the logits of the completion, `selective_log_softmax`, the reference the same way.

Run as a program, it measures one of them in its own process.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlaif_fast.command_parser import CommandParser
from rlaif_fast.loss.api import fused_linear_grpo_rank_loss, grpo_rank_loss
from rlaif_fast.machine import peak_rss_bytes
from rlaif_fast.policy.plain import model_inputs
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.testing import IDS, TOKENIZER, words
from rlaif_fast.policy.tiny import TinySize, tiny_config
from rlaif_fast.rollout import Rollout, SamplingParams, make_sampler
from rlaif_fast.video import PatchSpec, load_clip, preprocess
from rlaif_fast.video.media import Media
from rlaif_fast.video.sampling import FrameSampling
from rlaif_fast.video.testing import counter_frames, write_video

BETA = 0.04


@dataclass(frozen=True)
class Scale:
    """A model, its frames and where it runs.

    Attributes:
        device: Where.
        dtype: Of the weights.
        size: Widths and depths.
        key_heads: Heads of the keys and values.
        vocabulary: Rows of the embedding; those beyond the tokenizer's are never drawn.
        frame: Width and height of a frame in pixels.
        checkpointing: Recompute activations layer by layer in the backward pass.
        optimizer: SGD if AdamW's state would not fit beside the weights, their gradients and the reference.
    """

    device: str
    dtype: torch.dtype
    size: TinySize
    key_heads: int
    vocabulary: int
    frame: tuple[int, int]
    checkpointing: bool
    optimizer: Callable[..., torch.optim.Optimizer]

    @property
    def spec(self) -> PatchSpec:
        return PatchSpec(patch_size=self.size.patch_size, temporal_patch_size=2, merge_size=2)

    @property
    def patch_tokens(self) -> int:
        """Tokens of a temporal patch, with its timestamp and its two markers."""
        width, height = self.frame
        return width * height // (2 * self.size.patch_size) ** 2 + 3

    def patches_in_time(self, prompt: int) -> int:
        """How many temporal patches fill a prompt of so many tokens."""
        return (prompt - 10) // self.patch_tokens


SCALES = {
    # A four-layer decoder of 4.2 M parameters.
    "cpu": Scale(
        device="cpu",
        dtype=torch.float32,
        size=TinySize(
            hidden_size=256,
            layers=4,
            heads=8,
            intermediate_size=768,
            vision_hidden_size=128,
            vision_layers=2,
        ),
        key_heads=4,
        vocabulary=len(IDS),
        frame=(96, 80),
        checkpointing=False,
        optimizer=torch.optim.AdamW,
    ),
    # The decoder of Qwen2.5-7B behind the vision tower of Qwen3-VL-8B.
    "cuda": Scale(
        device="cuda",
        dtype=torch.bfloat16,
        size=TinySize(
            hidden_size=3584,
            layers=28,
            heads=28,
            intermediate_size=18944,
            vision_hidden_size=1152,
            vision_layers=27,
            vision_heads=16,
            vision_intermediate_size=4304,
            patch_size=16,
            vision_positions=2304,
            initializer_range=0.02,
            vision_initializer_range=0.02,
        ),
        key_heads=4,
        vocabulary=152_064,
        frame=(448, 320),
        checkpointing=True,
        optimizer=torch.optim.SGD,
    ),
}


@dataclass(frozen=True)
class Case:
    """One size: prompt tokens, response tokens, generations, videos a step."""

    prompt: int
    response: int
    generations: int
    videos: int = 1

    def __str__(self) -> str:
        return f"P={self.prompt}-R={self.response}-G={self.generations}"


def make_model(scale: Scale):
    """A Qwen3-VL of random weights that never ends a response by itself."""
    from transformers import AutoModelForImageTextToText

    config = tiny_config("qwen3_vl", scale.vocabulary, IDS, scale.size)
    text = config.text_config
    text.num_key_value_heads = scale.key_heads
    text.max_position_embeddings = 16384
    half = text.head_dim // 2
    text.rope_parameters["mrope_section"] = [half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16]
    torch.manual_seed(0)
    with torch.device(scale.device):
        model = AutoModelForImageTextToText.from_config(config, dtype=scale.dtype)
    model = model.to(scale.device).train()
    if scale.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.generation_config.eos_token_id = IDS["<|im_end|>"]
    model.generation_config.pad_token_id = IDS["<|endoftext|>"]
    return model


def move(model) -> None:
    """Put the weights a little away from the reference, so that the KL term is not zero."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype)
            parameter.add_(noise, alpha=2e-3)


def write_clips(folder: Path, case: Case, scale: Scale) -> list[Path]:
    """Write one video file per prompt, with enough frames to fill the prompt."""
    paths = []
    for index in range(case.videos):
        path = folder / f"{case}-{index}.webm"
        frames = scale.patches_in_time(case.prompt) * 2 + 30 * index
        write_video(path, counter_frames(frames, *scale.frame), fps=10)
        paths.append(path)
    return paths


def read_prompt(path: Path, case: Case, scale: Scale, seed: int) -> EncodedPrompt:
    """Decode a file and lay out its prompt, words filling it up to P tokens."""
    width, height = scale.frame
    clip = load_clip(path, sampling=FrameSampling(nframes=2 * scale.patches_in_time(case.prompt)))
    media: Media = preprocess(clip, scale.spec, min_pixels=width * height, max_pixels=width * height)
    start, end, pad = (IDS[f"<|{name}|>"] for name in ("vision_start", "vision_end", "video_pad"))
    ids = words(3, seed)
    t, h, w = media.grid_thw
    for frame in range(t):
        ids += [IDS[f"<{frame % 10:.1f} seconds>"], start, *[pad] * (h * w // 4), end]
    ids += words(case.prompt - len(ids), seed + 1)
    assert len(ids) == case.prompt
    return EncodedPrompt(torch.tensor(ids), (media,))


def sampling(case: Case) -> SamplingParams:
    """How responses are drawn: every one has exactly R tokens."""
    # With seed 1 one of the 2,048 draws of the largest size falls 2e-10 beside the edge between two tokens.
    seed = 2 if case == Case(4096, 128, 16) else 1
    return SamplingParams(max_new_tokens=case.response, min_new_tokens=case.response, seed=seed)


def advantages(case: Case, device: str) -> Tensor:
    """Advantages from some oracle, the same for every arm."""
    return torch.linspace(-1, 0.5, case.generations, device=device).repeat(case.videos)


class Stopwatch:
    """Seconds by stage: processor time on a CPU, wall time on a GPU that has finished."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = self.now()
        yield
        self.seconds[stage] += self.now() - begin

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Options:
    """How the trainer is set."""

    shared_prefix: bool = True
    sampler: str = "auto"
    attention_backend: str = "auto"


OURS = {
    "ours": Options(),
    "ours, CUDA graphs": Options(sampler="cuda_graphs"),
    "ours, CUDA graphs, torch_flash": Options(sampler="cuda_graphs", attention_backend="torch_flash"),
    "ours, CUDA graphs, flex": Options(sampler="cuda_graphs", attention_backend="flex"),
    "sharing off": Options(shared_prefix=False),
}
ARMS = {"cpu": ("ours", "sharing off", "plain"), "cuda": (*OURS, "plain")}


class Ours:
    """The trainer's step; reads the files, samples, updates."""

    def __init__(self, paths: list[Path], case: Case, scale: Scale, options: Options) -> None:
        self.paths, self.case, self.scale = paths, case, scale
        self.policy = Policy(
            make_model(scale),
            TOKENIZER,
            shared_prefix=options.shared_prefix,
            attention_backend=options.attention_backend,
        )
        self.policy.freeze_reference()
        move(self.policy.model)
        self.sampler = make_sampler(self.policy, options.sampler)
        self.optimizer = scale.optimizer(self.policy.model.parameters(), lr=1e-6)

    def step(self, watch: Stopwatch) -> tuple[float, Rollout]:
        case, policy = self.case, self.policy
        with watch("decode"):
            prompts = [read_prompt(path, case, self.scale, seed) for seed, path in enumerate(self.paths)]
        with watch("rollout"):
            features = policy.encode_media(prompts)  # once a step; the update goes back through it
            shared = {} if features is None else {"features": features.detach()}
            with torch.no_grad():
                rollout = self.sampler.sample(prompts, case.generations, sampling(case), **shared)
        lengths = rollout.mask.sum(1)
        with watch("reference"):
            reference = policy.reference_logps(prompts, rollout.token_ids, lengths)
        with watch("forward"):
            hidden = policy.response_hidden(prompts, rollout.token_ids, lengths, features=features)
            output = fused_linear_grpo_rank_loss(
                hidden,
                policy.head_weight,
                rollout.token_ids[rollout.mask],
                advantages=advantages(case, self.scale.device),
                bias=policy.head_bias,
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

    def __init__(self, paths: list[Path], case: Case, scale: Scale) -> None:
        self.paths, self.case, self.scale = paths, case, scale
        self.policy = Policy(make_model(scale), TOKENIZER, shared_prefix=False)
        self.model = self.policy.model
        self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()
        move(self.model)
        self.sampler = make_sampler(self.policy)
        self.optimizer = scale.optimizer(self.model.parameters(), lr=1e-6)

    def logps(self, model, inputs: dict[str, Tensor], tokens: Tensor) -> Tensor:
        kept = tokens.shape[1]
        logits = model(**inputs, use_cache=False, logits_to_keep=kept + 1).logits[:, :-1]
        logits = logits.float() + self.policy.head_bias
        rows = zip(logits, tokens)
        return torch.stack([row.log_softmax(-1).gather(-1, ids[:, None])[:, 0] for row, ids in rows])

    def step(self, watch: Stopwatch) -> tuple[float, Rollout]:
        case = self.case
        with watch("decode"):
            prompts = [read_prompt(path, case, self.scale, seed) for seed, path in enumerate(self.paths)]
        with watch("rollout"):
            rollout = self.sampler.sample(prompts, case.generations, sampling(case))
        tokens = rollout.token_ids
        with watch("reference"), torch.no_grad():
            sizes = [case.generations] * case.videos
            inputs = model_inputs(self.model, prompts, tokens, rollout.mask.sum(1), group_sizes=sizes)
            reference = self.logps(self.reference, inputs, tokens)
        with watch("forward"):
            logps = self.logps(self.model, inputs, tokens)
            given = advantages(case, self.scale.device)
            output = grpo_rank_loss(logps, advantages=given, ref_logps=reference, beta=BETA)
        with watch("backward"):
            output.loss.backward()
        with watch("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return output.loss.item(), rollout


def make_arm(name: str, paths: list[Path], case: Case, scale: Scale) -> Ours | Plain:
    """One arm, ready for its first step."""
    return Plain(paths, case, scale) if name == "plain" else Ours(paths, case, scale, OURS[name])


@dataclass(frozen=True)
class Measured:
    """What one arm did, the first step not timed.

    Attributes:
        seconds: Of each step.
        stages: Seconds by stage, all steps together.
        peak_bytes: What a step adds at its peak to the memory in use before the first.
        held_bytes: What was in use before the first.
        losses: Of each step, the first included.
    """

    seconds: list[float]
    stages: dict[str, float]
    peak_bytes: int
    held_bytes: int
    losses: list[float]


def measure_alone(arm: Ours | Plain, rounds: int) -> Measured:
    """Take one step and `rounds` timed ones."""
    device = arm.scale.device
    on_gpu = device == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else peak_rss_bytes()
    losses = [arm.step(Stopwatch(device))[0]]
    watch, seconds = Stopwatch(device), []
    for _ in range(rounds):
        begin = watch.now()
        losses.append(arm.step(watch)[0])
        seconds.append(watch.now() - begin)
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_rss_bytes()
    return Measured(seconds, dict(watch.seconds), peak - held, held, losses)


def main() -> None:
    """Print the JSON of `Measured`."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("arm", choices=ARMS["cuda"])
    for name in ("prompt", "response", "generations", "rounds"):
        parser.add_argument(name, type=int)
    parser.add_argument("videos", type=Path, nargs="+")
    options = parser.parse_args()
    scale, videos = SCALES[options.scale], options.videos
    if scale.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch.set_num_threads(1)
    case = Case(options.prompt, options.response, options.generations, len(videos))
    runner = make_arm(options.arm, videos, case, scale)
    if scale.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    print(json.dumps(asdict(measure_alone(runner, options.rounds))))


if __name__ == "__main__":
    main()
