"""`python -m rlaif_fast.data`: check, make and preview, and the chance level of a dataset."""

import json
import os
import subprocess
import sys
from functools import partial

import av
import numpy as np
import pytest
from published_rows import media_folder, write_rows

from rlaif_fast.data import Example, chance_accuracy, chance_by_category, summarise
from rlaif_fast.data.__main__ import main


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return media_folder(tmp_path_factory.mktemp("media"))


@pytest.fixture
def write(tmp_path):
    return partial(write_rows, tmp_path)


NATIVE = {"video": "a.mp4", "question": "what moves?", "answer": "the cat."}


def example(question, answer, category="c", **metadata):
    return Example(question, question, answer, category=category, metadata=metadata)


def test_chance_is_the_share_of_the_most_frequent_answer():
    rows = [example("q?", answer) for answer in ["a"] * 12 + ["b"] * 8] + [example("r?", "b")] * 20
    assert chance_by_category(rows) == {"c": pytest.approx((12 + 20) / 40)}
    assert chance_accuracy(rows) == pytest.approx(0.8)
    assert chance_by_category(rows, reference=[example("q?", "b")] * 20 + [example("r?", "b")] * 20) == {
        "c": pytest.approx((8 + 20) / 40)
    }


def test_chance_joins_rare_wordings():
    rows = [
        example(f"what does {name} do?", "it runs." if i % 4 else "it sits.")
        for i, name in enumerate("abcdefgh")
    ]
    assert chance_by_category(rows) == {"c": 0.75}


def test_chance_compares_facts():
    form = r"the (?:circle|square) is (red|blue)\."
    rows = [
        example(f"{shape}?", f"the {shape} is {color}.", form=form, kind="color")
        for shape, color in [("circle", "red"), ("square", "red"), ("circle", "blue")]
    ]
    assert chance_by_category(rows) == {"c": pytest.approx(2 / 3)}
    assert summarise(rows)[0].max_answer_words == 4


# The command


def test_check_prints_a_table(write, media, capsys):
    path = write(NATIVE, {**NATIVE, "id": "two", "category": "counting problem"})
    assert main(["check", str(path), "--media_root", str(media)]) == 0
    assert main(["check", str(path), "--media_root", str(media), "--shown", "-1"]) == 2
    out = capsys.readouterr().out
    assert "counting problem" in out and "2 questions, all good" in out and "note: 1 questions" in out


def test_rows_without_a_category_are_no_second_total(write, media, capsys):
    """Both were called "all"."""

    def firsts(*rows: dict) -> list[str]:
        assert main(["check", str(write(*rows)), "--media_root", str(media)]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return [line[1] for line in lines if line and line[0] == "│"]

    assert firsts(NATIVE, {**NATIVE, "id": "two", "category": "motion"}) == ["(none)", "motion", "all"]
    assert firsts(NATIVE, {**NATIVE, "id": "two"}) == ["all"]


def test_check_names_wrong_rows_and_bad_files(write, media, capsys):
    path = write(NATIVE, {"question": "x"})
    assert main(["check", str(path), "--media_root", str(media)]) == 2
    assert f"{path}:2:" in capsys.readouterr().err
    bad = media / "bad.mp4"
    bad.write_bytes((media / "a.mp4").read_bytes()[:300])
    path = write(NATIVE, {**NATIVE, "video": "bad.mp4"})
    assert main(["check", str(path), "--media_root", str(media)]) == 1
    err = capsys.readouterr().err
    assert "1 of 2 files cannot be decoded" in err and f"{path}:2: {bad}" in err and "Traceback" not in err
    assert main(["check", str(path), "--media_root", str(media), "--skip_decode"]) == 0


def test_check_refuses_a_video_too_short_to_be_sampled(write, media, capsys):
    """Training and `video check` dropped a clip of one frame that this check called good."""
    with av.open(str(media / "one.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=2)
        stream.width = stream.height = 64
        for frame in (av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8)), None):
            file.mux(stream.encode(frame))
    file = write(NATIVE | {"video": "one.mp4"})
    assert main(["check", str(file), "--media_root", str(media)]) == 1
    assert "one.mp4: holds 1 frame, but 2 are to be sampled" in capsys.readouterr().err


def test_check_takes_a_folder_of_splits_and_tells_what_they_share(tmp_path, media, capsys):
    """As `train --data FOLDER` reads it: every wrong row of every split, and rows that training would leave out."""
    rows = {
        "sft": [{"image": "c.png", "question": "Which?", "answer": "red"}],
        "rl": [{**NATIVE, "video": "b.mp4"}, {"question": "Which?", "answer": "red"}],
        "validation": [{**NATIVE, "video": "b.mp4"}],
        "test": [{**NATIVE, "video": "b.mp4"}],
    }
    for split, lines in rows.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["check", str(tmp_path), "--media_root", str(media)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "note: 1 rl rows are about media of validation or test; training leaves them out" in out
    assert "note: 1 validation rows are about media of test" in out and "sft rows are" not in out
    assert all(f"{tmp_path / split}.jsonl: {len(lines)} rows" in out for split, lines in rows.items())
    (tmp_path / "rl.jsonl").write_text(json.dumps(rows["test"][0]) + "\n")
    assert main(command) == 2
    assert "all 1 rl rows are about media of validation or test" in capsys.readouterr().err
    (tmp_path / "sft.jsonl").write_text('{"question": 1}\n')
    (tmp_path / "test.jsonl").write_text("")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "sft.jsonl:1: question: expected a text, got int" in err and "test.jsonl: no row" in err
    (tmp_path / "val.jsonl").write_text("")
    (tmp_path / "validation.jsonl").unlink()
    assert main(command) == 2
    assert "val.jsonl would not be read" in capsys.readouterr().err


def test_make_then_check_then_preview(tmp_path, capsys):
    out = tmp_path / "made"
    flags = [
        "--sft_clips",
        "4",
        "--rl_clips",
        "1",
        "--validation_clips",
        "1",
        "--test_clips",
        "2",
        "--seed",
        "5",
    ]
    assert main(["make", str(out), *flags]) == 0
    assert "8 clips" in capsys.readouterr().out
    assert main(["make", str(out), *flags]) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(["make", str(out), "--seed", "6"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert main(["check", str(out / "test.jsonl")]) == 0
    assert main(["preview", str(out / "test.jsonl"), str(tmp_path / "sheet.png"), "--clips", "2"]) == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_usage_of_the_command(tmp_path, capsys):
    assert main(["make", str(tmp_path / "x"), "--sft_clpis", "3"]) == 2
    assert "did you mean 'sft_clips'" in capsys.readouterr().err
    assert main(["make"]) == 2
    assert main(["make", str(tmp_path / "x"), "--label_noise", "2"]) == 2
    assert main(["check", str(tmp_path / "none.jsonl")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    for wrong in (["chekc"], ["check"], ["check", "x", "--shwon", "3"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--label_noise", "0.5", "--sft_clips", "0"], "label_noise: not read where sft_clips is 0"),
        (["--label_confusion", "1", "--sft_clips", "0"], "label_confusion: not read where sft_clips is 0"),
        (["--num_options", "2"], "num_options: not read where multiple_choice_fraction is 0"),
        (
            ["--label_confusion", "1", "--multiple_choice_fraction", "1"],
            "label_confusion: not read where multiple_choice_fraction is 1",
        ),
    ],
)
def test_make_refuses_an_option_that_changes_no_file(tmp_path, flags, said, capsys):
    assert main(["make", str(tmp_path / "made"), *flags]) == 2
    assert capsys.readouterr().err == f"error: {said}; leave it out\n"
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8"])
def test_a_terminal_that_lacks_a_letter_gets_its_code(tmp_path, encoding):
    """The command failed where the locale is not UTF-8, and in UTF-8 on a file name that is not."""
    path = tmp_path / "caf\udce9.jsonl"
    row = {"question": "?", "answer": "yes", "category": "形"}
    path.write_text(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "rlaif_fast.data", "check", str(path)]
    there = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run(command, env=there, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ("形" if encoding == "utf-8" else "\\u5f62").encode() in done.stdout
    assert b"caf\\udce9.jsonl: 1 rows, 1 questions, all good" in done.stdout
