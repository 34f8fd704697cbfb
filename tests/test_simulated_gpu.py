"""Training steps on a simulated GPU: nothing mixes host and device, and the host reads it only where a table says so.

The table is in docs/kernels.md ("Where the host waits"); it and the code may not part.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")

from simulated_gpu import DEVICE, DeviceMix, DeviceTensor, counting, put, simulated_gpu

from rlaif_fast import streams
from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.algorithms.group import rank_rollout
from rlaif_fast.algorithms.registry import ALGORITHMS
from rlaif_fast.algorithms.verdicts import Verdicts
from rlaif_fast.comparison.terminal import gpu_count
from rlaif_fast.data.schema import Example
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError
from rlaif_fast.loss import backends, cuda, cuda_rows
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.policy import flash, loading
from rlaif_fast.policy.attention import ATTENTION_BACKENDS
from rlaif_fast.policy.flash import FlashContext
from rlaif_fast.policy.testing import FAMILIES, make_media, make_model, make_policy, make_prompt, words
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout import SamplingParams, graphs, make_sampler
from rlaif_fast.rollout.graphs import STOP_CHECK, FixedStep, GraphSampler
from rlaif_fast.trainer.optimizer import Updater
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.preflight import check_backend
from rlaif_fast.trainer.rl import update_loss
from rlaif_fast.trainer.sft import accumulate
from rlaif_fast.video import ClipStore, decoders
from rlaif_fast.video.base import Clip
from rlaif_fast.video.cache import ClipCache
from rlaif_fast.video.dali import DaliDecoder
from rlaif_fast.video.testing import counter_frames, read_counter, write_video
from rlaif_fast_kernels import launch
from rlaif_fast_kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="stands in for a GPU on a machine without one")

G = 3
MOST_READS = 3  # of an update
CAPTURE = FixedStep._capture  # the simulated GPU has another
TABLE = Path(__file__).parents[1] / "docs" / "kernels.md"


class InOrder:
    name = "in order"

    def rank(self, requests):
        return [Ranking(tuple(range(len(request.responses)))) for request in requests]


@pytest.fixture
def gpu():
    with simulated_gpu():
        yield


def make_run(family: str, **options):
    """A bfloat16 policy on the device with what an update needs, and prompts whose pixels are there already."""
    policy = make_policy(family, model=put(make_model(family, dtype=torch.bfloat16)), **options)
    assert isinstance(policy.head_weight, DeviceTensor) and policy.device.type == "cuda"
    config = TrainConfig(num_generations=G, beta=0.04)
    run = SimpleNamespace(
        config=config,
        policy=policy,
        world=World(),
        algorithm=make_algorithm(config),
        sampler=GraphSampler(policy),
    )
    media = [make_media("a", (2, 4, 4)), make_media("b", (1, 4, 8))]
    media = [on_device(m) for m in media]
    prompts = [make_prompt(family, (media[i],), after=3 + i, seed=i) for i in (0, 0, 1)]
    run.prompts = [
        Prompt(p.input_ids, p.media, example=Example(id=str(i), question="?", answer="!"))
        for i, p in enumerate(prompts)
    ]
    return run


def on_device(media):
    return replace(media, patches=media.patches.to("cuda", torch.bfloat16))


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


def test_steps_are_captured_on_one_stream(gpu, monkeypatch):
    """PyTorch keeps a workspace for each stream that a matmul ran on, and another stream may be of another GPU."""
    policy, used = make_run("qwen3_vl").policy, []

    def capture(graph, pool, stream, *, capture_error_mode):
        assert capture_error_mode == "thread_local"  # threads that prefetch call CUDA meanwhile
        used.append(stream)
        return contextlib.nullcontext()

    simulate_captures(monkeypatch, capture)
    for length in (256, 512):
        assert first_step(policy, length).isfinite().all()
    assert len(used) == 2 and used[0] is used[1] is graphs._stream(DEVICE)
    graphs._stream.cache_clear()


@pytest.mark.parametrize("failures", [1, 2])
def test_a_capture_that_another_thread_broke_is_made_again(failures, gpu, monkeypatch, caplog):
    policy, ended, begun = make_run("qwen3_vl").policy, [], []

    @contextlib.contextmanager
    def capture(graph, pool, stream, *, capture_error_mode):
        begun.append(pool)
        yield
        if len(begun) <= failures:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")

    simulate_captures(monkeypatch, capture)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda _, pool: ended.append(pool), raising=False
    )
    if failures == 1:
        assert first_step(policy, 256).isfinite().all()
    else:
        with pytest.raises(torch.AcceleratorError, match="during capture"):
            first_step(policy, 256)
    assert ended == begun[:failures]  # the allocator does not wait for what failed
    assert caplog.text.count("a decode step is captured once more") == 1
    graphs._stream.cache_clear()


@pytest.mark.parametrize("reason", [torch.OutOfMemoryError("no memory"), ValueError("a read on the host")])
def test_a_capture_fails_by_what_failed_first(reason, gpu, monkeypatch, caplog):
    """Not by the end of the capture, which is broken by then."""
    policy, begun, run = make_run("qwen3_vl").policy, [], FixedStep._run

    @contextlib.contextmanager
    def capture(graph, pool, stream, *, capture_error_mode):
        begun.append(pool)
        try:
            yield
        finally:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")

    def failing(step):
        if begun:
            raise reason
        return run(step)

    simulate_captures(monkeypatch, capture)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)
    monkeypatch.setattr(FixedStep, "_run", failing)
    with pytest.raises(type(reason), match=str(reason)):
        first_step(policy, 256)
    assert len(begun) == 1 and "captured once more" not in caplog.text
    graphs._stream.cache_clear()


def simulate_captures(monkeypatch, capture) -> None:
    """Put `capture` in place of `torch.cuda.graph`; a replay does nothing."""
    monkeypatch.setattr(FixedStep, "_capture", CAPTURE)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))


def first_step(policy, length: int) -> torch.Tensor:
    """The hidden states of a first step of two responses, which captures it."""
    tokens = torch.zeros(2, dtype=torch.int64, device="cuda")
    with torch.no_grad(), policy.evaluating():
        step = FixedStep(policy, 1, 2, length)
        step.begin(np.ones(1, dtype=np.int64))
        return step(tokens, tokens + 1, 0)


@pytest.mark.parametrize("backend", ["sdpa", "flash", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_backend_runs_on_the_device(family, backend, gpu, monkeypatch):
    from test_shared_prefix import TorchVarlen

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


def test_frames_travel_beside_what_is_computed(gpu):
    frames = torch.arange(12, dtype=torch.uint8).view(3, 4)
    moved = streams.used_here(streams.to_device(frames, DEVICE))
    assert isinstance(moved, DeviceTensor) and torch.equal(moved.value, frames)
    assert streams._stream(DEVICE).waits >= 1  # the thread that prefetches waits, nothing that computes does
    streams._stream.cache_clear()


def test_clips_go_from_a_gpu_to_disk_beside_what_is_computed(gpu, tmp_path):
    """On the stream of the computation the copy would wait for a step, and a capture would not wait for the copy."""
    clip = Clip(torch.full((1, 2, 2, 3), 7, dtype=torch.uint8, device=DEVICE), (0.0,), "k", "a.mp4")
    ClipCache(0, tmp_path).put(clip)
    assert streams._stream(DEVICE).waits == 1
    found = ClipCache(0, tmp_path).get("k")
    assert found is not None and (found.frames == 7).all()
    streams._stream.cache_clear()


def test_what_decodes_for_a_gpu_ends_before_its_memory_is_freed(gpu, tmp_path, monkeypatch):
    path = str(write_video(tmp_path / "a.webm", counter_frames(4)))

    class OnTheCpu:
        decode = staticmethod(lambda path, indices: decoders.PyAVDecoder().decode(path, indices))
        unavailable = staticmethod(lambda: None)

    monkeypatch.setitem(decoders.DECODERS, "on the cpu", lambda device: OnTheCpu)
    monkeypatch.setattr(decoders, "_unavailable", lambda name: None)
    frames = decoders.decode_sized(path, [2], (64, 64), DEVICE, "on the cpu")
    assert isinstance(frames, DeviceTensor) and frames.shape == (1, 64, 64, 3)
    assert streams._stream(DEVICE).waits == 1
    if DaliDecoder.unavailable() is None:
        dali = DaliDecoder()
        dali._pipeline, dali.device = dali._build(), DEVICE  # DALI's own memory, here the host's
        run, inside = dali._run, []
        monkeypatch.setattr(dali, "_run", lambda b: inside.append(streams._CAPTURES._inside) or run(b))
        assert [read_counter(frame) for frame in dali.decode(path, [3, 1])] == [3, 1]
        assert streams._stream(DEVICE).waits == 2
        assert inside == [1]  # no graph is captured meanwhile
        dali.close()
    streams._stream.cache_clear()


def test_threads_get_the_gpu_of_the_process(gpu, monkeypatch):
    """The current GPU is a thread's own, so a device without a number would be another one in a new thread."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with ClipStore(device="cuda", isolate=False) as store:
        assert store.device == torch.device("cuda:1")

    def asked(name, device, dtype):
        raise UsageError(f"attention of {device}")

    monkeypatch.setattr(loading, "resolve_attention", asked)
    for device, found in (("auto", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        with pytest.raises(UsageError, match=f"attention of {found}$"):
            loading.load_model(loading.ModelOptions(model="none", device=device))


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
