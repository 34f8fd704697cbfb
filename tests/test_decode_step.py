"""What lies between the matmuls of a decode step: kernels against references, steps against the model's own modules."""

from __future__ import annotations

import logging
import re

import family_checkpoints
import pytest
import torch

pytest.importorskip("triton")

from rollout_parts import assert_same
from simulated_gpu import simulated_gpu
from test_cpu_decoder import OTHERS, PLAIN, ShiftedNorm
from test_families_packed import make_encoder, make_prompts
from torch import nn
from triton_cases import DEVICE, error, uninitialised_memory_is_nan

from rlaif_fast.policy.decode_step import (
    add_rms_norm_reference,
    refuses_decode_step,
    rotate_reference,
    silu_mul_reference,
)
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import make_model, make_policy, standard_prompts
from rlaif_fast.rollout import graphs
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.fused_layers import FusedLayers, refuses_fused_layers
from rlaif_fast.rollout.graphs import CHECKED_STEPS, WARM_UP_STEPS, GraphSampler, check_fused
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler
from rlaif_fast_kernels.decode_step import add_rms_norm, rotate_store, silu_mul, supports
from rlaif_fast_kernels.launch import INTERPRETED

# Sums and products in float32; a 16-bit result carries its rounding and four on the way. The interpreter truncates to
# bfloat16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2 if INTERPRETED else 8e-3, torch.float16: 2e-3}
EPS = 1e-5


@pytest.fixture(autouse=True)
def poisoned():
    yield from uninitialised_memory_is_nan()


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("S", "C"), [(1, 1), (3, 64), (2, 127), (5, 129), (1, 3584)])
@pytest.mark.parametrize("has_delta", [True, False])
def test_add_rms_norm(S, C, has_delta, dtype):
    residual, weight = normal(S, C, dtype=dtype, seed=1), normal(C, dtype=dtype, seed=2)
    delta = normal(S, C, dtype=dtype, seed=3) if has_delta else None
    wide = None if delta is None else delta.double()
    expected, total = add_rms_norm_reference(residual.double(), wide, weight.double(), EPS)
    assert error(add_rms_norm(residual, delta, weight, EPS), expected) < TOLERANCE[dtype]
    assert error(residual, total) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (4, 6, 2, 16), (3, 7, 1, 48), (2, 4, 4, 130)])
@pytest.mark.parametrize("has_norms", [True, False])
def test_rotate_store(shape, has_norms, dtype):
    """Queries are rotated in place; keys and values reach their cells of a cache that is part of a larger one."""
    S, H, K, D = shape
    query, key, value = (normal(S, heads, D, dtype=dtype, seed=n) for n, heads in enumerate((H, K, K)))
    angles = normal(S, D // 2, dtype=torch.float32, seed=4).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = tuple(normal(D, dtype=dtype, seed=n) for n in (5, 6)) if has_norms else None
    groups, columns = torch.arange(S, device=DEVICE) % 2, torch.arange(S, device=DEVICE) + 3
    whole = [torch.full((2, K, S + 5, 2 * D), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    keys, values = (x[..., :D] for x in whole)

    def rotated(heads, norm):
        return rotate_reference(heads.double(), cos.double(), sin.double(), norm, EPS)

    query_norm, key_norm = (None, None) if norms is None else (norm.double() for norm in norms)
    expected, expected_keys = rotated(query, query_norm), rotated(key, key_norm)
    rotate_store(query, key, value, cos, sin, norms, EPS, keys, values, groups, columns)
    assert error(query, expected) < TOLERANCE[dtype]
    assert error(keys[groups, :, columns], expected_keys) < TOLERANCE[dtype]
    assert torch.equal(values[groups, :, columns], value)
    for buffer in whole:
        buffer[groups, :, columns, :D] = 7.0
        assert (buffer == 7.0).all()  # nothing else was written


def test_cells_lie_beyond_32_bits(tmp_path):
    """Heads so far apart that a product of 32 bits would come back to the first cells."""
    K, D, apart = 5, 16, 2**30 + 16
    size, dtype = K * apart, torch.bfloat16
    if INTERPRETED:  # a file without content takes no memory
        cells = torch.from_file(str(tmp_path / "cells"), shared=True, size=size, dtype=dtype)
    else:
        cells = torch.zeros(size, dtype=dtype, device=DEVICE)
    keys, values = (cells.as_strided((1, K, 1, D), (size, apart, D, 1), at) for at in (0, 512))
    heads = normal(1, K, D, dtype=dtype, seed=1)
    cos, sin = (torch.full((1, D), value, dtype=dtype, device=DEVICE) for value in (1.0, 0.0))
    place = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    rotate_store(heads.clone(), heads, heads, cos, sin, None, EPS, keys, values, place, place)
    assert torch.equal(keys[0, :, 0], heads[0]) and torch.equal(values[0, :, 0], heads[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 341), (1, 1024), (5, 1025)])
def test_silu_mul(shape, dtype):
    gate, up = 5 * normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=2)
    gate[0, 1:2] = -100.0  # the exponential of its negative overflows
    expected = silu_mul_reference(gate.double(), up.double())
    assert error(silu_mul(gate, up), expected) < TOLERANCE[dtype]


def test_the_references_are_the_modules():
    model = make_model("qwen3_vl").model.language_model
    layer = model.layers[0]
    x = torch.randn(3, layer.input_layernorm.weight.shape[0], generator=torch.Generator().manual_seed(0))
    norm = layer.input_layernorm
    nn.init.normal_(norm.weight)
    ours, total = add_rms_norm_reference(x, x, norm.weight, norm.variance_epsilon)
    assert torch.equal(ours, norm(x + x)) and torch.equal(total, x + x)
    gate, up = layer.mlp.gate_proj(x), layer.mlp.up_proj(x)
    assert torch.equal(layer.mlp.down_proj(silu_mul_reference(gate, up)), layer.mlp(x))


def test_what_the_kernels_cannot_take_is_refused():
    kind = torch.device(DEVICE).type
    assert supports(kind, torch.bfloat16, 4096, 128) is None
    assert "hidden size must be at most 16384; got 20000" in supports(kind, torch.bfloat16, 20000, 128)
    assert "head size must be even and at most 512; got 15" in supports(kind, torch.bfloat16, 4096, 15)
    assert "float32, bfloat16 or float16" in refuses_decode_step(kind, torch.float64, 64, 16)


# --- steps --------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """How many tokens went through each fused step."""
    fed: list[int] = []
    original = FusedLayers.__call__
    monkeypatch.setattr(
        FusedLayers,
        "__call__",
        lambda self, ids, *rest: (fed.append(len(ids)), original(self, ids, *rest))[1],
    )
    return fed


@pytest.mark.parametrize("model_type", PLAIN)
def test_a_rollout_is_that_of_the_modules(model_type: str, steps) -> None:
    model, tokenizer = family_checkpoints.make_model(model_type)
    policy = Policy(model.to(DEVICE), tokenizer)
    prompts = make_prompts(make_encoder(model_type, tokenizer, model.config))
    params = SamplingParams(max_new_tokens=5, seed=1)
    modules = GraphSampler(policy, fused=False).sample(prompts, 3, params)
    assert not steps
    assert_same(GraphSampler(policy, fused=True).sample(prompts, 3, params), modules)
    assert steps == [3 * len(prompts)] * (4 if INTERPRETED else WARM_UP_STEPS + 1)  # the others are replayed


@pytest.mark.parametrize("model_type", ["glm4v", "qwen3_vl_moe"])
def test_other_layers_are_left_to_the_modules(model_type: str, steps) -> None:
    model, tokenizer = family_checkpoints.make_model(model_type)
    policy = Policy(model.to(DEVICE), tokenizer)
    assert OTHERS[model_type] in (refuses_fused_layers(policy) or "")
    prompts = make_prompts(make_encoder(model_type, tokenizer, model.config))
    params = SamplingParams(max_new_tokens=3, seed=1)
    expected = SharedPrefixSampler(policy).sample(prompts, 2, params)
    if not INTERPRETED and model_type == "qwen3_vl_moe":
        pytest.skip(
            "a GPU multiplies experts in float32 one by one, as the host says, which no capture allows"
        )
    assert_same(GraphSampler(policy, fused=True).sample(prompts, 2, params), expected)
    assert not steps


def test_a_bfloat16_step_is_that_of_the_modules() -> None:
    policy = make_policy("qwen3_vl", model=make_model("qwen3_vl").to(DEVICE, torch.bfloat16))
    reason = check_fused(policy, "kernel")  # the interpreter is slower
    slower = re.fullmatch("a step takes .* ms by them, .* by the modules", reason or "")
    assert reason is None or (slower and INTERPRETED), reason


def test_autocast_is_left_to_the_modules() -> None:
    policy = make_policy("qwen3_vl", model=make_model("qwen3_vl").to(DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert refuses_fused_layers(policy) == "autocast casts the weights"
    assert refuses_fused_layers(policy) is None


@pytest.mark.skipif(not INTERPRETED, reason="stands in for a GPU on a machine without one")
def test_on_a_gpu_the_fused_step_is_checked_and_the_faster_one_taken(monkeypatch, caplog, steps) -> None:
    with simulated_gpu():
        policy = make_policy("qwen2_5_vl", model=make_model("qwen2_5_vl").to("cuda"))
        prompts, params = standard_prompts("qwen2_5_vl"), SamplingParams(max_new_tokens=3, seed=3)
        drawn = []
        for taken in ((2.0, 1.0), (1.0, 2.0)):  # by modules, by kernels
            times = iter(taken)
            monkeypatch.setattr(graphs, "_milliseconds", lambda step, times=times: next(times))
            with caplog.at_level(logging.INFO, logger=graphs.__name__):
                sampler = GraphSampler(policy)
                drawn.append(sampler.sample(prompts, 2, params).texts)
            of_check, of_rollout = [2] * CHECKED_STEPS, [2 * len(prompts)] * 2
            assert steps == (of_check + of_rollout if taken[0] > taken[1] else of_check)
            steps.clear()
    assert drawn[0] == drawn[1]
    assert "a decode step takes 1.00 ms by fused kernels, 2.00 by modules" in caplog.text
    assert "fused decode layers are used" in caplog.text
    assert "are not used: a step takes 2.00 ms by them, 1.00 by the modules" in caplog.text


def test_equal_times_do_not_decide_by_chance(monkeypatch) -> None:
    """On a seed the responses are those of one kind of step, the same in every run."""
    policy = make_policy("qwen3_vl", model=make_model("qwen3_vl").to(DEVICE))
    reasons = []
    for taken in ((1.0, 1.05), (1.05, 1.0)):
        times = iter(taken)
        monkeypatch.setattr(graphs, "_milliseconds", lambda step, times=times: next(times))
        reasons.append(check_fused(policy))
    assert reasons == [None, None]


def shift_norm(layer: nn.Module) -> None:
    layer.input_layernorm = ShiftedNorm(layer.input_layernorm)


def leave_unrotated(layer: nn.Module) -> None:
    """As every fourth layer of SmolLM3."""
    kind = type(layer.self_attn)

    class Unrotated(kind):
        def forward(self, hidden_states, position_embeddings, **others):
            cos, sin = position_embeddings
            return super().forward(
                hidden_states, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **others
            )

    layer.self_attn.__class__ = Unrotated


@pytest.mark.parametrize("change", [shift_norm, leave_unrotated])
def test_a_layer_that_only_looks_plain_is_found(change) -> None:
    model = make_model("qwen3_vl")
    for layer in model.model.language_model.layers:
        change(layer)
    policy = make_policy("qwen3_vl", model=model.to(DEVICE))
    assert refuses_fused_layers(policy) is None
    assert "a step by fused kernels is off by" in check_fused(policy)
