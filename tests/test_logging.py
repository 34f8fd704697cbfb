"""What a run records and shows: the files, the event files, the bar on a real terminal, the plain lines."""

import io
import json
import logging
import os
import pty
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.logging import PackageLog, RunLogger


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "run")


def _logger(run, **options):
    return RunLogger(run, **{"tensorboard": False, "stream": io.StringIO(), **options})


def test_metrics_are_lines_of_plain_json(run):
    with _logger(run) as logger:
        logger.log("sft", 1, loss=torch.tensor(2.0), accuracy=0.25)
        logger.log("rl", 1, **{"loss/policy": torch.tensor(-0.5), "kl": float("nan")})
        logger.log("eval", 1, phase="rl", split="validation", accuracy=0.5, by_category={})
        first, second, third = read_jsonl(run.metrics)  # already on the disk before the run ends
    assert {key: first[key] for key in ("stage", "step", "loss", "accuracy")} == {
        "stage": "sft",
        "step": 1,
        "loss": 2.0,
        "accuracy": 0.25,
    }
    assert second["loss/policy"] == -0.5 and second["kl"] is None
    assert third["phase"] == "rl" and third["split"] == "validation"
    assert 0 <= first["time"] <= second["time"] <= third["time"]


def test_log_every_thins_steps_but_not_the_last_nor_evaluations(run):
    with _logger(run, log_every=4) as logger, logger.stage("rl", 6):
        for step in range(1, 7):
            logger.log("rl", step, loss=0.0)
        logger.log("eval", 5, phase="rl", split="validation", accuracy=1.0)
    assert [(line["stage"], line["step"]) for line in read_jsonl(run.metrics)] == [
        ("rl", 4),
        ("rl", 6),
        ("eval", 5),
    ]


def test_a_blind_control_is_recorded_at_any_step(run):
    with _logger(run, log_every=4) as logger, logger.stage("rl", 6):
        logger.log("rl", 1, loss=0.0)
        logger.log("rl", 2, **{"oracle/blind_top1": 0.5})
    assert [line["step"] for line in read_jsonl(run.metrics)] == [2]


def test_a_step_that_is_not_recorded_does_not_read_its_tensors(run):
    class Unread:
        def tolist(self):
            raise AssertionError("waited for the device")

    with _logger(run, log_every=2) as logger:
        logger.log("rl", 1, loss=Unread())
        with pytest.raises(AssertionError, match="waited"):
            logger.log("rl", 2, loss=Unread())


def test_rollouts_are_on_the_disk_at_once(run):
    records = [{"example_id": "a", "responses": ["é\n"]}, {"example_id": "b", "responses": []}]
    with _logger(run) as logger:
        logger.rollouts(records)
        assert list(read_jsonl(run.rollouts)) == records


@pytest.mark.parametrize("kind", ["metrics", "rollouts"])
def test_a_disk_that_takes_no_more_is_said_in_one_line(run, kind):
    logger = _logger(run)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(RlaifFastError, match=r"File too large.*--resume") as caught, logger:
            for step in range(1, 9):
                if kind == "metrics":
                    logger.log("rl", step, loss=0.0)
                else:
                    logger.rollouts([{"step": step, "example_id": "a"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert str(getattr(run, kind)) in str(caught.value)
    kept = list(read_jsonl(getattr(run, kind)))  # what was written before is whole, the torn line is left out
    assert [line["step"] for line in kept] == list(range(1, len(kept) + 1)) and kept


def test_timers_do_not_overlap(run):
    with _logger(run, seconds={"decode": 100.0}) as logger:
        begin = time.perf_counter()
        with logger.timer("rollout"):
            time.sleep(0.02)
            with logger.timer("decode"):
                time.sleep(0.04)
            time.sleep(0.02)
        with pytest.raises(KeyError), logger.timer("rollout"):
            raise KeyError
        seconds = logger.seconds()
        elapsed = time.perf_counter() - begin
    assert seconds["decode"] >= 100.04 and seconds["rollout"] >= 0.04
    assert seconds["decode"] - 100 + seconds["rollout"] <= elapsed


def test_plain_lines_come_every_tenth_of_a_stage(run):
    stream = io.StringIO()
    with _logger(run, stream=stream) as logger, logger.stage("rl", 100):
        for step in range(1, 101):
            logger.log("rl", step, loss=1 / step, kl=0.01, kendall_tau=0.5)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("rl  10/100  10% ETA ")
    assert lines[0].endswith("loss 0.1  KL 0.0100  agreement +0.50")
    assert lines[-1].startswith("rl 100/100 100% done")


def test_plain_lines_come_at_least_every_15_seconds(run, monkeypatch):
    clock = iter(range(0, 10_000, 8))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    stream = io.StringIO()
    with _logger(run, stream=stream) as logger, logger.stage("rl", 1000) as advance:
        for step in range(1, 9):
            advance(step)
    assert len(stream.getvalue().splitlines()) == 4


def test_a_resumed_stage_starts_where_it_was(run):
    stream = io.StringIO()
    with _logger(run, stream=stream) as logger, logger.stage("rl", 100, start=85):
        for step in range(86, 101):
            logger.log("rl", step, loss=0.0)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["95/100", "100/100"]


def test_evaluations_are_printed_and_their_accuracy_stays_in_view(run):
    stream = io.StringIO()
    with _logger(run, stream=stream) as logger, logger.stage("rl", 2):
        logger.log("rl", 1, loss=0.5, accuracy=0.25)
        rows = {
            "counting": {"accuracy": 0.5, "n": 4, "correct": 2},
            "action": {"accuracy": 1, "n": 2, "correct": 2},
        }
        logger.log("eval", 1, phase="rl", split="validation", accuracy=4 / 6, by_category=rows)
        logger.log("rl", 2, loss=0.5)
    lines = stream.getvalue().splitlines()
    assert "eval rl step 1, validation: accuracy 0.667 of 6 answers" in lines
    assert "accuracy 0.250  held-out 0.667" in lines[-1]


def test_a_nested_stage_leaves_the_outer_one_alone(run):
    stream = io.StringIO()
    with _logger(run, stream=stream) as logger, logger.stage("rl", 10):
        with logger.stage("eval", 5) as advance:
            for done in range(1, 6):
                advance(done)
        logger.log("eval", 10, phase="rl", split="test", accuracy=0.5)
        assert not any(line.startswith("rl") for line in stream.getvalue().splitlines())


def _events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.tensorboard))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_event_files_follow_the_metrics_through_a_resume(run):
    length = 0
    with _logger(run, tensorboard=True) as logger:
        for step in (1, 2, 3):
            logger.log("rl", step, loss=step / 2)
            length = length if step == 3 else run.metrics.stat().st_size
        rows = {"counting": {"accuracy": 0.25, "n": 4, "correct": 1}}
        logger.log("eval", 3, phase="rl", split="validation", accuracy=0.25, by_category=rows)
    assert _events(run)["rl/loss"] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert _events(run)["eval/rl/validation/accuracy/counting"] == [(3, 0.25)]

    run.truncate_to({run.metrics.name: length})
    with _logger(run, tensorboard=True) as logger:
        logger.log("rl", 3, loss=9.0)
    assert _events(run) == {"rl/loss": [(1, 0.5), (2, 1.0), (3, 9.0)]}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of tensorboard's thread
def test_a_run_goes_on_where_its_event_files_cannot_be_written(run):
    stream = io.StringIO()
    with _logger(run, tensorboard=True, stream=stream) as logger:
        logger.log("rl", 1, loss=1.0)
        shutil.rmtree(run.tensorboard)
        for step in (2, 3, 4):
            logger.log("rl", step, loss=1.0)
    assert stream.getvalue().count("tensorboard: no longer written (FileNotFoundError") == 1
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 3, 4]


def test_time_goes_on_after_a_resume(run):
    with run.metrics.open("w") as file:
        file.write(json.dumps({"time": 500.0, "stage": "rl", "step": 1}) + "\n")
    with _logger(run) as logger:
        logger.log("rl", 2, loss=0.0)
        assert logger.elapsed() > 500.0
    assert 500.0 <= list(read_jsonl(run.metrics))[-1]["time"] < 560.0


def test_missing_tensorboard_is_said_at_once(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="--tensorboard false"):
        _logger(run, tensorboard=True)


def test_markup_in_a_message_is_shown_as_it_is(run):
    stream = io.StringIO()
    with _logger(run, stream=stream) as logger:
        logger.message("see [bold]this[/bold] [/not] path")
    assert stream.getvalue() == "see [bold]this[/bold] [/not] path\n"


SCRIPT = """
import sys, time
from rlaif_fast.runs.logging import RunLogger
from rlaif_fast.runs.folder import RunDir
with RunLogger(RunDir.open(sys.argv[1]), tensorboard=False) as logger, logger.stage("rl", 3):
    for step in (1, 2, 3):
        logger.log("rl", step, loss=0.125, kendall_tau=0.5)
        logger.message(f"message {step}")
        time.sleep(0.3)
"""


LISTENING = SCRIPT.replace(
    "with RunLogger",
    """from rlaif_fast.termination import Termination
termination = Termination(60)
with termination.installed(), termination.saving(lambda: False), RunLogger""",
)


@pytest.mark.parametrize("both", [False, True])
def test_a_pipe_that_nobody_reads_asks_the_run_to_end(run, both):
    """Nothing is raised within a step: the loop ends the run behind it."""
    reader, writer = os.pipe()
    os.close(reader)
    code = LISTENING + "sys.exit(0 if termination.requested else 3)"
    command = [sys.executable, "-c", code, str(run.path)]
    process = subprocess.run(command, stdout=writer, stderr=writer if both else subprocess.PIPE, check=False)
    os.close(writer)
    assert process.returncode == 0
    assert both or b"nothing reads what the run prints any more (broken pipe)\nSIGTERM: " in process.stderr
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 3]


def test_on_a_terminal_there_is_a_bar_and_messages_do_not_tear_it(run):
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(run.path)], stdout=child, env=environment)
    os.close(child)
    output = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # the terminal is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(parent)
    assert process.wait() == 0
    shown = output.decode()
    assert "━" in shown and "3/3" in shown and "ETA" in shown and "loss 0.125" in shown
    for step in (1, 2, 3):
        # Each message stands at the start of a line that was erased, and ends it.
        assert f"\x1b[2Kmessage {step}\r\n" in shown


def test_what_the_package_chose_is_a_line_of_the_run(run):
    """Attention, decode steps and decoders are chosen far from the run's logger, which has to show them."""
    stream, log = io.StringIO(), logging.getLogger("rlaif_fast.policy.attention")
    log.info("before the run")
    with _logger(run, stream=stream) as logger, PackageLog(logger.message):
        log.info("attention: %s equals the reference", "torch_flash")
        log.debug("a detail")
        logging.getLogger("other").warning("of another package")
    log.info("after the run")
    assert stream.getvalue() == "attention: torch_flash equals the reference\n"
