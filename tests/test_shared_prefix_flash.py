"""The shared prefix through flash and flex attention, against the plain path."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from shared_prefix_parts import assert_same, distance, passes, standard_case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlaif_fast.policy.attention import ATTENTION_BACKENDS, ReferenceContext
from rlaif_fast.policy.flash import Call, FlashContext, Sequences, TorchFlash, refuses_torch_flash
from rlaif_fast.policy.packing import pack
from rlaif_fast.policy.testing import FAMILIES, make_model, make_policy, make_responses

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class TorchVarlen:
    """The varlen interface in plain PyTorch, sequence by sequence; the backward pass reads `lse` and `out` as
    given.
    """

    @staticmethod
    def _parts(call: Call):
        both = (call.queries, call.keys)
        each = [[slice(*pair) for pair in itertools.pairwise(s.ends.tolist())] for s in both]
        return list(zip(*each))

    @staticmethod
    def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, float("-inf")) if causal else scores

    def forward(self, call):
        q, k, v = call.tensors
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q))
        repeat = q.shape[1] // k.shape[1]
        for a, b in self._parts(call):
            scores = self._scores(q[a], k[b], call.scale, call.causal)
            lse[:, a] = scores.logsumexp(-1)
            out[a] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[b].repeat_interleave(repeat, dim=1))
        return out, lse

    def backward(self, call, dout, out, lse):
        q, k, v = call.tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        heads, repeat = k.shape[1], q.shape[1] // k.shape[1]
        delta = (dout * out).sum(-1)  # (Tq, H)
        for a, b in self._parts(call):
            p = (self._scores(q[a], k[b], call.scale, call.causal) - lse[:, a, None]).exp()
            dp = torch.einsum("qhd,khd->hqk", dout[a], v[b].repeat_interleave(repeat, dim=1))
            ds = p * (dp - delta[a].T[:, :, None]) * call.scale
            dq[a] = torch.einsum("hqk,khd->qhd", ds, k[b].repeat_interleave(repeat, dim=1))
            for whole, weights, other in ((dk, ds, q[a]), (dv, p, dout[a])):
                each = torch.einsum("hqk,qhd->khd", weights, other)
                whole[b] = each.unflatten(1, (heads, repeat)).sum(2)
        return dq, dk, dv


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_merges_two_calls_exactly(family: str, monkeypatch) -> None:
    """The whole model on the flash backend's code, with its three kernel calls answered by PyTorch."""
    backend = replace(
        ATTENTION_BACKENDS["flash"],
        refuses=lambda device, dtype: None,
        context=lambda row, device: FlashContext(row, device, TorchVarlen()),
    )
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", backend)
    model = make_model(family)
    ours = make_policy(family, model=model, attention_backend="flash")
    prompts, ids, lengths, sizes = standard_case(family)
    ids[1] = ids[0]  # a whole response twice; prefixes in common are not shared on this backend
    lengths[1] = lengths[0]
    assert_same(ours, make_policy(family, model=model, shared_prefix=False), (prompts, ids, lengths, sizes))


def test_flash_attends_inside_a_gradient_checkpoint() -> None:
    """A checkpoint makes the layer again, and hands out each tensor that it saved once."""
    policy = make_policy("qwen3_vl")
    row = pack(np.array([[1, 2, 3], [4, 5, 0]]), np.array([3, 2]), np.array([4]), np.array([2]), "duplicates")
    context = FlashContext(row, policy.device, TorchVarlen())
    leaves = [torch.randn(1, 2, row.tokens, 8, requires_grad=True) for _ in range(3)]

    def attended() -> Tensor:
        return context.attend(0, *leaves, 0.3).square().sum()

    expected = torch.autograd.grad(attended(), leaves)
    again = checkpoint(attended, use_reentrant=False)
    for ours, wanted in zip(torch.autograd.grad(again, leaves), expected):
        torch.testing.assert_close(ours, wanted)


def test_flash_merge_against_autograd_in_float64() -> None:
    ids, lengths = make_responses([4, 1, 6, 3, 5])
    row = pack(ids.numpy(), lengths.numpy(), np.asarray([5, 2, 7]), np.asarray([3, 1, 1]), "none")
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, row.tokens, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    weights = torch.randn(1, row.tokens, 4, 8, generator=generator, dtype=torch.float64)
    results = []
    cpu = torch.device("cpu")
    for context in (FlashContext(row, cpu, TorchVarlen()), ReferenceContext(row, cpu)):
        output = context.attend(0, *inputs, scale=0.3)
        results.append((output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)))
    for ours, expected in zip(*results):
        assert distance(ours, expected) < 1e-14


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_forward(family: str, monkeypatch) -> None:
    """FlexAttention has no backward pass on the CPU: the forward pass here, the gradients where there is a
    GPU.
    """
    backend = replace(ATTENTION_BACKENDS["flex"], refuses=lambda device, dtype: None)
    model = make_model(family)
    with pytest.raises(ValueError, match="backward"):
        make_policy(family, model=model, attention_backend="flex")
    monkeypatch.setitem(ATTENTION_BACKENDS, "flex", backend)
    ours = make_policy(family, model=model, attention_backend="flex")
    prompts, ids, lengths, sizes = standard_case(family)
    plain = make_policy(family, model=model, shared_prefix=False)
    with torch.no_grad():
        hidden = ours.response_hidden(prompts, ids, lengths, group_sizes=sizes)
        expected = plain.response_hidden(prompts, ids, lengths, group_sizes=sizes)
    assert distance(hidden, expected) < 1e-5


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_equals_the_plain_path_on_a_gpu(family: str, backend: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    # That of the patches' convolution is on by default.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = make_model(family).cuda()
    ours = make_policy(family, model=model, attention_backend=backend)
    assert_same(ours, make_policy(family, model=model, shared_prefix=False), standard_case(family))


def test_torch_flash_matches_the_operators_of_this_torch() -> None:
    """Shapes and dtypes by PyTorch's own shape functions, which run without a GPU."""
    reason = refuses_torch_flash(torch.device("cpu"), torch.bfloat16)
    assert reason == "it needs a CUDA device"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        pytest.skip("needs PyTorch 2.10")
    q, kv = (torch.empty(9, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    sequences = Sequences(torch.empty(3, dtype=torch.int32, device="meta"), 5)
    call = Call(q, kv, kv, sequences, sequences, 0.25, causal=True)
    out, lse = TorchFlash().forward(call)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 9), torch.float32)
    gradients = TorchFlash().backward(call, out, out, lse)
    assert [g.shape for g in gradients] == [q.shape, kv.shape, kv.shape]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["flash", "torch_flash"])
def test_flash_on_a_gpu(backend: str) -> None:
    """bfloat16 against the reference in bfloat16: both round alike at about 2^-8."""
    reason = ATTENTION_BACKENDS[backend].refuses(torch.device("cuda"), torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    model = make_model("qwen3_vl", dtype=torch.bfloat16).cuda()
    case = standard_case("qwen3_vl")
    ours, dense = (make_policy("qwen3_vl", model=model, attention_backend=b) for b in (backend, "reference"))
    _, logps, _, gradients = passes(ours, case)
    _, expected, _, reference = passes(dense, case)
    assert distance(logps, expected) < 2e-2
    for name, gradient in gradients.items():
        assert distance(gradient, reference[name]) < 8e-2, name
