"""Draws with vLLM before and after updates, and says how far its log-probabilities are from the policy's.

    python tests/engine_agreement.py FAMILY tied|untied|lora [URL ...]

One engine a process: vLLM keeps what it set up. With addresses, the servers there draw, which `write_start` wrote the
model of. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm_parts import LORA

from rlaif_fast.policy.parts import add_lora
from rlaif_fast.policy.testing import make_media, make_model, make_policy, make_prompt
from rlaif_fast.policy.tiny import TinySize
from rlaif_fast.rollout import SamplingParams, VllmSampler
from rlaif_fast.rollout.vllm.folder import write_model_files
from rlaif_fast.rollout.vllm.weights import merged_weights

UPDATES = 2
# The prompts of a rollout take more than one step of the engine.
OPTIONS = {"max_model_len": 256, "max_num_seqs": 64, "max_num_batched_tokens": 256}
# vLLM's attention on a CPU wants heads of 32 or more.
SIZE = TinySize(
    hidden_size=128, layers=3, heads=4, intermediate_size=96, vision_hidden_size=32, initializer_range=0.1
)
DRAWS = {
    "plain": SamplingParams(24, temperature=0.7),
    "cut": SamplingParams(24, temperature=0.9, top_p=0.9, top_k=20, min_new_tokens=3),
    "short": SamplingParams(24, temperature=1.0, min_new_tokens=0),
}


def make(family: str, kind: str):
    """The policy of a case."""
    model = make_model(family, size=SIZE, mrope_section=[8, 4, 4])
    if kind == "untied":
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.1)
    if kind == "lora":
        model = add_lora(model, LORA)
    return make_policy(family, model=model)


def prompts_of(family: str):
    """More than a block of the engine's cache each: no media, one and two videos, an image and a video."""
    a, b = make_media("a", (4, 4, 4)), make_media("b", (3, 4, 8), seconds=0.7)
    picture = make_media("p", (1, 8, 4), is_video=False)
    media = ((a,), (), (a, b), (picture, b))
    return [make_prompt(family, m, before=40 + i, after=5, seed=i) for i, m in enumerate(media)]


def write_start(family: str, kind: str, folder: Path) -> None:
    """The folder that a server of a case starts from, with other weights than the policy's."""
    policy = make(family, kind)
    write_model_files(policy, folder, OPTIONS["max_model_len"])
    weights = {name: torch.full_like(weight, 0.01) for name, weight in merged_weights(policy.model)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main(family: str, kind: str, *urls: str) -> None:
    """Run one case."""
    policy = make(family, kind)
    prompts = prompts_of(family)
    options: dict = {"urls": urls} if urls else OPTIONS
    sampler = VllmSampler(policy, **options)
    worst: dict[str, list[float]] = {name: [] for name in DRAWS}
    tokens = 0
    for update in range(UPDATES + 1):
        if update:
            torch.manual_seed(update)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.02)
        sampler.sync_weights(policy)
        sampler.sync_weights(policy)  # nothing new
        for name, params in DRAWS.items():
            rollout = sampler.sample(prompts, 8, params)
            ratio = rollout.sampling_ratio[rollout.mask]
            worst[name].append(float(ratio.log().abs().max()))
            tokens += int(rollout.mask.sum())
    version = sampler.version
    sampler.close()
    print(json.dumps({"worst": worst, "tokens": tokens, "version": version, "updates": UPDATES}))


if __name__ == "__main__":
    main(*sys.argv[1:])
