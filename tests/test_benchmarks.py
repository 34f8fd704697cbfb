"""Published benchmarks: their files as they ship, answers by a tiny policy, judges over HTTP, tables."""

from __future__ import annotations

import csv
import dataclasses
import http.server
import json
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from rlaif_fast import evaluate
from rlaif_fast.data import VOCABULARY
from rlaif_fast.data.benchmarks import BENCHMARKS, read_benchmark
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.evals.answering import likeliest
from rlaif_fast.evals.command import _items, settings_of
from rlaif_fast.evals.grading import RankingGrader, grade_answers, make_grader
from rlaif_fast.evals.identity import asked_digest, model_digest
from rlaif_fast.evals.options import EvaluateConfig, configuration
from rlaif_fast.evals.records import EvalFolder, Record, read_records
from rlaif_fast.evals.tables import as_text, draw_bars, table_of, write_tables
from rlaif_fast.oracle import RankRequest, build_oracle
from rlaif_fast.oracle.grading import Grade, parse_grade
from rlaif_fast.oracle.protocols import MalformedVerdict
from rlaif_fast.policy.tiny import make_tiny, words_of
from rlaif_fast.report.stats import wilson_interval
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.integrity import Manifest, digests, write_manifest
from rlaif_fast.train import dump_config
from rlaif_fast.trainer.datasets import read_file
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.video import ClipStore, FrameSampling
from rlaif_fast.video.refs import Cut, MediaRef
from rlaif_fast.video.testing import counter_frames, write_video

VIDEOMME_ROW = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many candles are on the tree?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    "answer": "C",
}


def put(path: Path, content) -> Path:
    """Write a text, or an object as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", counter_frames(8, 32, 32), codec="mpeg4")


@pytest.fixture
def video(clip, tmp_path):
    """Puts a video of that name, below the folder of the benchmark, and returns its path."""

    def copy(name: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(clip, path))

    return copy


# The files as they ship


def test_videomme_from_parquet_with_subtitles(tmp_path, video):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    second = VIDEOMME_ROW | {"question_id": "001-2", "task_type": "OCR Problems", "answer": "A"}
    missing = VIDEOMME_ROW | {"question_id": "002-1", "videoID": "gone", "duration": "long"}
    (tmp_path / "videomme").mkdir()
    table = pyarrow.Table.from_pylist([VIDEOMME_ROW, second, missing])
    parquet.write_table(table, tmp_path / "videomme/test-00000-of-00001.parquet")
    path = video("data/fFjv93ACGo8.mp4")
    put(
        tmp_path / "subtitle/fFjv93ACGo8.srt",
        '1\n00:00:00,000 --> 00:00:02,000\n<font color="white" size=".72c">Hello there.</font>\n\n'
        "2\n00:00:02,000 --> 00:00:04,000\n3 candles\n\n3\n00:00:04,000 --> 00:00:05,000\n3\n\n"
        "4\n00:00:05,000 --> 00:00:06,000\n2024\nno\n",
    )
    first, _, gone = read_benchmark("videomme", tmp_path)
    example = first.example
    assert (example.id, example.answer, example.category) == ("001-1", "C", "Counting Problem")
    assert example.options == ("One.", "Two.", "Three.", "Four.")
    assert [medium.path for medium in example.seen] == [path] and first.trouble == ""
    assert first.groups == {"duration": "short", "domain": "Knowledge"}
    assert example.asked == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nHow many candles are on the tree?\n"
        "A. One.\nB. Two.\nC. Three.\nD. Four.\nThe best answer is:"
    )
    assert "gone" in gone.trouble and not gone.example.seen
    spoken = read_benchmark("videomme", tmp_path, subtitles=True)
    assert spoken[0].example.asked.startswith(
        "This video's subtitles are listed below:\nHello there.\n3 candles\n3\n2024\nno\nSelect the best answer"
    )
    assert "based on the video and the subtitles." in spoken[0].example.asked
    assert "No subtitles available" in spoken[2].example.asked
    assert len(read_benchmark("videomme", tmp_path, limit=2)) == 2


def test_videomme_from_its_template(tmp_path, video):
    """The file that its authors give for results: one row a video."""
    video("videos/fFjv93ACGo8.mp4")
    shared = {key: VIDEOMME_ROW[key] for key in ("video_id", "duration", "domain", "sub_category", "videoID")}
    questions = [{**VIDEOMME_ROW, "question_id": f"001-{i}", "response": ""} for i in (1, 2, 3)]
    put(tmp_path / "output_test_template.json", [shared | {"questions": questions}])
    assert [item.example.id for item in read_benchmark("videomme", tmp_path)] == ["001-1", "001-2", "001-3"]


@pytest.mark.parametrize(
    ("written", "options"),
    [
        (["A. U.S. army", "B. UK", "C. EU", "D. A. Lincoln"], ("U.S. army", "UK", "EU", "A. Lincoln")),
        (["U.S. army", "UK", "EU", "A. Lincoln"], ("U.S. army", "UK", "EU", "A. Lincoln")),
    ],
)
def test_videomme_options_lose_their_label_and_no_letter_of_their_own(tmp_path, video, written, options):
    video("videos/fFjv93ACGo8.mp4")
    put(tmp_path / "test.json", [VIDEOMME_ROW | {"options": written}])
    (item,) = read_benchmark("videomme", tmp_path)
    assert item.example.options == options


def test_nextqa(tmp_path, video):
    head = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    put(
        tmp_path / "nextqa/test.csv",
        head + "4010069381,369,640,480,how do the two man play,0,6,CH,roll the ball,tap,strum,hit,pat\n"
        "123,10,640,480,what happens,4,1,TN,a,b,c,d,e\n",
    )
    put(tmp_path / "map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    path = video("NExTVideo/1164/4010069381.mp4")
    first, second = read_benchmark("nextqa", tmp_path)
    assert [medium.path for medium in first.example.seen] == [path]
    assert (first.example.id, first.example.answer, first.example.category) == (
        "4010069381_6",
        "A",
        "causal how",
    )
    assert first.example.asked.endswith(
        "E. pat\nAnswer with the option's letter from the given choices directly."
    )
    assert first.groups == {"kind": "causal"} and second.groups == {"kind": "temporal"}
    assert second.example.answer == "E" and "123" in second.trouble


def test_mvbench(tmp_path, video, clip):
    row = {
        "video": "ZS9XR.mp4",
        "question": "What happened?",
        "candidates": ["Put.", "Took."],
        "answer": "Took.",
    }
    put(tmp_path / "json/action_sequence.json", [row | {"start": 0.0, "end": 0.2}])
    put(tmp_path / "json/episodic_reasoning.json", [row | {"video": "friends_s1"}])
    put(tmp_path / "json/state_change.json", [row | {"video": "s.mp4", "start": 0.0, "end": 0.2}])
    video("video/star/Charades_v1_480/ZS9XR.mp4")
    video("video/perception/segment/s.mp4")
    frames = tmp_path / "video/tvqa/frames_fps3_hq/friends_s1"
    for number in (10, 2, 1):
        put(frames / f"{number}.jpg", "")
    sequence, episodes, change = read_benchmark("mvbench", tmp_path)
    assert sequence.example.seen[0].cut == Cut(video_start=0.0, video_end=0.2)
    assert change.example.seen[0].cut == Cut()  # cut already
    assert [Path(p).name for p in episodes.example.seen[0].frames] == ["1.jpg", "2.jpg", "10.jpg"]
    assert sequence.example.asked == (
        "Question:What happened?\nOption:\n(A) Put.\n(B) Took.\nOnly give the best option."
    )
    assert (sequence.example.answer, sequence.example.category) == ("B", "action sequence")


def test_of_two_videos_of_one_name_neither_is_guessed(tmp_path, video):
    row = {
        "video": "video_7.mp4",
        "question": "What happened?",
        "candidates": ["Put.", "Took."],
        "answer": "Put.",
    }
    put(tmp_path / "json/a.json", [row])
    put(tmp_path / "json/b.json", [row | {"video": "video/clevrer/video_7.mp4"}])
    first, _ = video("video/clevrer/video_7.mp4"), video("video/perception/video_7.mp4")
    ambiguous, named = read_benchmark("mvbench", tmp_path)
    assert ambiguous.example.seen == ()
    assert ambiguous.trouble == (
        "2 videos are called 'video_7': video/clevrer/video_7.mp4, video/perception/video_7.mp4"
    )
    assert named.example.seen[0].path == first and not named.trouble
    (tmp_path / "video/perception/video_7.mp4").unlink()
    (tmp_path / "video/perception/video_7.mp4").symlink_to(first)
    linked, _ = read_benchmark("mvbench", tmp_path)
    assert linked.example.seen[0].path == first


def test_mvbench_takes_the_video_of_its_tasks_own_folder(tmp_path, video):
    row = {"video": "video_7.mp4", "question": "What?", "candidates": ["Put. ", "Took."], "answer": "Put. "}
    for task in ("moving_count", "action_count", "action_antonym"):
        put(tmp_path / f"json/{task}.json", [row])
    perception, clevrer = (
        video(f"video/{home}/video_7.mp4") for home in ("perception/videos", "clevrer/video_validation")
    )
    neither, theirs, ours = read_benchmark("mvbench", tmp_path)
    assert [theirs.example.seen[0].path, ours.example.seen[0].path] == [perception, clevrer]
    assert not neither.example.seen and "2 videos are called 'video_7'" in neither.trouble
    assert ours.example.answer == "A" and ours.example.options == ("Put.", "Took.")


def test_folders_behind_links_are_searched(tmp_path, video):
    """As where the videos lie on another disk; a link back to the folder itself ends."""
    row = {"answer": "x", "category_id": 1, "id": 1, "question": "who?", "video_id": 7}
    put(tmp_path / "disk/annotations/test_qa.json", [row])
    video("disk/videos/video7.mp4")
    (tmp_path / "bench").mkdir()
    for name in ("annotations", "videos"):
        (tmp_path / "bench" / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "bench/again").symlink_to(tmp_path / "bench")
    [item] = read_benchmark("msrvtt_qa", tmp_path / "bench")
    assert item.example.seen[0].path == str(tmp_path / "bench/videos/video7.mp4") and not item.trouble


def test_frames_of_mvbench_are_three_a_second_whatever_is_sampled(tmp_path):
    row = {"video": "friends", "question": "What?", "candidates": ["Put.", "Took."], "answer": "Put."}
    put(tmp_path / "json/episodic_reasoning.json", [row | {"start": 4.0, "end": 7.7}])
    frames = tmp_path / "tvqa/frames_fps3_hq/friends"
    frames.mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(frames / f"{number:05d}.png")
    [item] = read_benchmark("mvbench", tmp_path)
    for sampling, numbers in (
        (FrameSampling(fps=1.0), list(range(12, 24))),
        (FrameSampling(nframes=4), [12, 16, 19, 23]),
    ):
        with ClipStore(sampling, isolate=False) as store:
            clip = store.load(item.example.seen[0])
        assert clip.frames[:, 0, 0, 0].tolist() == numbers
        assert clip.timestamps[0] == 4.0


def test_mvbench_cuts_whatever_the_folder_is_called(tmp_path, clip):
    folder = tmp_path / "my_segments"
    row = {"video": "a.mp4", "question": "What?", "candidates": ["Put.", "Took."], "answer": "Put."}
    put(folder / "json/action_sequence.json", [row | {"start": 0.0, "end": 0.2}])
    (folder / "video").mkdir()
    shutil.copy(clip, folder / "video/a.mp4")
    [item] = read_benchmark("mvbench", folder)
    assert item.example.seen[0].cut == Cut(video_start=0.0, video_end=0.2)


def test_msvd_qa_by_its_mapping(tmp_path, video):
    rows = [
        {"answer": "someone", "id": 37203, "question": "who pours liquid?", "video_id": 1301},
        {"answer": "two", "id": 37204, "question": "how many dance?", "video_id": 1302},
    ]
    put(tmp_path / "test_qa.json", rows)
    put(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1301\nxyz_1_2 vid9\n")
    named, numbered = video("YouTubeClips/-4wsuPCjDBc_5_15.avi"), video("YouTubeClips/vid1302.avi")
    first, second = read_benchmark("msvd_qa", tmp_path)
    assert [first.example.seen[0].path, second.example.seen[0].path] == [named, numbered]
    assert (first.example.id, first.example.answer, first.example.category) == ("37203", "someone", "who")
    assert second.example.asked == "how many dance? Answer the question using a single word or phrase."


def test_msrvtt_and_activitynet(tmp_path, video):
    row = {"answer": "man", "category_id": 8, "id": 158581, "question": "who is driving?", "video_id": 7010}
    put(tmp_path / "msrvtt/test_qa.json", [row])
    path = video("msrvtt/TestVideo/video7010.mp4")
    [item] = read_benchmark("msrvtt_qa", tmp_path / "msrvtt")
    assert item.example.seen[0].path == path and item.example.category == "who"
    question = {"question": "does the car park", "video_name": "--abc", "question_id": "v_--abc_1"}
    put(tmp_path / "anet/test_q.json", [question])
    put(tmp_path / "anet/test_a.json", [{"answer": "no", "type": 3, "question_id": "v_--abc_1"}])
    path = video("anet/all_test/v_--abc.mkv")
    [item] = read_benchmark("activitynet_qa", tmp_path / "anet")
    assert item.example.seen[0].path == path
    assert (item.example.category, item.example.answer, item.example.id) == ("yes/no", "no", "v_--abc_1")
    assert item.example.asked.startswith("Does the car park? Answer")


def test_jsonl_keeps_what_its_rows_say(tmp_path, video):
    path = video("a.mp4")
    rows = [{"question": "What moves?", "answer": "a ball", "video": "a.mp4", "category": "motion"}]
    rows += [{"question": "What?", "answer": "x", "video": "gone.mp4"}]
    put(tmp_path / "test.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    first, second = read_benchmark("jsonl", tmp_path)
    assert first.example.seen[0].path == path and first.example.category == "motion"
    assert "gone.mp4" in second.trouble


def test_jsonl_scores_the_part_of_an_answer_that_the_run_does(tmp_path, video):
    whole = "<think>It rolls.</think><answer>a ball</answer>"
    put(
        tmp_path / "bench/test.jsonl",
        {"question": "What moves?", "answer": whole, "video": video("bench/a.mp4")},
    )
    data = str(tmp_path / "bench")
    for scored, answer in (("answer", "a ball"), ("whole", whole)):
        assert read_benchmark("jsonl", data, scored=scored)[0].example.answer == answer
        run = RunDir.create(tmp_path / scored)
        run.config.write_text(dump_config(TrainConfig(scored_answer=scored)))
        (item,) = _items(EvaluateConfig(benchmark="jsonl", data=data, run=str(run.path)))
        assert item.example.answer == answer


def test_jsonl_names_the_tables_that_it_does_not_read(tmp_path, video, caplog):
    row = json.dumps({"question": "What moves?", "answer": "disk", "videos": [str(video)]})
    put(tmp_path / "test.jsonl", row + "\n")
    assert len(read_benchmark("jsonl", tmp_path)) == 1
    assert not caplog.records
    put(tmp_path / "rest.json", f"[{row}]")
    assert len(read_benchmark("jsonl", tmp_path)) == 1
    assert "those of *.jsonl; not read: rest.json" in caplog.text


def test_jsonl_in_a_relative_folder_and_by_name(tmp_path, video, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video("bench/a.mp4")
    video("bench/deep/b.mp4")
    rows = [{"question": "What?", "answer": "x", "video": name} for name in ("a.mp4", "b.mp4", "gone.mp4")]
    rows[1]["video_end"] = 1.0
    put(tmp_path / "bench/test.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    first, second, third = read_benchmark("jsonl", "./bench")
    assert (first.trouble, second.trouble) == ("", "") and "gone.mp4" in third.trouble
    assert [medium.path for medium in first.example.seen] == ["bench/a.mp4"]
    assert second.example.seen == (MediaRef("bench/deep/b.mp4", cut=Cut(video_end=1.0)),)
    assert second.example.videos == ("bench/deep/b.mp4",)


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("videomme", {}, "holds none of"),
        ("videomme", {"test-1.json": [VIDEOMME_ROW, VIDEOMME_ROW]}, "stands twice"),
        ("videomme", {"t.json": [VIDEOMME_ROW | {"answer": "E"}]}, "none of the 4 options"),
        ("videomme", {"t.json": [VIDEOMME_ROW | {"options": "A. x B. y"}]}, "is this the benchmark named"),
        ("msvd_qa", {"test_qa.json": [{"question": "q"}]}, "video_id.*is this the benchmark named"),
        (
            "mvbench",
            {"json/a.json": [{"video": "v", "question": "q", "candidates": ["a", "b"], "answer": "c"}]},
            "none",
        ),
        ("jsonl", {"a.jsonl": '{"question": 5}\n'}, "question"),
        ("activitynet_qa", {"test_q.json": "["}, "test_q.json"),
    ],
)
def test_files_of_another_layout_are_refused(tmp_path, name, files, words):
    for file, content in files.items():
        put(tmp_path / file, content)
    with pytest.raises(UsageError, match=words):
        read_benchmark(name, tmp_path)


def test_a_name_or_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="videomme, msvd_qa"):
        read_benchmark("mme", tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        read_benchmark("videomme", tmp_path / "none")
    with pytest.raises(UsageError, match="nextqa has none"):
        read_benchmark("nextqa", tmp_path, subtitles=True)


# Answers


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    words = set(VOCABULARY) | set(words_of(("A B C D . one two man who is driving ? ball",)))
    return str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", words, seed=3))


@pytest.fixture
def folder(tmp_path, video) -> Path:
    """A Video-MME folder: two videos that can be read, one that is damaged, one that is missing."""
    rows = []
    for number, (name, duration) in enumerate(
        (("one", "short"), ("two", "long"), ("bad", "long"), ("gone", "short"))
    ):
        for turn in (1, 2):
            identity = {"question_id": f"{number}-{turn}", "videoID": name, "duration": duration}
            rows.append(VIDEOMME_ROW | identity | {"answer": "ABCD"[number]})
    put(tmp_path / "bench/test-0.json", rows)
    for name in ("one", "two"):
        video(f"bench/data/{name}.mp4")
    put(tmp_path / "bench/data/bad.mp4", "no video\n" * 50)
    return tmp_path / "bench"


def run(folder, model, out, *more) -> int:
    words = ["--benchmark=videomme", f"--data={folder}", f"--model={model}", f"--output_dir={out}", "--fps=4"]
    length = [] if "--short=false" in more else ["--max_completion_length=4"]
    return evaluate.main([*words, *length, *(word for word in more if word != "--short=false")])


def test_an_evaluation_counts_what_cannot_be_seen_and_goes_on(folder, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, model, out) == 0
    said = capsys.readouterr().out
    assert "question 2-1 is unanswered and counts as wrong: " in said and "duration" in said
    records = {record.id: record for record in read_records(out / "items.jsonl")}
    assert len(records) == 8
    assert [records[f"{n}-1"].prediction is None for n in range(4)] == [False, False, True, True]
    assert "bad.mp4: not a readable video: " in records["2-1"].trouble and "gone" in records["3-1"].trouble
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert rows[0]["n"] == "8" and rows[0]["unanswered"] == "4"
    assert float(rows[0]["accuracy"]) == sum(record.correct for record in records.values()) / 8
    assert (out / "accuracy.png").stat().st_size > 5000
    # Cut off in the middle of a line, it answers what is missing, alike.
    whole = (out / "items.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "items.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert run(folder, model, out) == 0
    assert sorted((out / "items.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())
    # Other settings do not go into the same folder.
    assert run(folder, model, out, "--answering=letter", "--short=false") == 2
    assert "other answering" in capsys.readouterr().err
    # Nor do answers to what the files asked before.
    rows = json.loads((folder / "test-0.json").read_text())
    put(folder / "test-0.json", [rows[0] | {"answer": "D"}, *rows[1:]])
    assert run(folder, model, out) == 2
    assert "an answer to '0-1' that was asked 'How many candles are on the tree?' (right: 'A')" in (
        capsys.readouterr().err
    )


def test_two_evaluations_do_not_write_into_one_folder_at_once(folder, model, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, model, out, "--limit=2") == 0
    before = (out / "items.jsonl").read_bytes()
    with RunDir(out).lock():  # as the other one holds it
        assert run(folder, model, out) == 2
    assert f"output_dir {out} is in use by a run that still goes on" in capsys.readouterr().err
    assert (out / "items.jsonl").read_bytes() == before
    assert run(folder, model, out) == 0


def test_other_weights_do_not_go_into_the_same_folder(folder, model, tmp_path, capsys):
    own = shutil.copytree(model, tmp_path / "own")
    assert run(folder, own, tmp_path / "out", "--limit=2") == 0
    before = (tmp_path / "out/items.jsonl").read_bytes()
    words = set(VOCABULARY) | set(words_of(("A B C D . one two man who is driving ? ball",)))
    other = make_tiny(tmp_path / "other", words, seed=4)
    shutil.copy(other / "model.safetensors", own / "model.safetensors")
    capsys.readouterr()
    assert run(folder, own, tmp_path / "out", "--limit=2") == 2
    assert "holds an evaluation with other weights; give another folder" in capsys.readouterr().err
    assert (tmp_path / "out/items.jsonl").read_bytes() == before


def test_an_evaluation_that_ended_before_its_first_answer_may_begin_with_other_settings(
    folder, model, tmp_path, capsys
):
    assert run(folder, tmp_path / "misspelt", tmp_path / "out", "--limit=2") == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert run(folder, model, tmp_path / "out", "--limit=2") == 0
    assert len(read_records(tmp_path / "out/items.jsonl")) == 2


def test_answers_that_were_scored_otherwise_are_not_gone_on_with(folder, model, tmp_path, capsys):
    """By an earlier version, that is; the first of them did not say how."""
    out = tmp_path / "out"
    assert run(folder, model, out, "--limit=2") == 0
    settings = json.loads((out / "settings.json").read_text())
    for scoring in ({}, {"scoring": settings["scoring"] - 1}):
        earlier = {name: value for name, value in settings.items() if name != "scoring"} | scoring
        put(out / "settings.json", earlier)
        capsys.readouterr()
        assert run(folder, model, out) == 2
        assert "holds an evaluation with other scoring; give another folder" in capsys.readouterr().err
    # Compared with, it is told.
    before = f"--before={out / 'items.jsonl'}"
    assert run(folder, model, tmp_path / "other", "--limit=2", before) == 0
    assert "items.jsonl has other scoring, which is part of the change" in capsys.readouterr().err
    put(out / "settings.json", settings)
    assert run(folder, model, tmp_path / "other", "--limit=2", before) == 0
    assert "part of the change" not in capsys.readouterr().err


def test_settings_are_all_that_an_answer_and_its_verdict_depend_on(model):
    """A resumed run can have other rules, and the same best checkpoint."""
    options = EvaluateConfig(benchmark="videomme", data="folder", model=model)
    config = configuration(options)
    before = settings_of(options, config)
    for change, name in (
        ({"oracle_options": {"tolerance": 0.1}}, "rules"),
        ({"oracle_options": {"extract": "Answer: (.*)"}}, "rules"),
        ({"system_prompt": "Be brief."}, "system_prompt"),
        ({"max_reasoning_tokens": 8}, "max_reasoning_tokens"),
        ({"dtype": "bfloat16"}, "dtype"),
    ):
        after = settings_of(options, dataclasses.replace(config, **change))
        assert [key for key in after if after[key] != before[key]] == [name]
    unread = {"model": "other", "threshold": 0.5}  # of a judge in training
    assert settings_of(options, dataclasses.replace(config, oracle_options=unread)) == before
    # What could not be read in time is asked again where it has more.
    longer = dataclasses.replace(options, decode_timeout=900.0, decode_workers=8)
    assert (configuration(longer).decode_timeout, configuration(longer).decode_workers) == (900.0, 8)
    assert settings_of(longer, configuration(longer)) == before


def test_what_identifies_a_model(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    seen = {model_digest(str(model))}
    assert model_digest(str(own)) in seen
    write_manifest(own, Manifest(1, digests(own)))
    assert model_digest(str(own)) in seen
    (own / "chat_template.jinja").write_text("other")
    seen.add(model_digest(str(own)))
    put(own / "adapter_model.safetensors", "adapters")
    put(own / "adapter_config.json", {"base_model_name_or_path": str(model), "r": 4})
    seen.add(model_digest(str(own)))
    put(own / "adapter_config.json", {"base_model_name_or_path": "/nonexistent/base", "r": 4})
    seen.add(model_digest(str(own)))
    assert len(seen) == 4 and None not in seen
    assert model_digest("/nonexistent/base") is None


@pytest.mark.parametrize(
    "change",
    [
        {"options": ("One.", "Five.")},
        {"asked": "How many?\nA. One.\nB. Two."},
        {"media": (MediaRef("a.mp4", cut=Cut(video_end=2.0)),)},
        {"media": (MediaRef("b.mp4"),)},
        {"system": "Be brief."},
    ],
)
def test_answers_to_other_options_media_or_cuts_are_refused(change, tmp_path):
    example = Example("x", "How many?", "A", options=("One.", "Two."), media=(MediaRef("a.mp4"),))
    folder = EvalFolder.open(tmp_path / "out", {})
    asked = asked_digest(example)
    folder.add([Record("x", "a.mp4", {}, "How many?", "A", "A", True, asked=asked)])
    folder.refuse_other_questions([example])
    with pytest.raises(UsageError, match="'x' that was asked 'How many\\?' with other options, media, cuts"):
        folder.refuse_other_questions([dataclasses.replace(example, **change)])


def test_what_could_not_be_asked_is_asked_again(folder, model, tmp_path, video, capsys):
    assert run(folder, model, tmp_path / "out") == 0
    video("bench/data/bad.mp4")
    video("bench/data/gone.mp4")
    assert run(folder, model, tmp_path / "out") == 0
    assert all(record.prediction is not None for record in read_records(tmp_path / "out/items.jsonl"))
    assert len(read_records(tmp_path / "out/items.jsonl")) == 8
    put(folder / "data/one.mp4", "other\n")
    assert run(folder, model, tmp_path / "out") == 2
    assert "'0-1' that was asked" in capsys.readouterr().err


def test_nothing_that_can_be_answered_is_an_error(folder, model, tmp_path, capsys):
    for name in ("one", "two"):
        put(folder / f"data/{name}.mp4", "no video\n")
    assert run(folder, model, tmp_path / "out") == 2
    assert "none of the 8 questions could be answered" in capsys.readouterr().err
    shutil.rmtree(folder / "data")
    assert run(folder, model, tmp_path / "new") == 2
    assert "none of the 8 questions can be asked: no video 'one'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge=reference"], "judge: it grades open questions"),
        (["--answering=letter"], "max_completion_length: not read where answering is letter"),
        (["--before=BEFORE"], "before: it holds 1 questions, 0 of them"),
    ],
)
def test_what_no_question_reads_is_refused(folder, tmp_path, words, said, capsys):
    EvalFolder.open(tmp_path / "before", {}).add([record(1, "v", True)])
    words = [word.replace("BEFORE", str(tmp_path / "before/items.jsonl")) for word in words]
    assert run(folder, "no model", tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_choices_alone_have_another_way_to_be_answered(tmp_path, video, capsys):
    row = {"answer": "man", "category_id": 8, "id": 1, "question": "who is driving?", "video_id": 7}
    put(tmp_path / "test_qa.json", [row])
    video("video7.mp4")
    words = ["--benchmark=msrvtt_qa", f"--data={tmp_path}", "--model=m", "--answering=letter"]
    assert evaluate.main(words) == 2
    assert "answering: it is of multiple choice" in capsys.readouterr().err


def test_two_processes_answer_as_one_does(folder, model, tmp_path):
    for out, processes in (("one", 1), ("two", 2)):
        assert (
            run(
                folder,
                model,
                tmp_path / out,
                f"--num_processes={processes}",
                "--answering=letter",
                "--short=false",
            )
            == 0
        )
    first, second = (
        sorted((tmp_path / out / "items.jsonl").read_text().splitlines()) for out in ("one", "two")
    )
    assert first == second


def test_letters_and_likelihoods_are_the_most_likely(folder, model, tmp_path):
    """Against a plain forward pass of the model for every option."""
    from rlaif_fast.evals.options import EvaluateConfig, configuration, load_checkpoint
    from rlaif_fast.trainer import setup

    options = EvaluateConfig(benchmark="videomme", data=str(folder), model=model, fps=4.0)
    config = configuration(options)
    loaded = load_checkpoint(config)
    policy = setup.make_policy(loaded, config)
    items = [item for item in read_benchmark("videomme", folder) if not item.trouble][:4]
    with torch.no_grad(), setup.make_batch_maker(loaded, config) as make_batch:
        prompts = make_batch([item.example for item in items])
        candidates = [
            ["red ball", "two", "a man is driving"],
            ["A", "B"],
            ["ball", "one two", "who"],
            ["two", "two"],
        ]
        places = likeliest(policy, make_batch.encoder, prompts, candidates)
        for prompt, texts, place in zip(prompts, candidates, places):
            means = []
            for text in texts:
                ids = make_batch.encoder.encode_answer(text)[:-1]
                logps = policy.response_logps([prompt], torch.tensor([ids]), torch.tensor([len(ids)]))
                means.append(logps.double().mean().item())
            assert place == int(np.argmax(np.round(means, 5)))
    assert places[3] == 0  # the first of equal ones


class JudgeServer(http.server.BaseHTTPRequestHandler):
    """Says yes where the answer has a word of the reference."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][1]["content"][-1]["text"]
        reference = json.loads(text.split("Reference answer: ")[1].splitlines()[0])
        answer = json.loads(text.split("<answers>\n")[1].splitlines()[0])["text"]
        self.server.seen.append(body)
        if self.server.down:
            self.send_error(400)
            return
        right = reference in answer.split()
        reply = json.dumps({"pred": "yes" if right else "no", "score": 4 if right else 1})
        if "nonsense" in answer:
            reply = "yes, I think"
        content = json.dumps(
            {"choices": [{"message": {"content": reply}, "finish_reason": "stop"}], "usage": {}}
        )
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), JudgeServer)
    server.seen, server.down = [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def request(response, reference="man"):
    return RankRequest("r", "who is driving ?", (response,), reference=reference)


def test_a_judge_grades_answers_over_http(judge):
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    grader = make_grader("api", {"model": "m", "base_url": url, "max_attempts": 1})
    grades = grader.grade([request("a man"), request("a dog"), request("nonsense")])
    assert grades == [Grade(True, 4), Grade(False, 1), None]
    assert all("image" not in json.dumps(body) for body in judge.seen)


def test_reasoning_is_no_part_of_what_is_graded(judge):
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    options = {"model": "m", "base_url": url}
    row = Example("x", "who is driving ?", "man")
    said = ["a man or a dog ? </think> a dog", "<answer>a man</answer>", "final: man is what I say; dog"]
    for extract, expected in ((None, [False, True, True]), (r"; (.*)", [False, True, False])):
        grader = make_grader("api", options | ({} if extract is None else {"extract": extract}))
        grades = grade_answers(grader, [(row, text) for text in said])
        assert [grade.correct for grade in grades] == expected
    shown = [body["messages"][1]["content"][-1]["text"] for body in judge.seen]
    assert not any("think" in text for text in shown)
    with pytest.raises(UsageError, match="judge_options: 'protocol' is of rankings, not of grades"):
        make_grader("api", options | {"protocol": "pairwise"})


@pytest.mark.parametrize(
    "said", ["", " \n", "<think>a man", "<answer>a man</answer><answer>a dog</answer>", "a man </think>"]
)
def test_an_answer_that_says_nothing_is_wrong_and_no_judge_is_asked(judge, said):
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    row = Example("x", "who is driving ?", "man")
    for grader in (make_grader("api", {"model": "m", "base_url": url}), make_grader("reference", {})):
        grades = grade_answers(grader, [(row, "man"), (row, said), (row, "a </think> man")])
        assert [grade.correct for grade in grades] == [True, False, True]
        assert grades[1] == Grade(False, 0)
    assert len(judge.seen) == 2


def test_any_oracle_grades_by_ranking():
    grader = make_grader("reference", {})
    grades = grader.grade([request("man"), request("dog"), request("x", None)])
    assert isinstance(grader, RankingGrader)
    assert grades == [Grade(True, 5), Grade(False, 0), None]


@pytest.mark.parametrize(
    "reply",
    [
        '{"pred": "Yes", "score": 3}',
        '{"pred": "yes"}',
        '{"pred": "yes", "score": 6}',
        '{"pred": "no", "score": 1.5}',
        "yes",
        '{"pred": "yes", "score": true}',
        "{'pred': 'yes', 'score': 4}",
    ],
)
def test_a_grade_is_what_was_declared_or_nothing(reply):
    assert parse_grade('```json\n{"pred": "no", "score": 0}\n```') == Grade(False, 0)
    with pytest.raises(MalformedVerdict):
        parse_grade(reply)


def test_open_answers_are_graded_in_an_evaluation(judge, model, tmp_path, video):
    row = {"answer": "man", "category_id": 8, "id": 1, "question": "who is driving?", "video_id": 7010}
    put(tmp_path / "msrvtt/test_qa.json", [row, row | {"id": 2, "video_id": 9}])
    video("msrvtt/video7010.mp4")
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    words = [
        f"--data={tmp_path / 'msrvtt'}",
        f"--model={model}",
        f"--output_dir={tmp_path / 'out'}",
        "--fps=4",
    ]
    words += ["--judge=api", "--judge_options", json.dumps({"model": "m", "base_url": url})]
    assert evaluate.main(["--benchmark=msrvtt_qa", *words]) == 0
    answered, missing = read_records(tmp_path / "out/items.jsonl")
    assert answered.score in (1, 4) and answered.pred == (answered.score == 4) and missing.pred is None
    assert len(judge.seen) == 1
    # What could not be asked is wrong for the judge too.
    whole = json.loads((tmp_path / "out/summary.json").read_text())["table"][0]
    assert (whole["n"], whole["unanswered"], whole["judged"]) == (2, 1, 1)
    assert whole["judge_score"] == answered.score / 2 and whole["judge_accuracy"] == answered.pred / 2


def test_reasoning_that_does_not_end_is_no_answer(tmp_path, folder, video, judge):
    """Of a model whose template opens it: a right word in it was counted. A letter that is chosen closes nothing.

    Neither is it one for a judge.
    """
    words = set(VOCABULARY) | set(words_of(("A B C D . one two man who is driving ? ball <think> </think>",)))
    thinker = make_tiny(tmp_path / "thinker", words, seed=3)
    template = thinker / "chat_template.jinja"
    text = template.read_text()
    start = "<|im_start|>assistant\n"
    assert text.count(start) == 1
    template.write_text(text.replace(start, start + "<think>\n"))
    row = {"answer": "man", "category_id": 8, "id": 1, "question": "who is driving?", "video_id": 7010}
    video("msrvtt/video7010.mp4")
    options = {"model": "m", "base_url": f"http://127.0.0.1:{judge.server_address[1]}/v1"}
    for turn, out in enumerate(("first", "again", "judged", "told where")):
        put(tmp_path / "msrvtt/test_qa.json", [row])
        words = ["--benchmark=msrvtt_qa", f"--data={tmp_path / 'msrvtt'}", f"--model={thinker}", "--fps=4"]
        if turn >= 2:
            own = options if turn == 2 else options | {"extract": "(.*)"}
            words += ["--judge=api", "--judge_options", json.dumps(own)]
        assert evaluate.main([*words, f"--output_dir={tmp_path / out}", "--max_completion_length=4"]) == 0
        [record] = read_records(tmp_path / out / "items.jsonl")
        assert "</think>" not in record.prediction and not record.correct, turn
        if turn >= 2:
            assert (record.pred, record.score, len(judge.seen)) == (turn == 3, 4 * (turn == 3), turn - 2)
        word = record.prediction if turn == 0 else record.prediction.split()[0]
        row |= {"answer": word}  # what it says on the way
    assert run(folder, thinker, tmp_path / "letters", "--answering=letter", "--short=false") == 0
    records = read_records(tmp_path / "letters/items.jsonl")
    assert any(record.correct for record in records)
    assert all(record.correct == (record.prediction == record.answer) for record in records)


def test_grades_that_a_judge_did_not_give_are_told_and_asked_for_again(judge, model, tmp_path, video, capsys):
    row = {"answer": "man", "category_id": 8, "id": 1, "question": "who is driving?", "video_id": 7010}
    put(tmp_path / "msrvtt/test_qa.json", [row, row | {"id": 2}])
    video("msrvtt/video7010.mp4")
    url = f"http://127.0.0.1:{judge.server_address[1]}/v1"
    words = [f"--data={tmp_path / 'msrvtt'}", f"--model={model}", f"--output_dir={tmp_path / 'out'}"]
    words += ["--benchmark=msrvtt_qa", "--fps=4", "--max_completion_length=4", "--judge=api"]
    words += ["--judge_options", json.dumps({"model": "m", "base_url": url, "max_attempts": 1})]
    judge.down = True
    assert evaluate.main(words) == 1
    said = capsys.readouterr()
    assert "not graded by the judge: 2 answers" in said.out
    assert "judge: api graded none of 2 answers; they are kept" in said.err
    before = read_records(tmp_path / "out/items.jsonl")
    judge.down = False
    assert evaluate.main(words) == 0
    after = read_records(tmp_path / "out/items.jsonl")
    assert all(record.pred is not None and record.score in (1, 4) for record in after)
    assert [dataclasses.replace(record, pred=None, score=None) for record in after] == before
    assert "not graded" not in capsys.readouterr().out


# Tables


def test_a_figure_of_hundreds_of_groups_draws_those_with_the_most_questions(tmp_path):
    records = [record(number, f"v{number}", True, topic=f"t{number // 2}") for number in range(401)]
    lines = table_of(records)
    write_tables(tmp_path, lines, records, "accuracy")
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + len(lines) == 1 + 2 + 201
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.height < 5000


def record(number, video, correct, **groups):
    return Record(
        str(number), video, {"task type": "counting", **groups}, "q", "A", "A" if correct else "B", correct
    )


def test_the_legend_of_the_bars_hides_none_of_them():
    records = [record(number, f"v{number}", True) for number in range(20)]
    figure = Figure(figsize=(9, 2), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, table_of(records, records))
    FigureCanvasAgg(figure).draw()
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["before", "after"]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent().padded(-1))


def test_the_table_counts_what_could_not_be_asked():
    """With a judge too, of whose questions it is; what has options is none."""
    graded = dataclasses.replace(record(0, "v0", True), pred=True, score=4)
    lost = [dataclasses.replace(record(n, f"v{n}", False), prediction=None) for n in (1, 2)]
    [whole, _] = table_of([graded, *lost], for_judge={"0", "1"})
    assert (whole.unanswered, whole.judged, whole.judge_accuracy, whole.judge_score) == (2, 1, 0.5, 2.0)
    head, row, *_ = as_text([whole]).splitlines()
    assert head.split()[:3] == ["n", "unanswered", "accuracy"] and row.split()[:4] == [
        "all",
        "3",
        "2",
        "33.3%",
    ]
    assert "unanswered" not in as_text(table_of([graded]))


def test_the_table_by_hand():
    records = [record(i, f"v{i // 3}", i % 2 == 0, duration="short" if i < 6 else "long") for i in range(9)]
    before = [record(i, f"v{i // 3}", False, duration="x") for i in range(9)]
    lines = {(line.group, line.value): line for line in table_of(records, before)}
    assert [lines[key].n for key in (("all", "all"), ("task type", "counting"), ("duration", "long"))] == [
        9,
        9,
        3,
    ]
    assert lines["all", "all"].accuracy.mean == pytest.approx(5 / 9)
    assert lines["duration", "long"].change.mean == pytest.approx(2 / 3)
    one_video = lines["duration", "long"].accuracy
    assert one_video.low < 0.2 and one_video.high > 0.9  # whatever number of questions
    # Videos: 2, 1, 2 of 3, so no more apart than independent answers would be.
    assert lines["all", "all"].accuracy == wilson_interval(5, 9)
    low, high = lines["all", "all"].change.low, lines["all", "all"].change.high
    assert low < 5 / 9 < high and low == pytest.approx(1 / 3) and high == pytest.approx(2 / 3)
    assert "duration" in as_text(list(lines.values()))
    assert as_text(list(lines.values())).splitlines()[-2].endswith("+66.7            none")  # of one video
    with pytest.raises(UsageError, match="same questions"):
        table_of(records, before[1:])
    with pytest.raises(
        UsageError, match=r"its '0' asked 'q' \(right: 'B'\), this evaluation 'q' \(right: 'A'\)"
    ):
        table_of(records, [dataclasses.replace(before[0], answer="B"), *before[1:]])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--benchmark=videomme", "--model=m"], "--data FOLDER"),
        (["--benchmark=videomme", "--model=m", "--data=d", "--output=o"], "leave output out"),
        (["--benchmark=videomme", "--model=m", "--data=d", "--answering=guess"], "answering"),
        (["--benchmark=videomme", "--model=m", "--data=d", "--limit=0"], "limit"),
        (["--benchmark=videomme", "--model=m", "--data=d", '--judge_options={"a": 1}'], "there is no judge"),
        (
            ["--benchmark=videomme", "--model=m", "--data=d", "--media_root=x"],
            "media_root: a benchmark's media",
        ),
        (
            ["--benchmark=videomme", "--model=m", "--data=d", "--videos_per_step=0"],
            "videos_per_step: expected 1",
        ),
        (
            ["--benchmark=videomme", "--model=m", "--data=d", "--output_dir="],
            "output_dir: expected a name, got ''",
        ),
        (["--model=m", "--data=d", "--videos_per_step=-1"], "videos_per_step: expected 1 or more, got -1"),
        (["--model=m", "--data=d", "--output="], "output: expected a name, got ''"),
        (
            ["--model=m", "--data=d", "--output=/nonexistent/p.jsonl"],
            "output: the folder /nonexistent does not",
        ),
        (["--model=m", "--data=d", "--output=/"], "output: / is a folder"),
        (["--model=m", "--data=d", "--subtitles=true"], "subtitles: only a benchmark"),
        (["--model=m", "--data=d", "--limit=5"], "limit: only a benchmark"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, said, capsys):
    assert evaluate.main(words) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path):
    put(tmp_path / "out/notes.txt", "mine")
    with pytest.raises(UsageError, match="holds no evaluation"):
        EvalFolder.open(tmp_path / "out", {})
    put(tmp_path / "items.jsonl", '{"id": 1}\n')
    with pytest.raises(UsageError, match=r"is not the items\.jsonl"):
        read_records(tmp_path / "items.jsonl")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]\n"])
def test_damaged_settings_are_refused_by_name(tmp_path, content):
    out = EvalFolder.open(tmp_path / "out", {"model": "m"})
    (out.path / "settings.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"settings\.json is damaged"):
        EvalFolder.open(out.path, {"model": "m"})
    put(tmp_path / "file", "x")
    with pytest.raises(UsageError, match="file is a file; give a folder"):
        EvalFolder.open(tmp_path / "file", {})


@pytest.mark.parametrize(
    "content", [b"{\n", b"\xff\xfe\n", b"[]\n", b"\xff\n{", b'{"id": 1, "video": "", "groups": {}}\n']
)
def test_damaged_records_are_refused_by_name_and_kept(tmp_path, content):
    out = EvalFolder.open(tmp_path / "out", {})
    out.add([record(1, "v", True)])
    content = out.items.read_bytes() + content
    out.items.write_bytes(content)
    with pytest.raises(UsageError, match=r"items\.jsonl is not the items\.jsonl of an evaluation"):
        EvalFolder.open(out.path, {})
    with pytest.raises(UsageError, match=r"items\.jsonl is not the items\.jsonl of an evaluation"):
        read_records(out.items)
    assert out.items.read_bytes() == content
    row = dataclasses.asdict(record(1, "v", True)) | {"correct": "yes"}
    with pytest.raises(UsageError, match="'1' is of another type"):
        read_records(put(tmp_path / "typed.jsonl", json.dumps(row) + "\n"))


def made_up_replies(count: int) -> list[tuple[str, str]]:
    """(reply, right letter) as models write to Video-MME's prompt: a letter, with or without its text."""
    draw = random.Random(0)
    forms = (
        "{0}",
        "{0}.",
        "({0})",
        "{0}. {1}",
        "The answer is {0}.",
        "The best answer is: {0}",
        "Answer: {0}",
        "{0}: {1}",
    )
    texts = dict(zip("ABCD", ("One.", "Two.", "Three.", "Four.")))
    letters = [(draw.choice("ABCD"), draw.choice("ABCD")) for _ in range(count)]
    return [(draw.choice(forms).format(said, texts[said]), right) for said, right in letters]


def test_videomme_scores_as_lmms_eval_does(monkeypatch, tmp_path):
    """On 200 made-up replies, through its own functions, where it is installed."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    utils = pytest.importorskip("lmms_eval.tasks.videomme.utils", exc_type=ImportError)
    rules = build_oracle("reference", max_invalid_fraction=None)
    theirs, ours = [], []
    for number, (reply, right) in enumerate(made_up_replies(200)):
        row = VIDEOMME_ROW | {"answer": right, "question_id": str(number)}
        theirs.append(utils.videomme_process_results(row, [reply])["videomme_perception_score"])
        options = tuple(option[3:] for option in row["options"])
        asked = RankRequest("r", row["question"], (reply,), reference=right, options=options)
        ours.append(rules.is_correct(asked, reply))
    score = utils.videomme_aggregate_results(theirs)
    assert 15 < score < 35
    assert 100 * sum(ours) / len(ours) == pytest.approx(score, abs=1e-9)


def test_checkpoints_can_be_chosen_by_a_benchmark(folder):
    name = Path(f"videomme:{folder}")
    with pytest.raises(UsageError, match="2 of 8 questions: no video 'gone'"):
        read_file(name, TrainConfig())
    rows = read_file(name, TrainConfig(on_bad_row="skip"))
    assert [row.id for row in rows] == ["0-1", "0-2", "1-1", "1-2", "2-1", "2-2"]
    assert all(row.asked and row.asked.endswith("The best answer is:") for row in rows)


def test_lmms_eval_gets_the_answers_of_the_policy(folder, model, monkeypatch, tmp_path):
    """Through its own registry and its own kind of request."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    pytest.importorskip("lmms_eval.models", exc_type=ImportError)
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from rlaif_fast.evals.lmms_eval import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    played = registry.get_model_class("rlaif_fast").create_from_arg_string(
        f"pretrained={model},fps=4", {"batch_size": 3, "device": "cpu", "max_batch_size": None}
    )
    items = [item for item in read_benchmark("videomme", folder) if "bad" not in str(item.example.seen)][:4]
    played.task_dict = {"videomme": {"test": [{"path": item.example.seen[0].path} for item in items]}}

    def asked(given, place=0, visuals=lambda doc: [doc["path"]]):
        arguments = (items[place].example.asked, given, visuals, place, "videomme", "test")
        return Instance(
            "generate_until", arguments, place, {"task": "videomme", "doc_id": place, "repeats": 1}
        )

    texts = played.generate_until(
        [asked({"max_new_tokens": 4, "temperature": 0}, place) for place in range(4)]
    )
    assert run(folder, model, tmp_path / "out") == 0
    records = {record.id: record.prediction for record in read_records(tmp_path / "out/items.jsonl")}
    assert texts == [records[item.example.id] for item in items]
    [cut] = played.generate_until([asked({"max_new_tokens": 4, "until": [texts[0].split()[0]]})])
    assert cut == ""
    for size in (0, -3, "auto"):
        with pytest.raises(UsageError, match=f"batch_size: expected 1 or more, got {size!r}"):
            type(played)(str(model), batch_size=size)
    with pytest.raises(UsageError, match="greedily"):
        played.generate_until([asked({"temperature": 0.7})])
    with pytest.raises(UsageError, match="got ndarray"):
        played.generate_until([asked({}, visuals=lambda doc: [np.zeros(3)])])


@pytest.mark.parametrize(
    ("text", "until", "reasons", "expected"),
    [
        ("B\n\nbecause", ["\n\n"], False, "B\n\nbecause"),
        ("Let me see.\n\nThe answer is B", "\n\n", False, "Let me see.\n\nThe answer is B"),
        ("<think>A?\n\nno</think>\n\nB", ["\n\n"], False, "B"),
        ("A?\nno</think>\n\nB\nC", ["\n"], True, "B"),
        ("<think>A?</think>\n<answer>B</answer>", ["\n\n"], False, "B"),
        ("it may be A", ["\n\n"], True, ""),
        ("it may be A", None, False, "it may be A"),
        ("B. because", ["", "."], False, "B"),
    ],
)
def test_lmms_eval_is_told_what_stands_behind_the_reasoning(
    text, until, reasons, expected, monkeypatch, tmp_path
):
    """Its tasks stop at a blank line by default, and that is where reasoning ends and an answer begins."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    pytest.importorskip("lmms_eval.models", exc_type=ImportError)
    from rlaif_fast.evals.lmms_eval import said

    assert said(text, until, reasons=reasons) == expected


def test_every_benchmark_is_named_in_the_help():
    text = evaluate.EvaluateConfig.__doc__ or ""
    assert all(f'"{name}"' in text for name in BENCHMARKS)
    assert os.environ.get("OMP_WAIT_POLICY") == "PASSIVE"
