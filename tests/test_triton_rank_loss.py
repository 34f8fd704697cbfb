"""The Triton rank loss against the reference in float64: loss, advantages, statistics and both gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_cases import DEVICE, GRADIENT, LOSS, error, round_as_compiled, uninitialised_memory_is_nan, wide

from rlaif_fast.loss import reference
from rlaif_fast.loss.inputs import TokenGradients, TokenInputs
from rlaif_fast.loss.options import KINDS, SCALES, STATS, LossOptions
from rlaif_fast_kernels.rank_loss import launch_config, rank_loss, supports

poison = pytest.fixture(autouse=True)(uninitialised_memory_is_nan)


def batch(
    N: int, G: int, T: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    """Return every tensor a loss can take."""
    random = torch.Generator().manual_seed(seed)
    B = N * G

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    logps = -2 * rand(B, T)
    inputs = {
        "logps": logps,
        "advantages": None,
        "oracle_ranks": (rand(N, G) * G).floor(),  # with ties
        "valid": rand(N) > 0.2,
        "old_logps": logps + rand(B, T) - 0.5,
        "ref_logps": logps + rand(B, T) - 0.5,
        "mask": rand(B, T) > 0.3,
        "sampling_ratio": rand(B, T) + 0.5,
        "entropy": rand(B, T),
        "num_items": None,
        "scores": None,
        "judged": None,
        "weights": None,
    }
    return {
        name: x
        if x is None
        else x.to(DEVICE, dtype if x.is_floating_point() and name != "oracle_ranks" else None)
        for name, x in inputs.items()
    }


def run(loss: Any, inputs: dict[str, Any], options: LossOptions, **extra: Any) -> Any:
    """Call the kernel or the reference on a batch."""
    rest = {name: x for name, x in inputs.items() if name not in ("logps", "entropy")}
    return loss(inputs["logps"], inputs["entropy"], TokenInputs(**rest), options, **extra)


def check(inputs: dict[str, Any], options: LossOptions, dtype: torch.dtype = torch.float32) -> TokenGradients:
    """Run kernel and reference on the same inputs and compare everything."""
    result = run(rank_loss, inputs, options)
    exact = {name: wide(x) for name, x in inputs.items()}
    logps = exact["logps"].requires_grad_()
    if exact["entropy"] is not None:
        exact["entropy"].requires_grad_()
    expected = run(reference.rank_loss, exact, options)
    if logps.numel():
        expected.loss.backward()
        assert error(result.grad_logps, logps.grad) < GRADIENT[torch.float32]
        if exact["entropy"] is None:
            assert result.grad_entropy is None
        elif options.entropy_coef:
            assert error(result.grad_entropy, exact["entropy"].grad) < GRADIENT[torch.float32]
        else:
            assert not result.grad_entropy.any()
    scale = expected.stats[:3].abs().sum().item()  # the loss is a sum whose parts may cancel
    assert abs(result.loss.item() - expected.loss.item()) <= LOSS[dtype] * max(scale, 1e-30)
    assert error(result.advantages, expected.advantages) < LOSS[dtype]
    torch.testing.assert_close(result.stats.double(), expected.stats, rtol=2e-5, atol=2e-7)
    return result


FULL = {"beta": 0.04, "entropy_coef": 0.01}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**FULL},
        {**FULL, "loss_type": "dapo", "kl": "k1", "score": "sum", "kind": "paper_swapped", "scale": "group"},
        {
            **FULL,
            "loss_type": "dr_grpo",
            "max_completion_length": 9,
            "kl": "k2",
            "kind": "paper",
            "delta": 1.5,
        },
        {**FULL, "importance_sampling_level": "sequence", "kind": "zscore", "epsilon_high": 0.05},
        {"kind": "oracle", "delta": 0.7, "penalty_weight": 0.5},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.0, "epsilon_high": 0.0, "delta": 0.9},
        {**FULL, "loss_type": "cispo", "epsilon_high": 0.1, "kl_clamp": 0.02, "entropy_aggregate": "tokens"},
        {**FULL, "loss_type": "sapo", "unbiased_kl": True, "empty_rows": "skip", "sapo_temperature_neg": 2.0},
        {**FULL, "loss_type": "luspo", "dual_clip": 1.1, "empty_rows": "skip"},
        {**FULL, "loss_type": "bnpo", "dual_clip": 1.1, "delta": 1.3, "unbiased_kl": True, "kl": "k1"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_options(options: dict[str, Any]) -> None:
    check(batch(3, 4, 21), LossOptions(**options))


def test_partly_judged_weighted_groups_in_a_given_order() -> None:
    """Ratios, ranks, advantages and loss in the one pass, with what a trainer hands on from its oracle."""
    inputs = batch(4, 4, 9)
    judged = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], device=DEVICE).bool()
    inputs |= {"judged": judged, "valid": None, "weights": torch.tensor([0.5, 2.0, 1.0, 1.0], device=DEVICE)}
    check(inputs, LossOptions(**FULL))
    inputs["scores"] = torch.rand(4, 4, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    inputs["scores"][~judged] = float("nan")
    inputs["valid"] = torch.tensor([True, False, True, True], device=DEVICE)
    result = check(inputs, LossOptions(**FULL, kind="directed", scale="group"))
    assert not result.advantages.view(4, 4)[~judged].any()
    assert result.stats[13] == 1 - 1 / 4  # one group has a signal


def test_no_response_counts_where_all_are_empty() -> None:
    inputs = batch(1, 3, 4)
    inputs["mask"][0] = False
    inputs["valid"] = None
    options = LossOptions(empty_rows="skip")
    shorter = check(inputs, options)
    whole = run(rank_loss, inputs, LossOptions())
    torch.testing.assert_close(shorter.loss, whole.loss * 3 / 2)


@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_lengths_around_the_block(T: int) -> None:
    assert launch_config(64, 8)["BLOCK_T"] == 64
    check(batch(2, 2, T), LossOptions(**FULL))


def test_a_response_longer_than_a_grid_dimension() -> None:
    check(batch(1, 1, 65_537), LossOptions(**FULL, kind="paper"))


@pytest.mark.parametrize("G", [1, 2, 7, 8, 33, 64])
def test_group_sizes(G: int) -> None:
    inputs = batch(1, G, 2)
    inputs["valid"] = None
    check(inputs, LossOptions(score="sum", scale="group"))


@pytest.mark.parametrize("name", ["old_logps", "ref_logps", "mask", "sampling_ratio", "entropy", "valid"])
def test_each_input_may_be_absent(name: str) -> None:
    inputs = batch(2, 3, 7)
    inputs[name] = None
    check(
        inputs,
        LossOptions(beta=0.0 if name == "ref_logps" else 0.04, entropy_coef=0.01 * (name != "entropy")),
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("per_token", [False, True])
def test_given_advantages(per_token: bool, level: str) -> None:
    inputs = batch(3, 2, 9)
    shape = (6, 9) if per_token else (6,)
    random = torch.Generator().manual_seed(1)
    advantages = torch.randn(shape, generator=random).to(DEVICE) + 0.6  # more above 0 than below
    inputs |= {"advantages": advantages, "oracle_ranks": None, "valid": None}
    options = LossOptions(
        **FULL, importance_sampling_level=level, delta=1.3, epsilon_low=0.02, epsilon_high=0.02
    )
    check(inputs, options)
    inputs["advantages"].view(-1)[3] = float("nan")
    inputs["mask"] = None
    assert run(rank_loss, inputs, options).loss.isnan()


def test_given_advantages_of_more_rows_than_a_group_holds() -> None:
    inputs = batch(1, 67, 1)
    inputs |= {"advantages": torch.linspace(-1, 1, 67, device=DEVICE), "oracle_ranks": None, "valid": None}
    check(inputs, LossOptions(loss_type="dapo"))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_number_of_items(loss_type: str) -> None:
    inputs = batch(2, 2, 5)
    inputs["num_items"] = torch.tensor(7.0, device=DEVICE)
    check(inputs, LossOptions(loss_type=loss_type))


def test_one_sampling_ratio_a_response() -> None:
    inputs = batch(2, 2, 5)
    inputs["sampling_ratio"] = inputs["sampling_ratio"][:, :1]
    check(inputs, LossOptions())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    check(batch(2, 3, 20, dtype=dtype), LossOptions(**FULL), dtype)


def test_masked_values_may_be_anything() -> None:
    inputs = batch(2, 3, 8)
    options = LossOptions(**FULL)
    expected = check(inputs, options)
    garbage = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38], device=DEVICE).repeat(2)
    for name in ("logps", "old_logps", "ref_logps", "sampling_ratio", "entropy"):
        inputs[name] = torch.where(inputs["mask"], inputs[name], garbage)
    result = run(rank_loss, inputs, options)
    for got, want in zip(result, expected):
        assert torch.equal(got, want)


def test_all_masked_is_zero() -> None:
    inputs = batch(2, 3, 8)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    result = check(inputs, LossOptions(**FULL))
    assert result.loss == 0
    assert not result.grad_logps.any()


def test_invalid_groups_count_nowhere() -> None:
    inputs = batch(3, 2, 4)
    inputs["valid"] = torch.tensor([True, False, False], device=DEVICE)
    inputs["logps"][2:] = float("nan")
    check(inputs, LossOptions(**FULL))


def test_identical_responses_have_no_signal() -> None:
    inputs = batch(2, 4, 3)
    inputs["oracle_ranks"] = torch.full_like(inputs["oracle_ranks"], 2.0)
    inputs["valid"] = None
    for name in ("logps", "old_logps"):
        inputs[name] = inputs[name][:1].expand(8, 3)
    result = check(inputs, LossOptions())
    assert not result.advantages.any()
    assert not result.grad_logps.any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_extreme_ratios_stay_finite(level: str) -> None:
    inputs = batch(2, 2, 6)
    step = torch.tensor([100.0, -100.0], device=DEVICE)
    inputs["old_logps"] = inputs["logps"] + step.repeat(2)[:, None]
    inputs["ref_logps"] = inputs["logps"] - step.repeat(3)
    result = check(inputs, LossOptions(beta=0.04, importance_sampling_level=level))
    assert result.loss.isfinite()
    assert result.grad_logps.isfinite().all()


@pytest.mark.parametrize("name", ["logps", "old_logps", "ref_logps"])
def test_nan_in_a_token_that_counts_reaches_the_loss(name: str) -> None:
    inputs = batch(1, 2, 3)
    inputs |= {"mask": None, "valid": None}
    inputs[name][1, 2] = float("nan")
    assert run(rank_loss, inputs, LossOptions(beta=0.04)).loss.isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_nan_stays_in_its_own_response(kind: str, scale: str) -> None:
    inputs = batch(2, 3, 4)
    inputs |= {"mask": None, "valid": None, "judged": None, "scores": None}
    inputs["old_logps"][1, 2] = float("nan")
    options = LossOptions(kind=kind, scale=scale)
    ours, theirs = run(rank_loss, inputs, options), run(reference.rank_loss, inputs, options)
    assert ours.loss.isnan() and theirs.loss.isnan()
    assert torch.allclose(ours.advantages, theirs.advantages, atol=1e-5)
    assert ours.grad_logps.isnan().any(1).tolist() == [False, True, False, False, False, False]
    assert not ours.stats[STATS.index("kendall_tau")].isnan()


def test_strided_inputs() -> None:
    inputs = batch(2, 2, 12)
    for name in ("logps", "old_logps", "ref_logps", "mask", "sampling_ratio", "entropy"):
        inputs[name] = inputs[name][:, 1::2]
    check(inputs, LossOptions(**FULL))


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    result = run(rank_loss, batch(*shape), LossOptions(**FULL))
    assert result.loss == 0
    assert result.grad_logps.shape == (shape[0] * shape[1], shape[2])


def test_equal_inputs_give_equal_bits() -> None:
    inputs = batch(4, 3, 5)
    first, second = (run(rank_loss, inputs, LossOptions(**FULL)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


VECTORS = json.loads((Path(__file__).parent / "data" / "grpo_rank.json").read_text())


@pytest.mark.parametrize(
    "case", [c for c in VECTORS if len(c["logps"]) <= 6], ids=lambda c: c["params"]["kind"]
)
def test_worked_cases(case: dict[str, Any]) -> None:
    options = LossOptions(**case["params"], max_completion_length=case["max_completion_length"])

    def tensor(name: str) -> Tensor:
        return torch.tensor(case[name], device=DEVICE, dtype=torch.float32)

    names = ("oracle_ranks", "old_logps", "ref_logps")
    inputs = TokenInputs(mask=tensor("mask").bool(), **{name: tensor(name) for name in names})
    result = rank_loss(tensor("logps"), None, inputs, options)
    assert result.loss.item() == pytest.approx(case["expect"]["loss"], rel=1e-5, abs=1e-6)
    assert result.advantages.tolist() == pytest.approx(case["expect"]["advantages"], rel=1e-5, abs=1e-6)
    assert result.stats[3].item() == pytest.approx(case["expect"]["kl"], rel=1e-5)


def test_refusals_name_the_reason() -> None:
    assert supports("rank_loss", DEVICE, torch.float32, 64) is None
    assert "float64" in (supports("rank_loss", DEVICE, torch.float64, 8) or "")
    assert "65" in (supports("rank_loss", DEVICE, torch.float32, 65) or "")
    assert "meta" in (supports("rank_loss", "meta", torch.float32, 8) or "")


@pytest.mark.parametrize("score", ["mean", "sum"])
def test_a_response_without_a_token_stands_last(score):
    inputs = batch(5, 4, 9) | {"oracle_ranks": torch.arange(4.0, device=DEVICE).expand(5, 4).contiguous()}
    assert inputs["mask"] is not None
    inputs["mask"][2::4] = False
    check(inputs, LossOptions(kind="directed", score=score))


def test_equal_means_of_unequal_lengths_tie(monkeypatch):
    round_as_compiled(monkeypatch, every=2)
    inputs = batch(1, 4, 5) | {"oracle_ranks": torch.arange(4.0, device=DEVICE)[None], "valid": None}
    inputs["logps"] = inputs["old_logps"] = torch.full((4, 5), -0.75, device=DEVICE)
    inputs["mask"] = torch.arange(5, device=DEVICE) <= torch.tensor([[1], [2], [4], [2]], device=DEVICE)
    check(inputs, LossOptions())
