"""Gives vLLM a base model and an adapter saved by us, and says how far its log-probabilities are from the policy's.

    python tests/engine_lora.py FOLDER

The prompts are text, as vLLM puts no adapter on a tower unless it is told to. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from engine_agreement import SIZE

from rlaif_fast.policy.loading import ModelOptions
from rlaif_fast.policy.parts import add_lora
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import TOKENIZER, make_model, make_policy, words
from rlaif_fast.rollout.vllm.engine import ENVIRONMENT, defaults
from rlaif_fast.rollout.vllm.folder import write_model_files

LENGTH = 256


def logps_of(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    """(P - 1,) log-probability of each token behind the first."""
    with torch.no_grad():
        logits = policy.model(input_ids=ids[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


def main(folder: Path) -> None:
    """Save a model and an adapter, and ask vLLM about a text with and without it."""
    base, adapter = folder / "base", folder / "adapter"
    model = make_model("qwen3_vl", size=SIZE, mrope_section=[8, 4, 4])
    policy = make_policy("qwen3_vl", model=model, shared_prefix=False)
    settings = defaults(policy) | {"max_model_len": LENGTH}
    del settings["worker_extension_cls"], settings["logprobs_mode"]
    write_model_files(policy, base, LENGTH)
    model.save_pretrained(base)
    ids = torch.tensor(words(60, seed=3))
    expected = {"base": logps_of(policy, ids)}
    adapted = add_lora(model, ModelOptions(lora_r=4, lora_alpha=8))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(adapter)
    expected["adapter"] = logps_of(Policy(adapted.eval(), TOKENIZER, shared_prefix=False), ids)

    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(model=str(base), enable_lora=True, max_lora_rank=8, max_num_seqs=4, **settings)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    requests = {"base": None, "adapter": LoRARequest("adapter", 1, str(adapter))}
    found = {}
    for name, request in requests.items():
        (output,) = engine.generate({"prompt_token_ids": ids.tolist()}, params, lora_request=request)
        theirs = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids.tolist()[1:])]
        found[name] = float((torch.tensor(theirs) - expected[name]).abs().max())
    apart = float((expected["base"] - expected["adapter"]).abs().max())
    print(json.dumps({"worst": found, "apart": apart}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
