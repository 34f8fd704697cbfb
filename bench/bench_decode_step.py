"""A captured decode step of a 7B-shaped model on a GPU: by its own modules, and by fused kernels between its matmuls.

One token for each of 8 responses of a group after 4,096 tokens, or of eight groups. The floor is only the decoder's
matmuls. Predicted for one group on an H100, where the modules took 9.8 ms: the weights 4.6, attention 0.34, and 0.3 for
four small kernels a layer in place of some fifty, so 6 ms. Measured: 6.84, including 5.4 for the matmuls.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench_prefix_decode import captured
from benchmarking import Arm, Case, bar, measure, record
from step_arms import SCALES, make_model
from torch.nn.functional import linear

from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import TOKENIZER
from rlaif_fast.rollout.graphs import FixedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GENERATIONS, PROMPT, LENGTH = 8, 4096, 5120
ARMS = ["matmuls alone", "fused kernels", "modules"]
SECONDS = 4.0


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(make_model(SCALES["cuda"]), TOKENIZER)


@torch.no_grad()
def build(policy: Policy, groups: int) -> Case:
    tokens = torch.zeros(groups * GENERATIONS, dtype=torch.int64, device="cuda")
    weights = [
        layer.weight for layer in policy.decoder.layers.modules() if isinstance(layer, torch.nn.Linear)
    ]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    inputs = {
        width: torch.randn(len(tokens), width, device="cuda", dtype=weights[0].dtype)
        for width in {weight.shape[1] for weight in weights}
    }
    matmuls = captured(lambda: [linear(inputs[weight.shape[1]], weight) for weight in weights])
    arms = {"matmuls alone": Arm(matmuls, bytes=size)}
    for name, fused in (("fused kernels", True), ("modules", False)):
        step = FixedStep(policy, groups, GENERATIONS, LENGTH, fused=fused)
        step.begin(np.full(groups, PROMPT))
        step(tokens, torch.full_like(tokens, PROMPT), 0)
        arms[name] = Arm(lambda step=step: step(tokens, torch.full_like(tokens, PROMPT), 0), bytes=size)
    return measure(arms, "matmuls alone", "cuda", SECONDS, {})


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("groups", [1, 8])
def test_decode_step_cuda(benchmark, arena, policy, groups, arm):
    with policy.evaluating():
        case = arena.case(f"decode_step {groups} cuda", lambda: build(policy, groups))
    record(benchmark, case, arm, "decode_step", f"N={groups} G={GENERATIONS} P={PROMPT}, 7B", "cuda")
    if arm == "fused kernels":
        ratio = case.ratio("modules", arm)
        bar(ratio >= 1.2, f"1.2 times faster than the modules, measured {ratio:.2f}")
