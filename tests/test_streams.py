"""Threads that use a GPU beside what is computed, and captures of graphs, which must be alone on it."""

from __future__ import annotations

import threading

from rlaif_fast.streams import capturing, no_captures

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
