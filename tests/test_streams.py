"""Threads that use a GPU beside what is computed, and captures of graphs, which must be alone on it."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from rlaif_fast import streams
from rlaif_fast.policy.testing import make_model, make_policy, standard_prompts
from rlaif_fast.rollout import SamplingParams
from rlaif_fast.rollout.graphs import GraphSampler
from rlaif_fast.streams import capturing, no_captures
from rlaif_fast.video import decode
from rlaif_fast.video.dali import DaliDecoder
from rlaif_fast.video.testing import counter_frames, read_counter, write_video

SECONDS = 10.0  # until a test gives up
A_MOMENT = 0.1  # in which what must wait would have gone on


def in_thread(block) -> tuple[threading.Thread, threading.Event]:
    """Enter and leave the block in a thread; the event says that it was entered."""
    entered = threading.Event()

    def run() -> None:
        with block():
            entered.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, entered


def test_a_capture_waits_for_threads_that_use_the_gpu_and_keeps_nobody_out_meanwhile():
    with no_captures():
        capture, captured = in_thread(capturing)
        assert not captured.wait(A_MOMENT)
        helper, helped = in_thread(no_captures)  # whom the first may be waiting for, as for DALI's thread
        assert helped.wait(SECONDS)
        helper.join(SECONDS)
        assert not captured.is_set()
    assert captured.wait(SECONDS)
    capture.join(SECONDS)


def test_threads_wait_for_a_capture():
    with capturing():
        others = [in_thread(block) for block in (no_captures, no_captures, capturing)]
        assert not any(entered.wait(A_MOMENT) for _, entered in others)
    for thread, entered in others:
        assert entered.wait(SECONDS)
        thread.join(SECONDS)


def test_a_block_that_fails_lets_the_others_in():
    for block, other in ((capturing, no_captures), (no_captures, capturing)):
        try:
            with block():
                raise ValueError
        except ValueError:
            thread, entered = in_thread(other)
            assert entered.wait(SECONDS)
            thread.join(SECONDS)


def test_a_capture_does_not_wait_for_a_thread_that_never_comes_back(monkeypatch, caplog):
    monkeypatch.setattr(streams, "PATIENCE", A_MOMENT)
    with no_captures():
        capture, captured = in_thread(capturing)
        assert captured.wait(SECONDS)
        capture.join(SECONDS)
    assert caplog.text.count("captured beside threads that have used the GPU for 0.1 s") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(bool(DaliDecoder.unavailable()), reason="needs DALI")
def test_steps_are_captured_while_films_are_decoded(tmp_path, caplog):
    """NVDEC synchronises the device, and makes a decoder for each new size."""
    films = [
        str(write_video(tmp_path / f"{width}.mp4", counter_frames(48, 256, width), codec="libx264"))
        for width in range(256, 512, 32)
    ]
    policy = make_policy("qwen3_vl", model=make_model("qwen3_vl").to("cuda"))
    prompts, ended, seen = standard_prompts("qwen3_vl"), threading.Event(), []

    def decode_until_the_end() -> None:
        for film in itertools.cycle(films):
            if ended.is_set():
                return
            seen.append(read_counter(decode(film, [40], decoder="dali", device="cuda")[0].cpu()))

    threads = [threading.Thread(target=decode_until_the_end, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        rollout = GraphSampler(policy).sample(prompts, 4, SamplingParams(max_new_tokens=3))
        assert rollout.token_ids.is_cuda
    ended.set()
    for thread in threads:
        thread.join(SECONDS)
    assert seen and set(seen) == {40}
    assert "captured once more" not in caplog.text
