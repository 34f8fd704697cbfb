"""Streams, threads and graph captures on a simulated GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")
from simulated_gpu import DEVICE, DeviceTensor, simulated_gpu
from simulated_run import make_run

from rlaif_fast import streams
from rlaif_fast.errors import UsageError
from rlaif_fast.policy import loading
from rlaif_fast.rollout import graphs
from rlaif_fast.rollout.graphs import FixedStep
from rlaif_fast.video import ClipStore, decoders
from rlaif_fast.video.base import Clip
from rlaif_fast.video.cache import ClipCache
from rlaif_fast.video.dali import DaliDecoder
from rlaif_fast.video.testing import counter_frames, read_counter, write_video
from rlaif_fast_kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="stands in for a GPU on a machine without one")


CAPTURE = FixedStep._capture  # the simulated GPU has another


@pytest.fixture
def gpu():
    with simulated_gpu():
        yield


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


def test_random_numbers_are_drawn_behind_a_capture_that_failed(gpu, monkeypatch):
    """PyTorch 2.11 marks the generator's state as captured where a capture begins, and leaves it so where it fails."""

    class Generator:
        def __init__(self) -> None:
            self.captured = False

        clone_state = staticmethod(lambda: Generator())

        def graphsafe_set_state(self, other: Generator) -> None:
            self.captured = other.captured

    generator = Generator()

    @contextlib.contextmanager
    def capture(graph, pool, stream, *, capture_error_mode):
        generator.captured = True
        yield
        raise torch.AcceleratorError("operation not permitted when stream is capturing")

    policy = make_run("qwen3_vl").policy
    simulate_captures(monkeypatch, capture)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    assert "not permitted" in graphs.check_graphs(policy)
    assert not generator.captured
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
