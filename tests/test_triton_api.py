"""The public losses on the Triton backend against the reference backend: values, statistics, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_cases import DEVICE, error, uninitialised_memory_is_nan

import rlaif_fast
from rlaif_fast.loss import backends

poison = pytest.fixture(autouse=True)(uninitialised_memory_is_nan)

N, G, T, V, H = 2, 2, 5, 70, 6
B = N * G

CASES: dict[str, dict[str, Any]] = {
    "off-policy": {},
    "everything": {"beta": 0.05, "entropy_coef": 0.02, "loss_type": "dapo", "delta": 1.4, "scale": "group"},
    "on-policy": {"old_logps": None},
    "cispo": {"loss_type": "cispo", "kl_clamp": 0.3, "beta": 0.05, "unbiased_kl": True},
    "judged": {"judged": torch.tensor([[True, True], [True, False]], device=DEVICE)},
    "sequence": {"importance_sampling_level": "sequence", "entropy_coef": 0.02},
}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(DEVICE)

    near = -4.0 + 0.3 * randn(B, T)
    return {
        "hidden": randn(B, T, H),
        "weight": randn(V, H),
        "bias": randn(V),
        "ids": torch.randint(V, (B, T), generator=random).to(DEVICE),
        "ranks": torch.tensor([[0, 1], [1, 0]], device=DEVICE),
        "mask": torch.rand(B, T, generator=random).to(DEVICE) > 0.2,
        "old": near,
        "ref": near + 0.3 * randn(B, T),
    }


def assert_same(loss: Any, leaves: list[Tensor]) -> None:
    """Run one closure over both backends and compare all that comes back."""
    results = {}
    for backend in ("triton", "reference"):
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_()
        output = loss(backend)
        (output.loss * 1.7).backward()
        results[backend] = output, [leaf.grad for leaf in leaves]
    (got, grads), (want, expected) = results["triton"], results["reference"]
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.advantages, want.advantages, rtol=1e-5, atol=1e-6)
    assert got.stats.keys() == want.stats.keys()
    for name in got.stats:
        torch.testing.assert_close(got.stats[name], want.stats[name], rtol=1e-4, atol=1e-6, msg=name)
    for grad, reference in zip(grads, expected):
        assert error(grad, reference) < 2e-5  # both are float32


def options(case: str, t: dict[str, Tensor]) -> dict[str, Any]:
    given = {"old_logps": t["old"], "ref_logps": t["ref"], "mask": t["mask"]}
    return given | CASES[case]


@pytest.mark.parametrize("case", CASES)
def test_from_logps(case: str) -> None:
    t = tensors()
    logps, entropy = t["old"] + 0.1, t["ref"] + 9.0
    arguments = options(case, t)
    assert_same(
        lambda backend: rlaif_fast.grpo_rank_loss(
            logps, t["ranks"], entropy=entropy, backend=backend, **arguments
        ),
        [logps] + [entropy] * bool(arguments.get("entropy_coef")),
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_from_logits(case: str, inplace: bool) -> None:
    t = tensors()
    logits = t["hidden"] @ t["weight"].t()
    arguments = options(case, t)
    assert_same(
        lambda backend: rlaif_fast.grpo_rank_loss_from_logits(
            logits * 1.0, t["ids"], t["ranks"], inplace_backward=inplace, backend=backend, **arguments
        ),
        [logits],
    )


@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize("case", CASES)
def test_from_hidden_states(case: str, chunk_size: int | None) -> None:
    t = tensors()
    assert_same(
        lambda backend: rlaif_fast.fused_linear_grpo_rank_loss(
            t["hidden"], t["weight"], t["ids"], t["ranks"], bias=t["bias"], temperature=1.3,
            chunk_size=chunk_size, backend=backend, **options(case, t),
        ),
        [t["hidden"], t["weight"], t["bias"]],
    )  # fmt: skip


@pytest.mark.parametrize("form", ["logps", "hidden"])
def test_a_kl_that_is_only_watched_may_be_infinite(form: str) -> None:
    """With a beta of 0 neither the loss nor a gradient knows of it, nor of an entropy without a coefficient."""
    t = tensors()
    at = tuple(t["mask"].nonzero()[0].tolist())
    logps, entropy = t["old"] + 0.1, torch.zeros_like(t["old"])
    t["ref"][at], entropy[at] = -torch.inf, torch.nan
    arguments = {"old_logps": t["old"], "ref_logps": t["ref"], "mask": t["mask"], "kl": "k2"}

    def loss(backend: str) -> Any:
        if form == "hidden":
            rest = (t["hidden"], t["weight"], t["ids"], t["ranks"])
            out = rlaif_fast.fused_linear_grpo_rank_loss(*rest, backend=backend, **arguments)
        else:
            out = rlaif_fast.grpo_rank_loss(logps, t["ranks"], entropy=entropy, backend=backend, **arguments)
            assert out.stats.pop("entropy").isnan()
        assert out.loss.isfinite() and out.stats.pop("kl") == torch.inf
        return out

    assert_same(loss, [t["hidden"], t["weight"]] if form == "hidden" else [logps])


def test_rows_without_gradient_drop_out() -> None:
    t = tensors()
    advantages = torch.tensor([0.0, 1.0, 0.0, -1.0], device=DEVICE)
    assert_same(
        lambda backend: rlaif_fast.fused_linear_grpo_rank_loss(
            t["hidden"], t["weight"], t["ids"], advantages=advantages, old_logps=t["old"], chunk_size=8,
            backend=backend,
        ),
        [t["hidden"], t["weight"]],
    )  # fmt: skip


def test_packed_hidden_states() -> None:
    t = tensors()
    lengths = torch.tensor([5, 1, 4, 2], device=DEVICE)
    held = torch.arange(T, device=DEVICE) < lengths[:, None]
    hidden, ids, old = t["hidden"][held], t["ids"][held], t["old"][held]
    assert_same(
        lambda backend: rlaif_fast.fused_linear_grpo_rank_loss(
            hidden,
            t["weight"],
            ids,
            t["ranks"],
            lengths=lengths,
            old_logps=old,
            chunk_size=4,
            backend=backend,
        ),
        [hidden, t["weight"]],
    )


def test_token_logps() -> None:
    t = tensors()
    hidden = t["hidden"].requires_grad_()
    results = {}
    for backend in ("triton", "reference"):
        logps, entropy = rlaif_fast.token_logps(
            hidden, t["weight"], t["ids"], return_entropy=True, chunk_size=6, backend=backend
        )
        (grad,) = torch.autograd.grad((logps * t["old"] + entropy * t["ref"]).sum(), hidden)
        results[backend] = logps, entropy, grad
    for got, want in zip(*results.values()):
        assert error(got, want) < 2e-5


def test_the_interpreter_is_never_chosen_automatically() -> None:
    chosen = backends.select("rank_loss", "auto", torch.zeros(2, 2, device=DEVICE), 2)
    assert (chosen == "triton") == (DEVICE == "cuda")


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_another_dtype_is_cast_once(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    t = tensors()
    cast = {name: t[name].to(dtype).requires_grad_() for name in ("hidden", "weight")}
    results = []
    for bias in (t["bias"].to(bias_dtype), t["bias"].to(bias_dtype).to(dtype)):
        bias = bias.requires_grad_()
        out = rlaif_fast.fused_linear_grpo_rank_loss(
            **cast,
            token_ids=t["ids"],
            oracle_ranks=t["ranks"],
            bias=bias,
            old_logps=t["old"],
            backend="triton",
        )
        grads = torch.autograd.grad(out.loss, [*cast.values(), bias])
        assert [g.dtype for g in grads] == [dtype, dtype, bias.dtype]
        logps = rlaif_fast.token_logps(*cast.values(), t["ids"], bias=bias, backend="triton")
        results.append((out.loss, logps, *grads[:2]))
    for got, want in zip(*results):
        assert torch.equal(got, want)
    exact = {name: x.detach().double() for name, x in cast.items()}
    want = rlaif_fast.token_logps(
        *exact.values(), t["ids"], bias=t["bias"].to(bias_dtype).double(), backend="reference"
    )
    if dtype == torch.float32:
        assert error(results[0][1], want) < 1e-5


def test_float32_gradients_of_a_bfloat16_weight() -> None:
    """`float32_weight` gets what an optimizer's copy needs; in bfloat16 the same gradient is rounded."""
    t = tensors()
    hidden, weight = t["hidden"].bfloat16().requires_grad_(), t["weight"].bfloat16().requires_grad_()
    rest = {"old_logps": t["old"], "chunk_size": 4, "backend": "triton"}
    copy = torch.zeros(V, H, device=DEVICE, requires_grad=True)
    for upstream in (1 / 3, 1.0):
        out = rlaif_fast.fused_linear_grpo_rank_loss(
            hidden, weight, t["ids"], t["ranks"], float32_weight=copy, **rest
        )
        (out.loss * upstream).backward()
    assert weight.grad is None and hidden.grad is not None
    plain = rlaif_fast.fused_linear_grpo_rank_loss(hidden, weight, t["ids"], t["ranks"], **rest)
    (rounded,) = torch.autograd.grad(plain.loss, weight)
    assert error(copy.grad * 3 / 4, rounded) < 8e-3
    assert not torch.equal(copy.grad.bfloat16().float(), copy.grad)
