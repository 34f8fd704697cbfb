"""One RL step of each family of Video-LLMs with the shared prefix, against the same step without it.

A step is rollout, log-probabilities of the reference, forward, backward and optimizer. Both arms are the same model
class with the same prompts, weights and draws. They take turns in one process, and the ratio of each pair is
reported. The decoders are four layers of width 128 after towers of width 32, so the ratio is the decoder's.

Sizes: one clip of 16 frames in a prompt of P tokens (the rest are words), R response tokens, G responses.
Tokens through the decoder in one pass: shared P + G (R - 1), plain G (P + R).

Run: `pytest bench/bench_families.py --benchmark-only`; `RLAIF_FAST_BENCH_LINES` names a file for the lines of JSON.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import family_checkpoints
import pytest
import torch
from benchmarking import SMOKE, append_line, bar, device_name

from rlaif_fast.data.schema import Example
from rlaif_fast.policy.families import FAMILIES
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.prompts.encoder import PromptEncoder
from rlaif_fast.rollout import PlainSampler, SamplingParams, SharedPrefixSampler
from rlaif_fast.video.base import Clip

PROMPT, RESPONSE, GENERATIONS = (256, 8, 4) if SMOKE else (1024, 32, 8)
PAIRS = 1 if SMOKE else 3
FRAMES, SIDE = 16, 32
LEAST = 2.0  # ratio of every family
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Where a recipe has the key.
MORE: dict[str, Any] = {
    "head_dim": 32,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "sliding_window": 512,
}
SHARED = sorted(name for name, family in FAMILIES.items() if family.unshared is None)


def wide(model_type: str) -> dict[str, Any]:
    """The recipe of a family with a wider decoder."""
    values = copy.deepcopy(family_checkpoints.recipe(model_type)[0])
    text, vision = values["text_config"], values["vision_config"]
    text |= TEXT | {key: value for key, value in MORE.items() if key in text}
    if "layer_types" in text:
        text["layer_types"] = [text["layer_types"][0]] * 3 + ["full_attention"]
    if "mrope_section" in text.get("rope_parameters", {}):
        text["rope_parameters"] |= {"mrope_section": [8, 4, 4]}
    if "out_hidden_size" in vision:  # what the merger gives; Qwen2-VL calls it otherwise
        vision["hidden_size" if "embed_dim" in vision else "out_hidden_size"] = TEXT["hidden_size"]
    return values


def make_prompt(model_type: str, model, tokenizer) -> EncodedPrompt:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (FRAMES, SIDE, SIDE, 3), generator=generator).to(torch.uint8)
    clip = Clip(frames, tuple(0.5 * i for i in range(FRAMES)), key="clip", sample_fps=2.0)
    spec = FAMILIES[model_type].patch_spec(
        model.config, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "merge_size": 2}
    )
    encoder = PromptEncoder(tokenizer, model_type, spec, spec.budget(SIDE**2, SIDE**2))
    prompt = encoder.encode(Example(id="0", question="what color"), [clip])
    (word,) = tokenizer("red", add_special_tokens=False)["input_ids"]
    filler = torch.full((max(0, PROMPT - len(prompt.input_ids)),), word)
    return EncodedPrompt(torch.cat((prompt.input_ids, filler)), prompt.media)


class Step:
    """One arm."""

    def __init__(self, model_type: str, *, shared: bool) -> None:
        model, tokenizer = family_checkpoints.make_model(model_type, values=wide(model_type))
        self.prompts = [make_prompt(model_type, model, tokenizer)]
        self.policy = Policy(model, tokenizer, shared_prefix=shared, feature_cache_bytes=0)
        self.policy.freeze_reference(copy=True)
        self.sampler = (SharedPrefixSampler if shared else PlainSampler)(self.policy)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.advantages = torch.linspace(-1, 1, GENERATIONS)

    def __call__(self, seed: int) -> torch.Tensor:
        """Take one step; return what was drawn."""
        params = SamplingParams(max_new_tokens=RESPONSE, min_new_tokens=RESPONSE, seed=seed)
        rollout = self.sampler.sample(self.prompts, GENERATIONS, params)
        ids, lengths = rollout.token_ids, rollout.mask.sum(1)
        reference = self.policy.reference_logps(self.prompts, ids, lengths)
        logps = self.policy.response_logps(self.prompts, ids, lengths)
        weights = self.advantages.repeat_interleave(lengths)
        loss = -(weights * (logps - logps.detach()).exp()).mean() + 0.04 * (logps - reference).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return ids


@pytest.mark.parametrize("model_type", SHARED)
def test_step(benchmark, one_thread, model_type: str, capsys) -> None:
    """A step with the shared prefix and one without, in turn."""
    arms = {"plain": Step(model_type, shared=False), "shared": Step(model_type, shared=True)}
    first = {name: arm(0) for name, arm in arms.items()}
    assert torch.equal(first["plain"], first["shared"])  # equal draws before the weights part by rounding
    times: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(1, PAIRS + 1):
        for name, arm in arms.items():
            start = time.process_time()
            arm(seed)
            times[name].append(time.process_time() - start)
    benchmark.pedantic(arms["shared"], args=(PAIRS + 1,), rounds=1)
    ratios = [plain / shared for plain, shared in zip(times["plain"], times["shared"])]
    middle = statistics.median(ratios)
    figures = {
        "model_type": model_type,
        "P": PROMPT,
        "R": RESPONSE,
        "G": GENERATIONS,
        "plain_s": times["plain"],
        "shared_s": times["shared"],
        "ratio": middle,
        "device": device_name("cpu"),
    }
    append_line(**figures)
    benchmark.extra_info.update(figures)
    with capsys.disabled():
        print(f"\n{model_type}: {middle:.2f}x (pairs {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    bar(middle >= LEAST, f"a step of {model_type} at least {LEAST} times faster, measured {middle:.2f}")
