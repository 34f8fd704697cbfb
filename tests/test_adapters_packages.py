"""Our losses inside the packages of verl and OpenRLHF themselves, against theirs."""

from __future__ import annotations

import importlib

import pytest
import torch

from rlaif_fast.adapters import openrlhf, parity, verl


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 0, 6, 4])[:, None]).double()
    old = -2.0 * torch.rand(6, 7, generator=generator, dtype=torch.float64)
    new = old + 0.4 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)[:, None].expand(6, 7)
    weights = 0.5 + torch.rand(6, 7, generator=generator, dtype=torch.float64)
    return old, new, advantages, mask, weights


def compared(ours, theirs, new):
    """Both losses and both gradients by the new log-probabilities."""
    results = []
    for loss in (ours, theirs):
        leaf = new.clone().requires_grad_()
        value = loss(leaf)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert results[0][1].abs().sum() > 0


@pytest.fixture(scope="module")
def core_algos():
    pytest.importorskip("verl", reason="verl is not installed")
    return importlib.import_module("verl.trainer.ppo.core_algos")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("info", [{}, {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 11}])
@pytest.mark.parametrize("mode", sorted(verl.LOSS_TYPES))
def test_verls_registry_takes_our_loss_and_it_is_verls(core_algos, batch, mode, info, weighted):
    from verl.workers.config import ActorConfig

    importlib.import_module("rlaif_fast.adapters.verl_plugin")
    ours, theirs = map(core_algos.get_policy_loss_fn, ("rlaif_fast", "vanilla"))
    assert ours is verl.policy_loss
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, clip_ratio_low=0.1, clip_ratio_high=0.3, ppo_mini_batch_size=6,
        ppo_micro_batch_size_per_gpu=6,
    )  # fmt: skip
    config.global_batch_info.update(info)
    old, new, advantages, mask, weights = batch
    more = {"rollout_is_weights": weights} if weighted else {}
    metrics = []

    def by(function):
        def loss(leaf):
            value, found = function(old, leaf, advantages, mask, mode, config, **more)
            metrics.append(found)
            return value

        return loss

    compared(by(ours), by(theirs), new)
    for name in metrics[0]:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5), name


@pytest.fixture(scope="module")
def their_loss():
    try:
        return parity.openrlhf_loss()
    except ModuleNotFoundError as error:
        pytest.skip(f"OpenRLHF's losses cannot be imported: {error}")


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("whole", [{}, {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 11}])
@pytest.mark.parametrize("token_level_loss", [True, False])
def test_our_loss_is_openrlhfs(their_loss, batch, token_level_loss, whole, dual_clip):
    old, new, advantages, mask, _ = batch
    options = {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": dual_clip}
    found = []

    def by(kind):
        function = kind(token_level_loss=token_level_loss, **options)

        def loss(leaf):
            value, clipped, distance, *_ = outputs = function(leaf, old, advantages, mask, **whole)
            assert len(outputs) == 5
            found.append((float(clipped), float(distance)))
            return value

        return loss

    compared(by(openrlhf.PolicyLoss), by(their_loss), new)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("feature", parity.CLIPPED)
def test_the_table_of_verl(core_algos, feature):
    assert max(parity.verl_errors(feature)) < 1e-6


@pytest.mark.parametrize("feature", [name for name in parity.CLIPPED if name != "luspo"])
def test_the_table_of_openrlhf(their_loss, feature):
    assert max(parity.openrlhf_errors(feature)) < 1e-6
