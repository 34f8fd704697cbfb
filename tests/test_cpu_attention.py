"""Attention of response tokens in two parts equals the dense reference, gradients too, and is taken where it pays."""

import numpy as np
import pytest
import torch

from rlaif_fast.policy import cpu_attention
from rlaif_fast.policy.attention import ReferenceContext, SdpaContext
from rlaif_fast.policy.packing import pack

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make_row(lengths, sizes, prompts, words=3, seed=0):
    """Responses over few words, so that many begin alike."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, words, (len(lengths), max(lengths)))
    return pack(ids, np.array(lengths), np.array(prompts), np.array(sizes), merge="prefixes")


ROWS = {
    "equal lengths, nothing shared": make_row([9] * 4, [4], [11], words=10_000),
    "a tree": make_row([9, 4, 12, 12, 7, 1], [6], [11], words=2),
    "groups in another order": make_row([9, 4, 5, 12, 3, 7, 2], [3, 2, 2], [11, 30, 4]),
    "a response within another one": make_row([9, 9, 2, 1], [4], [5], words=1),
}


def attention(context, row, heads, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, n, row.tokens, 16, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    ]
    out = context.attend(0, *tensors, 0.25)
    weights = torch.randn(out.shape, generator=generator).to(dtype)
    return out, *torch.autograd.grad(out, tensors, weights)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_equals_the_dense_reference(name, heads, dtype, monkeypatch):
    monkeypatch.setattr(cpu_attention, "MIN_NODES", 1)
    monkeypatch.setattr(cpu_attention, "MIN_GAIN", 0.0)
    row, device = ROWS[name], torch.device("cpu")
    context = SdpaContext(row, device)
    assert all(bucket.parts for bucket in context._buckets)
    wide = torch.promote_types(dtype, torch.float32)
    expected = attention(ReferenceContext(row, device), row, heads, wide)
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), attention(context, row, heads, dtype), expected):
        assert ours.dtype == dtype
        distance = float((ours.to(wide) - theirs).detach().norm() / theirs.detach().norm())
        assert distance < TOLERANCE[dtype], what


def test_huge_scores_do_not_overflow_in_padding(monkeypatch):
    """A padded slot repeats the first node, whose score with a token of another response may be anything."""
    monkeypatch.setattr(cpu_attention, "MIN_NODES", 1)
    monkeypatch.setattr(cpu_attention, "MIN_GAIN", 0.0)
    row = ROWS["a tree"]
    q, k, v = (torch.randn(1, 2, row.tokens, 16).mul_(60).requires_grad_() for _ in range(3))
    out = SdpaContext(row, torch.device("cpu")).attend(0, q, k, v, 1.0)
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("lengths", "prompt", "parts"),
    [([130] * 8, 512, True), ([130] * 4, 512, True), ([33] * 8, 512, False), ([130] * 4, 8192, False)],
    ids=["many own tokens", "just enough", "few", "little beside the prompt"],
)
def test_is_taken_where_it_pays(lengths, prompt, parts):
    row = make_row(lengths, [len(lengths)], [prompt], words=10_000)
    [bucket] = SdpaContext(row, torch.device("cpu"))._buckets
    assert (bucket.parts is not None) is parts
    assert (bucket.allowed is None) is parts
