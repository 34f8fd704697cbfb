"""Attention of a decode step on a GPU: G responses of a group over the prompt they share, and their own tokens.

All layers of a Qwen2.5-VL-7B run in one CUDA graph, each with its own buffer, so keys and values come from memory as
they do in a rollout. The peers are PyTorch's SDPA over the same buffers with a mask, key heads repeated by the kernel
(`enable_gqa`), and the plain path: every response after a copy of its prompt. Bytes: the buffers, read once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from benchmarking import Arm, Case, bar, measure, record

from rlaif_fast.policy.prefix_decode import prefix_decode, prefix_decode_reference, visible_columns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LAYERS, HEADS, KEY_HEADS, HEAD_SIZE, OWN = 28, 28, 4, 128, 64
SHAPES = [(1, 8, 4096), (8, 8, 4096), (1, 8, 1024)]  # groups, responses, prompt tokens
ARMS = ["read once", "triton kernel", "sdpa, mask", "sdpa, a prompt a response"]
SECONDS = 4.0


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """Capture `run` as a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes what `run` reads
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def build(shape: tuple[int, int, int]) -> Case:
    N, G, P = shape
    L = -(-(P + G * OWN) // 256) * 256
    options = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(N, HEADS, G, HEAD_SIZE, **options)
    buffers = torch.randn(LAYERS, 2, N, KEY_HEADS, L, HEAD_SIZE, **options)
    prompts = torch.full((N,), P, dtype=torch.int32, device="cuda")
    own = torch.tensor([OWN], dtype=torch.int32, device="cuda")
    scale = HEAD_SIZE**-0.5
    bias = torch.zeros(N, 1, G, L, **options)
    bias.masked_fill_(~visible_columns(prompts, OWN, G, L)[:, None], float("-inf"))

    def layers(attend: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            for keys, values in buffers:
                attend(keys, values)

        return captured(run)

    def kernel(keys, values):
        return prefix_decode(query, keys, values, prompts, own, scale)

    def masked(keys, values):
        return F.scaled_dot_product_attention(query, keys, values, bias, scale=scale, enable_gqa=True)

    expected = prefix_decode_reference(
        query.float(), buffers[0, 0].float(), buffers[0, 1].float(), prompts, own, scale
    )
    error = float((kernel(*buffers[0]).float() - expected).norm() / expected.norm())
    assert error < 1e-2, f"the kernel is off by {error:.1e} of the reference"
    size = buffers.numel() * buffers.element_size()
    arms = {
        "read once": Arm(captured(lambda: buffers.view(torch.int32).amax()), bytes=size),
        "triton kernel": Arm(layers(kernel), bytes=size),
        "sdpa, mask": Arm(layers(masked), bytes=size),
    }
    skipped = {}
    if G * size < 20 << 30:
        copies = buffers.repeat_interleave(G, 2)[:, :, :, :, : P + OWN].contiguous()
        single = query.transpose(1, 2).reshape(N * G, HEADS, 1, HEAD_SIZE)

        def plain() -> None:
            for keys, values in copies:
                F.scaled_dot_product_attention(single, keys, values, scale=scale, enable_gqa=True)

        arms["sdpa, a prompt a response"] = Arm(captured(plain), bytes=copies.numel() * 2)
    else:
        skipped["sdpa, a prompt a response"] = "the copies of the prompts would take more than 20 GiB"
    return measure(arms, "read once", "cuda", SECONDS, skipped)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefix_decode_cuda(benchmark, arena, shape, arm):
    N, G, P = shape
    case = arena.case(f"prefix_decode {shape} cuda", lambda: build(shape))
    record(benchmark, case, arm, "prefix_decode", f"N={N} G={G} P={P}, {LAYERS} layers", "cuda")
    if arm == "triton kernel":
        peers = [name for name in case.results if name.startswith("sdpa")]
        slower = {name: round(case.ratio(name, arm), 2) for name in peers}
        bar(all(ratio >= 1.0 for ratio in slower.values()), f"faster than every peer, measured {slower}")
