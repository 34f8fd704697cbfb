"""Published benchmarks: their files as they ship, answers by a tiny policy, judges over HTTP, tables."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from benchmark_parts import VIDEOMME_ROW, put
from PIL import Image

from rlaif_fast import evaluate
from rlaif_fast.data.benchmarks import BENCHMARKS, read_benchmark
from rlaif_fast.errors import UsageError
from rlaif_fast.evals.command import _items
from rlaif_fast.evals.options import EvaluateConfig
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.train import dump_config
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.video import ClipStore, FrameSampling
from rlaif_fast.video.refs import Cut, MediaRef

pytest_plugins = ("benchmark_parts",)


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


def test_hidden_files_are_not_searched(tmp_path, video):
    """Of a Mac (._a.json), of Jupyter, and of a download that goes on."""
    row = {"answer": "x", "category_id": 1, "id": 1, "question": "who?", "video_id": 7}
    put(tmp_path / "test_qa.json", [row])
    put(tmp_path / ".ipynb_checkpoints/test_qa.json", [row, row])
    put(tmp_path / ".cache/videos/video7.mp4", "half")
    whole = video("videos/video7.mp4")
    [item] = read_benchmark("msrvtt_qa", tmp_path)
    assert item.example.seen[0].path == whole and not item.trouble


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


@pytest.mark.parametrize("name", ["msvd_qa", "msrvtt_qa"])
def test_evaluation_packs_name_their_videos(tmp_path, video, name):
    question = {"question": "what is a man on?", "video_name": "video7010", "question_id": "158581"}
    put(tmp_path / "test_q.json", [question])
    put(tmp_path / "test_a.json", [{"answer": "couch", "type": 3, "question_id": "158581"}])
    path = video("videos/all/video7010.mp4")
    [item] = read_benchmark(name, tmp_path)
    assert item.example.seen[0].path == path
    assert (item.example.id, item.example.answer, item.example.category) == ("158581", "couch", "what")


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


def test_jsonl_reads_tsv_and_names_it_beside_others(tmp_path, video, caplog):
    video("a.mp4")
    put(tmp_path / "test.tsv", "question\tanswer\tvideo\nWhat moves?\tdisk\ta.mp4\n")
    [item] = read_benchmark("jsonl", tmp_path)
    assert (item.example.answer, item.trouble) == ("disk", "")
    put(tmp_path / "more.jsonl", json.dumps({"question": "What?", "answer": "x", "video": "a.mp4"}) + "\n")
    [item] = read_benchmark("jsonl", tmp_path)
    assert item.example.answer == "x" and "not read: test.tsv" in caplog.text


def test_jsonl_reads_answers_in_a_file_of_their_own_with_their_questions(tmp_path, video):
    video("all_test/v_B.mp4")
    put(tmp_path / "test_q.json", [{"question": "what moves", "video_name": "B", "question_id": "1"}])
    put(tmp_path / "test_a.json", [{"answer": "disk", "question_id": "1"}])
    [item] = read_benchmark("jsonl", tmp_path)
    assert (item.example.id, item.example.answer, item.trouble) == ("1", "disk", "")


@pytest.mark.parametrize("name", ["msvd_qa", "msrvtt_qa"])
def test_open_questions_in_shards_of_parquet(tmp_path, video, name):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "data").mkdir()
    for number in range(2):
        row = {"id": number, "video_id": 7, "question": "who runs?", "answer": "dog"}
        file = tmp_path / f"data/test-0000{number}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    path = video("videos/vid7.avi" if name == "msvd_qa" else "videos/video7.mp4")
    items = read_benchmark(name, tmp_path)
    assert [(item.example.id, item.example.seen[0].path) for item in items] == [("0", path), ("1", path)]


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


def test_a_folder_of_two_benchmarks_is_refused(tmp_path):
    row = {"answer": "man", "id": 1, "question": "who is driving?", "video_id": 1301}
    put(tmp_path / "MSRVTT-QA/test_qa.json", [row])
    put(tmp_path / "MSVD-QA/test_qa.json", [row | {"id": 2}])
    with pytest.raises(
        UsageError, match=r"holds MSRVTT-QA/test_qa.json, MSVD-QA/test_qa.json; give the folder"
    ):
        read_benchmark("msvd_qa", tmp_path)
    (tmp_path / "MSVD-QA/also").mkdir()
    (tmp_path / "MSVD-QA/also/test_qa.json").symlink_to(tmp_path / "MSVD-QA/test_qa.json")
    assert [item.example.id for item in read_benchmark("msvd_qa", tmp_path / "MSVD-QA")] == ["2"]


def test_a_name_or_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="videomme, msvd_qa"):
        read_benchmark("mme", tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        read_benchmark("videomme", tmp_path / "none")
    with pytest.raises(UsageError, match="nextqa has none"):
        read_benchmark("nextqa", tmp_path, subtitles=True)


def test_every_benchmark_is_named_in_the_help():
    text = evaluate.EvaluateConfig.__doc__ or ""
    assert all(f'"{name}"' in text for name in BENCHMARKS)
    assert os.environ.get("OMP_WAIT_POLICY") == "PASSIVE"
