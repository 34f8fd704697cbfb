"""The peers of the benchmarks compute what the benchmarks say: log-probabilities, entropy, gradients.

A peer that cannot run here is skipped with the reason. Those that round the logits to 16 bits err by what the
rounding costs.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import peers
import pytest
import torch
from bench_preference_loss import halves
from benchmarking import Arena, Arm, measure, record
from torch import Tensor

from rlaif_fast import fused_linear_dpo_loss
from rlaif_fast.loss.inputs import Head
from rlaif_fast.loss.reference import linear_logps
from rlaif_fast.loss.reference.logits_loss import selective_log_softmax
from rlaif_fast.loss.testing import relative, relative_l2

B, T, H, V = 4, 16, 128, 512  # what the tiles and alignments of every peer divide
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}  # as the benchmarks run them
VALUE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}  # 2^-8 of logits up to 4, and of the entropy
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_same(
    peer: peers.Peer, expected: peers.Logps, leaves: list[Tensor], wide: list[Tensor], *inputs
) -> None:
    """Compare log-probabilities, entropy and the gradients of a random weighing of both."""
    dtype = leaves[0].dtype
    logps, entropy = peer(*inputs)
    want, want_entropy = (x.flatten() for x in expected)
    g, h = torch.randn(2, want.numel(), device=want.device)
    if logps.dim() == 0:
        want, g = want.mean(), g[0]
    assert relative(logps.flatten(), want.reshape(-1)) <= VALUE[dtype]
    total, want_total = (logps.flatten() * g).sum(), (want * g).sum()
    if entropy is not None:
        assert relative(entropy.flatten(), want_entropy) <= VALUE[dtype]
        total, want_total = total + (entropy.flatten() * h).sum(), want_total + (want_entropy * h).sum()
    assert ("no entropy" in peer.label or "only" in peer.label) == (entropy is None)
    if peer.exact:
        for actual, gradient in zip(
            torch.autograd.grad(total, leaves), torch.autograd.grad(want_total, wide)
        ):
            assert relative_l2(actual, gradient) <= GRADIENT[dtype]


def usable(peer: peers.Peer, device: str) -> torch.dtype:
    """Return the dtype of the comparison; skip where the peer cannot run."""
    reason = peer.refuses(device, DTYPES[device])
    if reason is not None:
        pytest.skip(f"{peer.label}: {reason}")
    return DTYPES[device]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("peer", peers.HEADS, ids=lambda peer: peer.label)
def test_a_head_agrees_with_the_reference(peer: peers.Peer, device: str) -> None:
    dtype = usable(peer, device)
    hidden = torch.randn(B * T, H, device=device, dtype=dtype).requires_grad_()
    weight = (H**-0.5 * torch.randn(V, H, device=device, dtype=dtype)).requires_grad_()
    ids = torch.randint(0, V, (B * T,), device=device)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = linear_logps(wide[0], Head(wide[1], None), ids)
    assert_same(peer, expected, [hidden, weight], wide, hidden, weight, ids)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("peer", peers.LOGITS, ids=lambda peer: peer.label)
def test_log_probs_of_logits_agree_with_the_reference(peer: peers.Peer, device: str) -> None:
    dtype = usable(peer, device)
    logits = (2 * torch.randn(B, T, V, device=device, dtype=dtype)).requires_grad_()
    ids = torch.randint(0, V, (B, T), device=device)
    wide = logits.detach().double().requires_grad_()
    assert_same(peer, selective_log_softmax(wide, ids), [logits], [wide], logits, ids)


def test_ligers_dpo_is_ours():
    """With the reference's head of its own, whose log-probabilities we are given."""
    if (reason := peers.missing("liger-kernel", "liger_kernel.chunked_loss")) is not None:
        pytest.skip(reason)
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    hidden, reference_hidden = torch.randn(2, B, T, H)
    weight, reference_weight = H**-0.5 * torch.randn(2, V, H)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    ids = torch.randint(0, V, (B, T))
    mask = torch.rand(B, T) < 0.7
    reference, _ = linear_logps(reference_hidden, Head(reference_weight, None), ids)
    out = fused_linear_dpo_loss(
        *leaves, ids, mask=mask, ref_logps_sum=(reference * mask).sum(-1), beta=0.3, backend="cpu"
    )
    liger = LigerFusedLinearDPOLoss(beta=0.3, compiled=False)
    theirs = [halves(hidden.detach()).requires_grad_(), weight.detach().clone().requires_grad_()]
    labels = halves(ids.masked_fill(~mask, -100))
    of_reference = {"ref_input": halves(reference_hidden), "ref_weight": reference_weight}
    loss = liger(theirs[1], theirs[0], labels, **of_reference)[0]
    assert relative(out.loss, loss) <= VALUE[torch.float32]
    grads, want = torch.autograd.grad(out.loss, leaves), torch.autograd.grad(loss, theirs)
    assert relative_l2(halves(grads[0]), want[0]) <= GRADIENT[torch.float32]
    assert relative_l2(grads[1], want[1]) <= GRADIENT[torch.float32]


def test_why_a_peer_is_missing_is_said(monkeypatch, tmp_path) -> None:
    assert peers.missing("no-such-thing", "no_such_thing.part") == "no-such-thing is not installed"
    (tmp_path / "half_installed.py").write_text("import a_package_that_it_needs\n")
    (tmp_path / "broken_peer.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = peers.missing("half-installed", "half_installed")
    assert reason is not None and "No module named 'a_package_that_it_needs'" in reason
    with pytest.raises(ZeroDivisionError):
        peers.missing("broken-peer", "broken_peer")


def test_a_peer_that_raises_fails_its_own_arm_only() -> None:
    def broken() -> None:
        raise FloatingPointError("of the peer")

    case = measure({"floor": Arm(lambda: 1), "broken": Arm(broken)}, "floor", "cpu", 0.0, {"absent": "why"})
    assert list(case.results) == ["floor"] and case.results["floor"].seconds
    benchmark = SimpleNamespace(pedantic=lambda *args, **kwargs: None, extra_info={})
    record(benchmark, case, "floor", "none", "1", "cpu")
    with pytest.raises(FloatingPointError, match="of the peer"):
        record(benchmark, case, "broken", "none", "1", "cpu")
    with pytest.raises(pytest.skip.Exception, match="absent: why"):
        record(benchmark, case, "absent", "none", "1", "cpu")


def test_figures_are_written_as_soon_as_a_case_is_measured(tmp_path, monkeypatch):
    path = tmp_path / "figures.jsonl"
    monkeypatch.setenv("RLAIF_FAST_BENCH_LINES", str(path))
    monkeypatch.setattr("benchmarking.SMOKE", True)

    def fails() -> None:
        raise RuntimeError("out of memory")

    arms = {"floor": Arm(lambda: None, flops=6), "other": Arm(fails)}
    Arena().case("a case", lambda: measure(arms, "floor", "cpu", 0.0, {"peer": "not installed"}))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["floor", "other", "peer"]
    assert lines[0]["case"] == "a case" and lines[0]["flops"] == 6 and lines[0]["samples"] >= 1
    assert [line["not_measured"] for line in lines[1:]] == ["RuntimeError: out of memory", "not installed"]
