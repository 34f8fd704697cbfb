"""The decode step in C++: the operator against the layer written out, rollouts against the model's own modules."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import family_checkpoints
import pytest
import torch
from rollout_parts import assert_same
from test_families_packed import make_encoder, make_prompts
from torch import nn

from rlaif_fast.loss import extension
from rlaif_fast.loss.testing import relative_l2
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import IDS, make_model, make_policy, make_prompt, standard_prompts
from rlaif_fast.rollout import cpu_decoder
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.cpu_decoder import CpuDecoder, refuses_cpu_decoder
from rlaif_fast.rollout.shared_prefix import SharedPrefixSampler

PLAIN = ("internvl", "llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm", "video_llama_3")
OTHERS = {
    "gemma3": "not every layer attends causally",
    "glm4v": "a layer has the parts",
    "qwen3_5": "not every layer attends causally",
    "qwen3_vl_moe": "MoeBlock has the parts",
}
EPS = 1e-5


@pytest.fixture(autouse=True, scope="module")
def built():
    assert extension.unavailable() is None


# --- the operator -------------------------------------------------------------------------------------------


def problem(
    *, N=3, W=4, K=2, R=3, D=8, E=24, F=20, L=12, C=9, nodes=None, head_norms=True, biases=True, seed=0
):
    """A step of 1 to W nodes a group; some see other columns than others. Columns nobody uses hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    H = K * R
    slots = torch.arange(nodes) if nodes else torch.tensor([0, 2, W, W + 1, W + 3, 2 * W + 1])
    A = len(slots)
    columns = slots % W + C - W
    keys, values = random(N, K, L, D), random(N, K, L, D)
    for buffer in (keys, values):
        buffer[:, :, C:] = float("nan")
    seen = torch.rand(N, 1, W, C, generator=generator) < 0.6
    seen[slots // W, 0, slots % W, columns] = True
    seen |= ~seen.any(-1, keepdim=True)
    bias = torch.where(seen, 0.0, float("-inf"))
    angles = random(A, D // 2).repeat(1, 2)
    shapes = [(H * D, E), (K * D, E), (K * D, E), (E, H * D), (F, E), (F, E), (E, F)]
    projections = [random(*shape) for shape in shapes]
    own = [random(shape[0]) if biases else None for shape in shapes]
    norms = [1 + random(E), 1 + random(E), *([1 + random(D), 1 + random(D)] if head_norms else [None, None])]
    hidden = random(A, E)
    return [hidden, angles.cos(), angles.sin(), keys, values, bias, slots, columns, projections, own, norms]


def run(arguments, scale=0.4):
    hidden, cos, sin, keys, values, *rest = arguments
    hidden, keys, values = hidden.clone(), keys.clone(), values.clone()
    torch.ops.rlaif_fast.decode_layer_(hidden, cos, sin, keys, values, *rest, EPS, scale)
    return hidden, keys, values


def written_out(arguments, scale=0.4):
    """The same in float64, node by node."""
    hidden, cos, sin, keys, values, bias, slots, columns, projections, own, norms = arguments
    hidden, cos, sin, keys, values = (x.double().clone() for x in (hidden, cos, sin, keys, values))
    K, D, W = keys.shape[1], keys.shape[3], bias.shape[2]

    def linear(x, index):
        return nn.functional.linear(
            x, projections[index].double(), own[index] if own[index] is None else own[index].double()
        )

    def norm(x, weight):
        return x if weight is None else nn.functional.rms_norm(x, weight.shape, weight.double(), EPS)

    def rotate(x, node):
        a, b = x.chunk(2, -1)
        return x * cos[node] + torch.cat((-b, a), -1) * sin[node]

    heads = {}
    for node, (slot, column) in enumerate(zip(slots.tolist(), columns.tolist())):
        x = norm(hidden[node], norms[0])
        q, k, v = (linear(x, index).view(-1, D) for index in range(3))
        heads[node] = rotate(norm(q, norms[2]), node)
        keys[slot // W, :, column], values[slot // W, :, column] = rotate(norm(k, norms[3]), node), v
    for node, slot in enumerate(slots.tolist()):
        group, mask = slot // W, bias[slot // W, 0, slot % W].double()
        seen = mask == 0
        attended = []
        for h, query in enumerate(heads[node]):
            key, value = (x[group, h // (len(heads[node]) // K), : len(mask)][seen] for x in (keys, values))
            attended.append((key @ query * scale).softmax(0) @ value)
        hidden[node] += linear(torch.cat(attended), 3)
        x = norm(hidden[node], norms[1])
        hidden[node] += linear(nn.functional.silu(linear(x, 4)) * linear(x, 5), 6)
    return hidden, keys, values


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of float32 sums in another order."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert relative_l2(found.nan_to_num(), expected.nan_to_num()) < 1e-6


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"head_norms": False, "biases": False},
        {"R": 1, "D": 2, "E": 5, "F": 3},
        {"K": 1, "R": 8, "D": 16, "seed": 3},
        {"N": 5, "W": 5, "nodes": 25, "E": 70, "F": 37},
        {"W": 8, "R": 5, "D": 6, "L": 620, "C": 600},
    ],
    ids=["norms and biases", "neither", "smallest", "one key head", "many tokens", "many columns"],
)
def test_the_operator_is_the_layer_written_out(sizes) -> None:
    arguments = problem(**sizes)
    for found, expected in zip(run(arguments), written_out(arguments), strict=True):
        assert_close(found, expected)


def test_the_result_does_not_depend_on_the_threads() -> None:
    arguments = problem(E=512, F=64, D=32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(arguments))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert_close(one, three)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_gives_the_same(capability: str, tmp_path: Path) -> None:
    code = f"""
import sys, torch
from rlaif_fast.loss import extension
from test_cpu_decoder import problem, run
assert extension.unavailable() is None
if torch.ops.rlaif_fast.row_instruction_set() != {capability!r}:
    sys.exit(3)
torch.save(run(problem(E=70, F=37)), {str(tmp_path / "layer.pt")!r})
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode == 3:
        pytest.skip(f"this processor has no {capability}")
    assert result.returncode == 0, result.stderr
    for found, ours in zip(torch.load(tmp_path / "layer.pt"), run(problem(E=70, F=37)), strict=True):
        assert_close(found, ours)


@pytest.mark.parametrize(
    ("index", "change", "error", "message"),
    [
        (0, lambda x: x.double(), TypeError, "hidden must be float32"),
        (1, lambda x: x[:, :4], ValueError, "cos must be a contiguous"),
        (3, lambda x: x.transpose(2, 3), ValueError, "keys must be a contiguous|even head size|columns"),
        (6, lambda x: x + 100, IndexError, r"slots must lie in \[0, 12\)"),
        (7, lambda x: x.int(), TypeError, "columns must be int64"),
        (7, lambda x: x - 9, IndexError, r"columns must lie in \[0, 9\)"),
        (8, lambda x: x[:6], ValueError, "expected 7 projections"),
        (8, lambda x: [x[0], x[1][:8], *x[2:]], ValueError, "projections must be a contiguous"),
        (8, lambda x: [*x[:4], x[4][:0], x[5][:0], x[6][:, :0]], ValueError, "above 0; got 24, 0, 2, 8"),
        (9, lambda x: [x[0][:1], *x[1:]], ValueError, r"biases must be a contiguous \[48\]; got \[1\]"),
        (9, lambda x: [*x[:6], x[6].double()], TypeError, "biases must be float32"),
        (10, lambda x: [None, *x[1:]], ValueError, "norms of the layer must be given"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(index, change, error, message) -> None:
    arguments = problem()
    arguments[index] = change(arguments[index])
    with pytest.raises(error, match=message):
        run(arguments)


# --- rollouts -----------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """How many tokens went through each C++ step."""
    fed: list[int] = []
    original = CpuDecoder._run
    monkeypatch.setattr(
        CpuDecoder, "_run", lambda self, ids, *rest: (fed.append(len(ids)), original(self, ids, *rest))[1]
    )
    return fed


@pytest.mark.parametrize("model_type", PLAIN)
def test_a_rollout_is_that_of_the_modules(model_type: str, steps) -> None:
    model, tokenizer = family_checkpoints.make_model(model_type)
    policy = Policy(model, tokenizer)
    assert refuses_cpu_decoder(policy) is None
    prompts = make_prompts(make_encoder(model_type, tokenizer, model.config))
    params = SamplingParams(max_new_tokens=7, seed=1)
    modules = SharedPrefixSampler(policy, cpu_decoder=False).sample(prompts, 3, params)
    assert not steps
    sampler = SharedPrefixSampler(policy)
    first, second = (sampler.sample(prompts, 3, params) for _ in range(2))
    assert_same(first, modules)
    assert torch.equal(first.logps, second.logps)  # though the first step of the first was computed both ways
    assert len(steps) == 12


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_layers_are_left_to_the_modules(model_type: str) -> None:
    model, tokenizer = family_checkpoints.make_model(model_type)
    assert OTHERS[model_type] in (refuses_cpu_decoder(Policy(model, tokenizer)) or "")


def test_groups_that_end_and_branch(steps) -> None:
    """Nodes of unequal number a group, groups that leave, responses that part late."""
    policy = make_policy("qwen3_vl")
    policy.forbidden_bias[IDS["<|im_end|>"]] += 4.0
    policy.forbidden_bias[IDS["word1"]] += 3.0
    prompts = [
        *standard_prompts("qwen3_vl"),
        *(make_prompt("qwen3_vl", before=2 + i, seed=i) for i in range(4)),
    ]
    params = SamplingParams(max_new_tokens=12, seed=5)
    modules = SharedPrefixSampler(policy, cpu_decoder=False).sample(prompts, 4, params)
    assert_same(SharedPrefixSampler(policy).sample(prompts, 4, params), modules)
    assert steps[0] > steps[-1] > 0


class ShiftedNorm(nn.Module):
    """Gemma's norm: the weight is kept without its 1."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(norm.weight.detach() - 1), norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


def test_a_layer_that_only_looks_plain_is_left_to_the_modules(caplog, steps) -> None:
    model = make_model("qwen3_vl")
    expected_policy = make_policy("qwen3_vl", model=model)
    prompts, params = standard_prompts("qwen3_vl"), SamplingParams(max_new_tokens=6, seed=3)
    expected = SharedPrefixSampler(expected_policy, cpu_decoder=False).sample(prompts, 2, params)
    for layer in model.model.language_model.layers:
        layer.input_layernorm = ShiftedNorm(layer.input_layernorm)
    policy = make_policy("qwen3_vl", model=model)
    assert refuses_cpu_decoder(policy) is None
    with caplog.at_level(logging.WARNING, logger=cpu_decoder.__name__):
        assert_same(SharedPrefixSampler(policy).sample(prompts, 2, params), expected)
    assert len(steps) == 1
    assert "the C++ decode step is not used: it is off by" in caplog.text


def test_an_adapter_that_comes_later_is_not_passed_by(steps) -> None:
    policy = make_policy("qwen3_vl")
    prompts, params = standard_prompts("qwen3_vl"), SamplingParams(max_new_tokens=6, seed=4)
    sampler = SharedPrefixSampler(policy)
    before = sampler.sample(prompts, 2, params)
    attention = policy.decoder.layers[0].self_attn
    attention.v_proj = nn.Sequential(attention.v_proj, nn.Linear(32, 32))
    fed = len(steps)
    after = sampler.sample(prompts, 2, params)
    assert len(steps) == fed > 0
    assert after.token_ids.tolist() != before.token_ids.tolist()
    assert_same(after, SharedPrefixSampler(policy, cpu_decoder=False).sample(prompts, 2, params))
    attention.v_proj = attention.v_proj[0]
    assert_same(sampler.sample(prompts, 2, params), before)
    assert len(steps) > fed


class BiasedNorm(nn.Module):
    """An RMSNorm with a bias, which starts at 0."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.bias = nn.Parameter(torch.zeros_like(norm.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps) + self.bias


def add_bias(layer: nn.Module) -> None:
    layer.input_layernorm = BiasedNorm(layer.input_layernorm)


def train_bias(layer: nn.Module) -> None:
    layer.input_layernorm.bias.data += torch.linspace(-3, 3, 64)


def replace_activation(layer: nn.Module) -> None:
    layer.mlp.act_fn = nn.Tanh()


def replace_forward(layer: nn.Module) -> None:
    original = layer.self_attn.o_proj.forward
    layer.self_attn.o_proj.forward = lambda x: -original(x)


def lay_out_otherwise(layer: nn.Module) -> None:
    weight = layer.mlp.down_proj.weight
    weight.data = 2 * weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    ("start", "change"),
    [
        (add_bias, train_bias),
        (None, replace_activation),
        (None, replace_forward),
        (None, lay_out_otherwise),
    ],
)
def test_what_changes_between_rollouts_is_not_passed_by(start, change) -> None:
    policy = make_policy("qwen3_vl")
    layer = policy.decoder.layers[1]
    if start is not None:
        start(layer)
    prompts, params = standard_prompts("qwen3_vl"), SamplingParams(max_new_tokens=6, seed=4)
    sampler = SharedPrefixSampler(policy)
    before = sampler.sample(prompts, 2, params)
    change(layer)
    after = sampler.sample(prompts, 2, params)
    assert not torch.equal(after.logps, before.logps)
    assert_same(after, SharedPrefixSampler(policy, cpu_decoder=False).sample(prompts, 2, params))


def unequal_epsilons(policy: Policy) -> str:
    policy.decoder.layers[0].post_attention_layernorm.variance_epsilon = 0.5
    return "the norms of a layer have the epsilons 0.5, 1e-06"


def no_scaling(policy: Policy) -> str:
    del policy.decoder.layers[0].self_attn.scaling
    return "Attention has no scaling"


def hooked_decoder(policy: Policy) -> str:
    policy.decoder.register_forward_hook(lambda *_: None)
    return "TextModel has hooks"


def no_epsilon(policy: Policy) -> str:
    policy.decoder.layers[0].input_layernorm = nn.Identity()
    return "epsilons 1e-06, None"


def narrow_weight(policy: Policy) -> str:
    policy.decoder.layers[1].mlp.bfloat16()
    return "mlp.gate_proj.weight is not a parameter of torch.float32"


@pytest.mark.parametrize("change", [unequal_epsilons, no_scaling, hooked_decoder, no_epsilon, narrow_weight])
def test_what_the_operator_does_not_compute_is_refused(change) -> None:
    policy = make_policy("qwen3_vl")
    expected = change(policy)
    assert expected in refuses_cpu_decoder(policy)


def test_what_is_no_plain_linear_layer_is_refused() -> None:
    policy = make_policy("qwen3_vl")
    layer = policy.decoder.layers[1]
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    assert "MLP has hooks" in refuses_cpu_decoder(policy)
    handle.remove()
    assert refuses_cpu_decoder(policy) is None
    layer.self_attn.k_proj = nn.Sequential(layer.self_attn.k_proj)
    assert refuses_cpu_decoder(policy) == "k_proj is a Sequential"
    assert "float32" in refuses_cpu_decoder(make_policy("qwen3_vl", dtype=torch.bfloat16))
