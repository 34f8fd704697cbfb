"""Training steps on a simulated GPU: nothing mixes host and device, and the host reads it only where a table says so.

The table is in docs/kernels.md ("Where the host waits"); it and the code may not part.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")
from simulated_gpu import DEVICE, DeviceMix, counting, simulated_gpu
from simulated_run import G, make_run

from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.algorithms.group import rank_rollout
from rlaif_fast.algorithms.registry import ALGORITHMS
from rlaif_fast.algorithms.verdicts import Verdicts
from rlaif_fast.comparison.terminal import gpu_count
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError
from rlaif_fast.loss import backends, cuda, cuda_rows
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.policy import flash, loading
from rlaif_fast.policy.attention import ATTENTION_BACKENDS
from rlaif_fast.policy.flash import FlashContext
from rlaif_fast.policy.testing import FAMILIES, words
from rlaif_fast.rollout import SamplingParams, make_sampler
from rlaif_fast.rollout.graphs import STOP_CHECK, FixedStep, GraphSampler
from rlaif_fast.trainer.optimizer import Updater
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.preflight import check_backend
from rlaif_fast.trainer.rl import update_loss
from rlaif_fast.trainer.sft import accumulate
from rlaif_fast.video import decoders
from rlaif_fast_kernels import launch
from rlaif_fast_kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="stands in for a GPU on a machine without one")


MOST_READS = 3  # of an update


TABLE = Path(__file__).parents[1] / "docs" / "kernels.md"


class InOrder:
    name = "in order"

    def rank(self, requests):
        return [Ranking(tuple(range(len(request.responses)))) for request in requests]


@pytest.fixture
def gpu():
    with simulated_gpu():
        yield


def make_updater(run) -> Updater:
    return Updater(
        run.policy.model,
        World(),
        learning_rate=1e-4,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        max_grad_norm=1.0,
        schedule="constant",
        warmup_steps=0,
        total_steps=10,
        min_lr_ratio=0.1,
    )


def sample_and_rank(run):
    """Groups, and the reads that ranking them took."""
    rollout = run.sampler.sample(run.prompts, G, SamplingParams(max_new_tokens=3, seed=3))
    with counting() as reads:
        return rank_rollout(run.prompts, rollout, InOrder(), run.algorithm), reads


def documented() -> dict[str, set[str]]:
    """Call sites of the table, by the part of a step that its rows name."""
    section = TABLE.read_text(encoding="utf-8").split("## Where the host waits")[1].split("\n## ")[0]
    rows: dict[str, set[str]] = {}
    for part, site in re.findall(r"^\| ([a-z ]+) \| `([^`]+)` \|", section, flags=re.M):
        rows.setdefault(part, set()).add(site)
    return rows


def test_a_mix_of_host_and_device_is_refused(gpu):
    x = torch.zeros(3, device="cuda")
    with pytest.raises(DeviceMix, match="host"):
        x + torch.ones(3)
    with pytest.raises(DeviceMix, match="host"):
        torch.stack((x[0], torch.tensor(1.0)))
    assert (x + torch.tensor(1.0)).device.type == "cuda"  # scalars of the host are welcome
    assert (x + torch.ones(3).to("cuda")).device.type == "cuda"


def test_reads_are_counted_by_call_site(gpu):
    x = torch.arange(4, device="cuda")
    with counting() as reads:
        _ = x.tolist(), bool(x[0]), x[1].item(), x.nonzero(), x[x > 1], x.cpu(), x.numpy(force=True)
        _ = x + 1, x.sum(), x[2:]
    kinds = Counter({site.split(": ")[1]: n for site, n in reads.items()})
    assert kinds == {
        "tolist": 1, "item": 2, "nonzero": 1, "mask index": 1, "copy to the host": 1, "numpy": 1
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_supervised_update_waits_for_the_device_where_the_table_says(family, gpu):
    run = make_run(family)
    with make_updater(run) as updater, counting() as reads:
        loss = accumulate(run, run.prompts, [words(k, k) for k in (1, 2, 3)], 0.1)
        norm = updater.step()
    assert loss > 0 and float(norm) > 0
    assert set(reads) == documented()["supervised update"]
    assert reads.total() <= MOST_READS, reads


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_by_rankings_waits_for_the_device_where_the_table_says(family, gpu):
    run = make_run(family)
    run.policy.freeze_reference()
    groups, reads = sample_and_rank(run)
    assert set(reads) == documented()["ranking"]
    with make_updater(run) as updater, counting() as reads:
        stats = update_loss(run, groups, None)
        norm = updater.step()
    assert torch.isfinite(stats["loss"]) and float(norm) > 0
    assert set(reads) == documented()["update"]
    assert reads.total() <= MOST_READS, reads


@pytest.mark.parametrize("fused", [False, True])
def test_a_decode_step_never_waits(fused, gpu, monkeypatch):
    run = make_run("qwen3_vl")
    steps = []
    step = FixedStep.__call__

    def counted(self, *arguments):
        with counting() as reads:
            hidden = step(self, *arguments)
        steps.append(dict(reads))
        return hidden

    monkeypatch.setattr(FixedStep, "__call__", counted)
    longer = STOP_CHECK + 1
    params = SamplingParams(max_new_tokens=longer, min_new_tokens=longer, seed=3)
    with counting() as reads:
        rollout = GraphSampler(run.policy, fused=fused).sample(run.prompts, G, params)
    assert steps == [{}] * STOP_CHECK
    assert set(reads) == documented()["rollout"]
    assert rollout.token_ids.device.type == "cuda"


@pytest.mark.parametrize("backend", ["sdpa", "flash", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_backend_runs_on_the_device(family, backend, gpu, monkeypatch):
    from test_shared_prefix_flash import TorchVarlen

    flash = ATTENTION_BACKENDS["flash"]
    context = lambda row, device: FlashContext(row, device, TorchVarlen())  # noqa: E731
    patched = type(flash)("flash", -1, lambda *_: None, flash.merge, context)
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", patched)
    run = make_run(family, attention_backend=backend)
    answers = torch.tensor([words(3, 0), words(3, 1), words(3, 2)])
    logps = run.policy.response_logps(run.prompts, answers, torch.tensor([3, 1, 2]))
    logps.sum().backward()
    assert logps.device.type == "cuda" and len(logps) == 6
    assert run.policy.embedding.weight.grad.isfinite().all()


def test_what_auto_stands_for_on_a_gpu(gpu, monkeypatch, caplog):
    """Every choice that depends on the device, as a GPU of compute capability 9.0 makes it."""
    hidden = torch.zeros(2, 8, device="cuda", dtype=torch.bfloat16)
    chosen = {op: backends.select(op, "auto", hidden) for op in ("linear_loss", "logits_loss", "rank_loss")}
    assert set(chosen.values()) == {"triton"}
    assert backends.select("rank_penalty", "auto", hidden, G) == "cuda"
    assert "float64" in (cuda.supports("rank_penalty", "cuda", torch.float64, G) or "")
    assert "above" in (cuda.supports("rank_penalty", "cuda", torch.float32, 10_000) or "")
    assert loading.resolve_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert gpu_count() == 3
    assert loading.resolve_device("cuda:2").index == 2
    with pytest.raises(UsageError, match="'cuda:3' was asked for, and torch sees 3 GPUs"):
        loading.resolve_device("cuda:3")
    assert loading.resolve_dtype("auto", DEVICE) == torch.bfloat16
    monkeypatch.setattr(flash, "missing_flash_attn", lambda: "flash-attn is not installed")
    assert loading.resolve_attention("auto", DEVICE, torch.bfloat16)[0] == "sdpa"
    monkeypatch.setattr(flash, "missing_flash_attn", lambda: None)
    assert loading.resolve_attention("auto", DEVICE, torch.bfloat16)[0] == "flash_attention_2"
    assert "float32" in (flash.refuses_kernels(DEVICE, torch.float32) or "")
    monkeypatch.setattr(decoders, "_unavailable", lambda name: f"{name} is not here")
    with caplog.at_level("INFO"):
        assert isinstance(make_sampler(make_run("qwen2_5_vl").policy), GraphSampler)
    assert "captured decode steps equal eager ones" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert flash.refuses_kernels(DEVICE, torch.bfloat16) == "it needs compute capability 8.0"
    assert launch.unavailable() == "needs compute capability 8.0 or later; got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert cuda_rows.unavailable() == "needs compute capability 9.0 or later"
    assert "float32" in (cuda_rows.supports("linear_loss", "cuda", torch.float32, None) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch sees no GPU; use --device cpu"):
        loading.resolve_device("cuda")


def test_a_backend_is_refused_by_the_dtype_of_the_weights(gpu):
    for dtype in ("auto", "bfloat16"):
        check_backend(TrainConfig(backend="cuda", dtype=dtype), DEVICE)
    with pytest.raises(UsageError, match="backend: cuda cannot run here: hidden must be bfloat16 or float16"):
        check_backend(TrainConfig(backend="cuda", dtype="float32"), DEVICE)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_weighs_verdicts_on_the_device(name, gpu):
    algorithm = make_algorithm(TrainConfig(algorithm=name))
    scores, feedback = torch.randn(2, 4, device="cuda"), torch.arange(8, device="cuda").view(2, 4) % 3
    judged = torch.tensor([[True] * 4, [True, True, False, True]]).to("cuda")
    if algorithm.feedback == "scores":
        feedback = feedback.float()
    worth = algorithm.advantages(Verdicts(feedback, judged, torch.ones(2, device="cuda"), scores))
    assert worth.advantages.is_cuda and bool(worth.advantages.any()) and not bool(worth.advantages[1, 2])
