"""No command overwrites what it reads, nor the records of a run."""

import os
from fnmatch import fnmatch

import pytest

from rlaif_fast.errors import UsageError
from rlaif_fast.outputs import RECORDS, check_output
from rlaif_fast.runs.folder import RunDir


@pytest.fixture
def run(tmp_path):
    run = RunDir.create(tmp_path / "run")
    for path in (run.metrics, run.config, run.predictions("final"), run.checkpoints / "index.json"):
        path.write_text("{}\n")
    return run


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "config.yaml", "predictions-final.jsonl", "checkpoints/mine.jsonl", ".rlaif-fast-run"],
)
def test_a_record_of_a_run_is_not_written_over(run, name):
    with pytest.raises(UsageError, match=r"output: .* belongs to the run in .*; choose another place"):
        check_output("output", run.path / name)
    link = run.path.parent / "link"
    link.symlink_to(run.path)
    with pytest.raises(UsageError, match="belongs to the run"):
        check_output("output", link / name)


def test_every_record_is_known(tmp_path):
    run = RunDir(tmp_path)
    written = [path.name for path in vars(run).values() if path.parent == run.path]
    assert len(written) == 10
    assert all(any(fnmatch(name, one) for one in RECORDS) for name in (*written, run.predictions("sft").name))


def test_another_file_in_a_run_is_written(run):
    assert check_output("output", run.path / "mine.jsonl") == run.path / "mine.jsonl"
    (run.path / "mine.jsonl").write_text("")
    assert check_output("output", str(run.path / "mine.jsonl")) == run.path / "mine.jsonl"


@pytest.mark.parametrize("way", ["itself", "relative", "link", "hard link"])
def test_what_is_read_is_not_written_over(tmp_path, monkeypatch, way):
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    path = tmp_path / "other.jsonl"
    if way == "link":
        path.symlink_to(data)
    elif way == "hard link":
        os.link(data, path)
    elif way == "relative":
        monkeypatch.chdir(tmp_path)
        path = "data.jsonl"
    else:
        path = data
    with pytest.raises(UsageError, match=r"out: .* is read, and would be lost"):
        check_output("out", path, [None, data])


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"the folder .* does not exist"):
        check_output("out", tmp_path / "none" / "x.png")
    with pytest.raises(UsageError, match="is a folder; give a file"):
        check_output("out", tmp_path)


@pytest.mark.parametrize(
    "command", ["video check", "video preview", "data preview", "data label", "oracle rank", "evaluate"]
)
def test_every_command_keeps_what_it_reads(tmp_path, capsys, command):
    from rlaif_fast import evaluate
    from rlaif_fast.data.__main__ import main as data
    from rlaif_fast.oracle.__main__ import main as oracle
    from rlaif_fast.video.__main__ import main as video

    path = tmp_path / "rows.jsonl"
    path.write_text('{"video": "a.mp4", "question": "who?", "answer": "she", "responses": ["she", "he"]}\n')
    before, file = path.read_bytes(), str(path)
    call = {
        "video check": lambda: video(["check", file, "--quarantine", file]),
        "video preview": lambda: video(["preview", file, "--out", file]),
        "data preview": lambda: data(["preview", file, file]),
        "data label": lambda: data(["label", file, file, "--predictions", str(tmp_path / "said.jsonl")]),
        "oracle rank": lambda: oracle(["rank", file, "--no_clips", "--output", file]),
        "evaluate": lambda: evaluate.main(["--run", str(tmp_path / "run"), "--data", file, "--output", file]),
    }[command]
    if command == "evaluate":
        RunDir.create(tmp_path / "run")
    assert call() == 2
    if command != "evaluate":  # which looks at the run first
        assert "would be lost; give another file" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_cache_is_not_the_file_that_is_ranked(tmp_path, capsys):
    from rlaif_fast.oracle.__main__ import main

    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "who?", "answer": "she", "responses": ["she", "he"]}\n')
    before = file.read_bytes()
    assert main(["rank", str(file), "--no_clips", "--cache", str(file)]) == 2
    assert "cache: " in capsys.readouterr().err and file.read_bytes() == before
