"""The Triton row kernels against the reference in float64: log-probability, entropy, loss and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_cases import DEVICE, GRADIENT, LOSS, error, uninitialised_memory_is_nan

from rlaif_fast.loss import reference
from rlaif_fast.loss.inputs import RowInputs, Scaling, TokenInputs
from rlaif_fast.loss.options import LossOptions
from rlaif_fast_kernels import scale_gradient
from rlaif_fast_kernels.logits_loss import (
    STREAM_BLOCK,
    launch_config,
    row_grad,
    row_loss,
    row_stats,
    supports,
)

poison = pytest.fixture(autouse=True)(uninitialised_memory_is_nan)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def rows(M: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return logits (M, V) and token ids (M,), likely tokens among them."""
    random = torch.Generator().manual_seed(M * V)
    logits = torch.randn(M, V, generator=random) * 3
    ids = torch.randint(V, (M,), generator=random)
    if M > 1:
        ids[1] = logits[1].argmax()
    return logits.to(DEVICE, dtype), ids.to(DEVICE)


def check(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> None:
    """Compare statistics, and the gradient in place and not, with the reference of the same logits."""
    dtype, M = logits.dtype, ids.numel()
    random = torch.Generator().manual_seed(1)
    g, h = (torch.randn(M, generator=random).to(DEVICE) for _ in range(2))
    exact = logits.double().requires_grad_()
    logps, entropy = reference.selective_log_softmax(exact, ids.view(logits.shape[:-1]), Scaling(temperature))
    (logps.view(-1) @ g.double() + entropy.view(-1) @ h.double()).backward()

    stats = row_stats(logits, ids, Scaling(temperature))
    assert error(stats.logps, logps.detach().view(-1)) < LOSS[torch.float32]
    assert error(stats.entropy, entropy.detach().view(-1)) < LOSS[torch.float32]
    lse = (logits.double() / temperature).logsumexp(-1).view(-1)
    assert error(stats.lse, lse) < LOSS[torch.float32]

    out = torch.full_like(logits, float("nan"))
    row_grad(logits, ids, Scaling(temperature), stats, g, h, out)
    assert error(out, exact.grad) < GRADIENT[dtype]
    place = logits.clone()
    row_grad(place, ids, Scaling(temperature), stats, g, h, place)
    assert torch.equal(place, out)


BLOCK = launch_config(1 << 20, 4, STREAM_BLOCK)["BLOCK_V"]


@pytest.mark.parametrize("V", [1, 2, 257, 1000, BLOCK - 1, BLOCK, BLOCK + 1])
def test_vocabularies(V: int) -> None:
    check(*rows(3, V))


@pytest.mark.parametrize("V", [32_000, 151_936, 152_064])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_vocabularies_in_16_bits(V: int, dtype: torch.dtype) -> None:
    check(*rows(2, V, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(dtype: torch.dtype, temperature: float) -> None:
    check(*rows(4, 300, dtype), temperature)


@pytest.mark.parametrize("V", [5, 3 * BLOCK])
def test_next_to_no_temperature(V: int) -> None:
    logits, ids = rows(3, V)
    logps, entropy = reference.selective_log_softmax(logits.double(), ids, Scaling(1e-12))
    stats = row_stats(logits, ids, Scaling(1e-12))
    assert error(stats.logps, logps) < LOSS[torch.float32]
    assert error(stats.entropy, entropy) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("in_one_sweep", [False, True])
def test_a_probability_in_the_gradient_is_as_good_as_the_logsumexp(
    temperature: float, in_one_sweep: bool
) -> None:
    """The bound of docs/kernels.md."""
    logits, _ = rows(8, 300)
    ids = logits.topk(2).indices.gather(1, torch.arange(8, device=DEVICE)[:, None] % 2).squeeze(1)
    ones, scaling = torch.ones(8, device=DEVICE), Scaling(temperature)
    exact = logits.double().requires_grad_()
    reference.selective_log_softmax(exact, ids, scaling)[0].sum().backward()
    place = logits.clone()
    if in_one_sweep:
        row_loss(place, ids, scaling, RowInputs(ones, -ones, None, None, None), LossOptions())
    else:
        row_grad(place, ids, scaling, row_stats(place, ids, scaling), ones, None, place)
    lse = (logits.double() / temperature).logsumexp(-1).abs()
    error = (place.double() - exact.grad).abs().amax(-1) * temperature
    assert (error <= 2 * torch.finfo(torch.float32).eps * lse).all()


def test_int32_ids() -> None:
    logits, ids = rows(3, 50)
    check(logits, ids.int())


@pytest.mark.parametrize("M", [0, 1])
def test_few_rows(M: int) -> None:
    check(*rows(M, 65))


def test_strided_logits() -> None:
    logits, _ = rows(12, 130)
    sliced = logits.view(3, 4, 130)[:, :-1, 1:100]
    _, ids = rows(9, 99)
    check(sliced, ids)
    out = torch.full_like(logits, 7.0).view(3, 4, 130)
    stats = row_stats(sliced, ids, Scaling())
    ones = torch.ones(9, device=DEVICE)
    row_grad(sliced, ids, Scaling(), stats, ones, None, out[:, :-1, 1:100])
    assert (out[:, -1] == 7).all()
    assert (out[:, :, 100:] == 7).all()
    assert not (out[:, :-1, 1:100] == 7).any()


def test_strided_vocabulary() -> None:
    logits, ids = rows(3, 40)
    strided = logits.t().contiguous().t()
    expected, stats = row_stats(logits, ids, Scaling()), row_stats(strided, ids, Scaling())
    assert torch.equal(stats.logps, expected.logps)
    ones = torch.ones(3, device=DEVICE)
    outs = [torch.empty_like(logits) for _ in range(2)]
    for x, out in zip((logits, strided), outs):
        row_grad(x, ids, Scaling(), expected, ones, ones, out)
    assert torch.equal(*outs)


def test_forbidden_tokens_have_no_probability_and_no_gradient() -> None:
    logits, ids = rows(4, 5000)
    logits[:, 1::2] = -float("inf")
    logits[3, : BLOCK - 7] = -float("inf")
    ids = ids // 2 * 2
    ids[3] = 4998
    check(logits, ids)


def test_a_large_gradient_of_the_entropy_leaves_forbidden_tokens_alone() -> None:
    logits, ids = rows(2, 300)
    logits[:, 1::2] = -float("inf")
    grad, large = torch.empty_like(logits), torch.empty_like(logits)
    zeros, ones = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    stats = row_stats(logits, ids, Scaling())
    row_grad(logits, ids, Scaling(), stats, zeros, ones, grad)
    row_grad(logits, ids, Scaling(), stats, zeros, ones * 2.0**40, large)
    assert torch.equal(large, grad * 2.0**40)


def test_large_logits_do_not_overflow() -> None:
    logits, ids = rows(4, 300)
    check(logits * 10, ids)
    stats = row_stats(logits * 1e35, ids, Scaling())
    assert all(x.isfinite().all() for x in stats)
    assert stats.entropy.max() < 1e-6


def test_certain_token_has_no_entropy() -> None:
    logits, ids = rows(2, 300)
    logits[:, 7] = 1e4
    stats = row_stats(logits, torch.full_like(ids, 7), Scaling())
    assert stats.logps.tolist() == [0.0, 0.0]
    assert stats.entropy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_not_hidden(bad: float) -> None:
    logits, ids = rows(2, 300)
    logits[1, 250] = bad
    stats = row_stats(logits, ids, Scaling())
    assert stats.logps.isfinite().tolist() == [True, False]


def test_ids_out_of_range_are_not_read_through() -> None:
    logits, ids = rows(3, 100)
    expected = row_stats(logits, ids, Scaling())
    stats = row_stats(logits, torch.tensor([-1, 100, 1 << 40], device=DEVICE), Scaling())
    assert stats.logps.isnan().all()
    assert torch.equal(stats.lse, expected.lse)
    assert torch.equal(stats.entropy, expected.entropy)
    # A gradient without the one-hot term: what a shard of the vocabulary writes for a token of another.
    out = torch.empty_like(logits)
    ones = torch.ones(3, device=DEVICE)
    row_grad(logits, torch.full_like(ids, -1), Scaling(), expected, ones, None, out)
    assert error(out, -logits.double().softmax(-1)) < GRADIENT[torch.float32]


FULL = {"beta": 0.1, "entropy_coef": 0.05}


def row_case(M: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, RowInputs]:
    """Return logits, ids and the inputs of a loss; row 0 is masked, others are clipped."""
    logits, ids = rows(M, V, dtype)
    random = torch.Generator().manual_seed(2)
    logps = row_stats(logits, ids, Scaling()).logps

    def near() -> Tensor:
        return logps + 0.4 * torch.randn(M, generator=random).to(DEVICE)

    weights = torch.rand(M, generator=random).to(DEVICE)
    weights[0] = 0.0
    A = torch.randn(M, generator=random).to(DEVICE)
    return logits, ids, RowInputs(A, weights, near(), near(), weights + 0.5)


def check_loss(logits: Tensor, ids: Tensor, given: RowInputs, options: LossOptions, scaling: Scaling) -> None:
    """Compare with the reference loss of each row as a response of its own weight."""
    exact = logits.double().requires_grad_()
    logps, entropy = reference.selective_log_softmax(exact, ids, scaling)
    total = exact.new_zeros(())
    for m in range(len(ids)):
        one = [None if x is None else x[m].double().view(1, 1) for x in given[:5]]
        A, weight, old, ref, ratio = one
        assert A is not None and weight is not None
        inputs = TokenInputs(advantages=A, old_logps=old, ref_logps=ref, sampling_ratio=ratio)
        closed = reference.rank_loss(logps[m].view(1, 1), entropy[m].view(1, 1), inputs, options)
        total = total + closed.loss * weight.squeeze()
    grads = torch.autograd.grad(total, (exact, logps, entropy), allow_unused=True)

    place = logits.clone()
    stats, grad_logps, grad_entropy = row_loss(place, ids, scaling, given, options)
    live = given.weights != 0
    assert error(stats.logps[live], logps.detach()[live]) < LOSS[torch.float32]
    assert error(stats.entropy[live], entropy.detach()[live]) < LOSS[torch.float32]
    assert not stats.logps[~live].any()
    assert error(place, grads[0]) < GRADIENT[logits.dtype]
    assert error(grad_logps, grads[1]) < GRADIENT[torch.float32]
    if options.entropy_coef:
        assert error(grad_entropy, grads[2]) < GRADIENT[torch.float32]
    else:
        assert not grad_entropy.any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        {**FULL},
        {"epsilon_low": 0.1, "epsilon_high": 0.3, "delta": 1.2},
        {**FULL, "kl": "k1"},
        {**FULL, "kl": "k2"},
        {**FULL, "loss_type": "cispo", "epsilon_high": 0.1, "unbiased_kl": True, "kl_clamp": 0.5},
        {**FULL, "loss_type": "sapo"},
        {**FULL, "dual_clip": 1.1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_loss_in_place(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_loss(*row_case(9, 270, dtype), LossOptions(**options), Scaling())


def test_loss_of_a_real_vocabulary() -> None:
    check_loss(*row_case(3, 151_936, torch.bfloat16), LossOptions(**FULL), Scaling(0.9))


@pytest.mark.parametrize("absent", ["old_logps", "ref_logps", "sampling_ratio"])
def test_loss_without(absent: str) -> None:
    logits, ids, given = row_case(5, 100, torch.float32)
    options = LossOptions(beta=0.0 if absent == "ref_logps" else 0.1)
    check_loss(logits, ids, given._replace(**{absent: None}), options, Scaling())


def test_masked_rows_are_not_read() -> None:
    logits, ids, given = row_case(4, 300, torch.float32)
    logits[0] = float("nan")
    ids[0] = -5
    given = given._replace(
        old_logps=given.old_logps.index_fill(0, torch.tensor([0], device=DEVICE), torch.nan)
    )
    stats, grad_logps, grad_entropy = row_loss(logits, ids, Scaling(), given, LossOptions(**FULL))
    for x in (logits, *stats, grad_logps, grad_entropy):
        assert x.isfinite().all()
    assert not logits[0].any()


def test_extreme_ratios_stay_finite() -> None:
    logits, ids, given = row_case(4, 300, torch.float32)
    step = torch.tensor([100.0, -100.0], device=DEVICE).repeat(2)
    given = given._replace(old_logps=given.old_logps + step, ref_logps=given.ref_logps - step)
    check_loss(logits, ids, given, LossOptions(**FULL), Scaling())


def test_nan_in_a_row_that_counts_reaches_its_gradient() -> None:
    logits, ids, given = row_case(3, 300, torch.float32)
    logits[2, 17] = float("nan")
    row_loss(logits, ids, Scaling(), given, LossOptions())
    assert logits.isfinite().all(-1).tolist() == [True, True, False]


def test_refusals_name_the_reason() -> None:
    assert supports("logits_loss", DEVICE, torch.bfloat16, None) is None
    assert "float64" in (supports("logits_loss", DEVICE, torch.float64, None) or "")
    assert "meta" in (supports("logits_loss", "meta", torch.float32, None) or "")


@pytest.mark.parametrize("V", [1, 270, 9000])
@pytest.mark.parametrize(
    "scaling", [Scaling(0.7, None, 2.0, 1.3), Scaling(1.0, None, None, 0.5)], ids=["cap", "scale"]
)
def test_caps_scales_and_a_temperature_for_each_row(scaling: Scaling, V: int) -> None:
    logits, ids, given = row_case(4, V, torch.float32)
    for one in (scaling, replace(scaling, temperatures=torch.tensor([0.5, 1.0, 2.0, 0.9], device=DEVICE))):
        check_loss(logits, ids, given, LossOptions(**FULL), one)


def test_the_entropy_may_have_weights_of_its_own() -> None:
    logits, ids, given = row_case(4, 90, torch.float32)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE)
    *_, grad_entropy = row_loss(
        logits, ids, Scaling(), given._replace(entropy_weights=weights), LossOptions(**FULL)
    )
    assert torch.equal(grad_entropy, -FULL["entropy_coef"] * weights)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("M", [0, 1, scale_gradient.BLOCK - 1, scale_gradient.BLOCK + 1])
def test_a_gradient_is_scaled_in_float32(M: int, dtype: torch.dtype) -> None:
    x = torch.randn(M, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    third = torch.tensor(1 / 3, device=DEVICE)
    want = (x.float() * third).to(dtype)
    assert error(scale_gradient.scale_gradient_(x.clone(), third), want) < (
        1e-6 if dtype == torch.float32 else 8e-3
    )
    assert torch.equal(scale_gradient.scale_gradient_(x.clone(), torch.ones((), device=DEVICE)), x)
