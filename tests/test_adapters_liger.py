"""The class called as Liger's GRPO loss, against Liger's."""

from __future__ import annotations

import pytest
import torch

from rlaif_fast.adapters.liger import FusedLinearGRPOLoss
from rlaif_fast.adapters.parity import FEATURES, NOT_IN_LIGER, liger_errors

B, T, H, V = 4, 5, 8, 12


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in NOT_IN_LIGER])
def test_loss_gradients_and_metrics_are_ligers(feature):
    pytest.importorskip("liger_kernel")
    errors = liger_errors(feature)
    assert errors.loss <= 1e-6
    assert errors.gradients <= 2e-6


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {
        "_input": torch.randn(B, T, H),
        "lin_weight": torch.randn(V, H),
        "selected_token_ids": torch.randint(0, V, (B, T)),
        "attention_mask": torch.ones(B, T),
        "advantages": torch.randn(B),
    }


def liger(**options):
    return pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        compiled=False, **options
    )


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
@pytest.mark.parametrize("items", [40, torch.tensor(0.25)])
def test_items_of_the_whole_batch(batch, loss_type, items):
    options = {"beta": 0.0, "loss_type": loss_type, "use_ref_model": False}
    expected, _ = liger(**options)(**batch, num_items_in_batch=items)
    actual, _ = FusedLinearGRPOLoss(**options)(**batch, num_items_in_batch=items)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_the_reference_policy_by_its_hidden_states(batch):
    reference = {"ref_input": torch.randn(B, T, H), "ref_weight": torch.randn(V, H)}
    expected, (kl, clipped) = liger(beta=0.1)(**batch, **reference)
    actual, metrics = FusedLinearGRPOLoss(beta=0.1)(**batch, **reference)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(metrics), torch.stack([kl, clipped]), rtol=1e-5, atol=0)


def test_sampling_ratio(batch):
    ratio = torch.rand(B, 1) + 0.5
    expected, _ = liger(beta=0.0, use_ref_model=False)(**batch, vllm_is_ratio=ratio)
    actual, _ = FusedLinearGRPOLoss(beta=0.0)(**batch, vllm_is_ratio=ratio)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_what_is_refused(batch):
    with pytest.raises(ValueError, match=r"loss_type must be one of .* got 'luspo'"):
        FusedLinearGRPOLoss(loss_type="luspo")
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        FusedLinearGRPOLoss(beta=0.1)(**batch)
    logps = torch.zeros(B, T)
    with pytest.raises(ValueError, match="ref_input must be None where ref_per_token_logps are given"):
        FusedLinearGRPOLoss(beta=0.1)(
            **batch, ref_per_token_logps=logps, ref_input=batch["_input"], ref_weight=batch["lin_weight"]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_ref_model": False}, "use_ref_model must be True when beta is not 0; got False with 0.04"),
        (
            {"loss_type": "sapo", "importance_sampling_level": "sequence"},
            "importance_sampling_level must be 'token' with loss_type='sapo'; got 'sequence'",
        ),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "use_bias_correction_kl": True},
            "use_bias_correction_kl must be False with importance_sampling_level='sequence' and a beta",
        ),
        ({"loss_type": "cispo", "delta": 2.0}, "delta must be None with loss_type='cispo'; got 2.0"),
        ({"loss_type": "dr_grpo"}, "max_completion_length must be given with loss_type='dr_grpo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of"),
    ],
)
def test_options_that_do_not_go_together_are_refused_where_the_loss_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**options)


def test_without_a_kl_its_correction_says_nothing(batch):
    options = {"beta": 0.0, "loss_type": "grpo", "importance_sampling_level": "sequence"}
    expected, _ = liger(**options, use_bias_correction_kl=True, use_ref_model=False)(**batch)
    actual, _ = FusedLinearGRPOLoss(**options, use_bias_correction_kl=True)(**batch)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
