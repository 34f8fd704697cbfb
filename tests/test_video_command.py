"""`python -m rlaif_fast.video`."""

import json
import pickle
import re
import resource
from types import SimpleNamespace

import pytest
from rich.console import Console

from rlaif_fast.data.__main__ import main as data_command
from rlaif_fast.data.reader import read_examples
from rlaif_fast.oracle.__main__ import main as oracle_command
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.video import FrameSampling, probe
from rlaif_fast.video.__main__ import _vet_all, main
from rlaif_fast.video.refs import Cut, MediaRef
from rlaif_fast.video.testing import counter_frames, write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("v")
    write_video(made / "good.webm", counter_frames(60))
    write_video(made / "tall.mp4", counter_frames(20, 128, 72), codec="libx264")
    data = (made / "good.webm").read_bytes()
    (made / "cut.webm").write_bytes(data[: len(data) // 2])
    rows = [
        {"id": "1", "video": "good.webm", "question": "?", "answer": "a"},
        {"id": "2", "video": "cut.webm", "question": "?", "answer": "a"},
        {"id": "3", "video": "good.webm", "question": "??", "answer": "a"},
        {"id": "4", "videos": ["good.webm", "gone.mp4"], "question": "?", "answer": "a"},
    ]
    (made / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "clean.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return made


def test_probe(folder, capsys):
    assert main(["probe", str(folder / "good.webm"), str(folder / "tall.mp4")]) == 0
    shown = capsys.readouterr().out
    assert "vp9 128x96 yuv420p, 60 frames, 30 fps, 2.00 s; samples 4 at 2 fps" in shown
    assert "h264 72x128" in shown


def test_frames_are_those_of_training(tmp_path, capsys):
    """A run sees 64 frames of a long video, where `check` decoded up to 768, others and their damage too."""
    write_video(tmp_path / "long.webm", counter_frames(600, 64, 64), fps=6)
    assert main(["probe", "--json", str(tmp_path / "long.webm")]) == 0
    run = TrainConfig()
    bounds = {name: getattr(run, name) for name in ("fps", "nframes", "min_frames", "max_frames")}
    expected = FrameSampling(**bounds).sample(probe(tmp_path / "long.webm"))[0]
    assert json.loads(capsys.readouterr().out)["sampled"] == expected


def test_probe_of_a_bad_file(folder, capsys):
    assert main(["probe", str(folder / "good.webm"), str(folder / "cut.webm")]) == 1
    shown = capsys.readouterr().out
    assert "60 frames" in shown
    assert "cut.webm: truncated: the container spans" in shown


def test_probe_as_json(folder, capsys):
    assert main(["probe", "--json", str(folder / "good.webm"), str(folder / "cut.webm")]) == 1
    good, bad = map(json.loads, capsys.readouterr().out.splitlines())
    assert (good["codec"], good["frames"], len(good["timestamps"])) == ("vp9", 60, 60)
    assert bad["error"].startswith("truncated")
    assert main(["probe", "--json", "--nframes", "8", str(folder / "good.webm")]) == 0
    asked = json.loads(capsys.readouterr().out)
    assert len(asked["sampled"]) == 8 and len(good["sampled"]) == 4
    assert main(["probe", "--json", "--video_start", "50", str(folder / "good.webm")]) == 0
    assert json.loads(capsys.readouterr().out)["sampled"] is None


@pytest.mark.parametrize(("extra", "frames"), [([], 4), (["--full"], 60), (["--nframes", "8"], 8)])
def test_check_of_a_clean_dataset(folder, capsys, extra, frames):
    assert main(["check", str(folder / "clean.jsonl"), "--workers", "1", *extra]) == 0
    shown = capsys.readouterr().out
    assert "1 good, 0 bad of 1" in shown
    assert "1 of 1 keep all their files; 0 rows are wrong" in shown
    assert f"{frames} frames in" in shown


def test_no_more_processes_are_made_than_there_are_files(folder, capsys):
    """The system ran out of files for them."""
    assert main(["check", str(folder / "clean.jsonl"), "--workers", str(10**6)]) == 0
    assert "good, 0 bad" in capsys.readouterr().out


def test_check_keeps_no_times_of_frames(folder):
    """Those of twenty thousand videos of an hour would be 70 GB."""
    media = [MediaRef(str(folder / "good.webm"), cut=Cut(nframes=count)) for count in range(2, 42, 2)]
    options = SimpleNamespace(workers=1, timeout=60.0, full=False)
    vetted = _vet_all(media, FrameSampling(), options, Console())
    assert [result.frames for result in vetted] == list(range(2, 42, 2))
    assert max(len(pickle.dumps(result)) for result in vetted) < 500  # 60 times alone are 540 bytes


def test_check_of_a_mixed_dataset(folder, tmp_path, capsys):
    quarantine = tmp_path / "q.jsonl"
    assert main(["check", str(folder / "mixed.jsonl"), "--quarantine", str(quarantine)]) == 1
    shown = capsys.readouterr().out
    assert "1 good, 2 bad of 3" in shown
    assert "1 x truncated" in shown
    assert "1 x does not exist" in shown
    assert "2 of 4 keep all their files" in shown
    named = {json.loads(line)["path"] for line in quarantine.read_text().splitlines()}
    assert named == {str(folder / "cut.webm"), str(folder / "gone.mp4")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"video_start": 9.0, "video_end": 3.0}, r"video_end: expected more than video_start \(9\), got 3"),
        ({"video_start": 3.0, "video_end": 3.0}, r"expected more than video_start \(3\), got 3"),
        ({"video_end": 0.0}, r"expected more than video_start \(0\), got 0"),
        ({"nframes": 1}, "nframes is 1, and the model sees 2 frames at a time"),
        ({"min_frames": 1, "max_frames": 1}, "max_frames is 1"),
    ],
)
def test_flags_that_fit_no_file_are_refused_once(given, message, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "video": "gone.mp4"}\n' * 3)
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    commands = {
        "check": [str(tmp_path / "rows.jsonl")],
        "probe": ["gone.mp4"],
        "preview": ["gone.mp4", "--out", str(tmp_path / "sheet.png")],
    }
    for command, rest in commands.items():
        assert main([command, *rest, *flags]) == 2
        shown = capsys.readouterr()
        assert re.search(message, shown.err) and not shown.out
    if "nframes" in given:
        groups = tmp_path / "groups.jsonl"
        groups.write_text('{"question": "?", "video": "gone.mp4", "answer": "a", "responses": ["a", "b"]}\n')
        (tmp_path / "gone.mp4").touch()
        assert oracle_command(["rank", str(groups), "--output", str(tmp_path / "out.jsonl"), *flags]) == 2
        assert re.search(f"error: {message}", capsys.readouterr().err)


@pytest.mark.parametrize("flag", ["--min_frames=2", "--max_frames=8"])
def test_bounds_beside_a_number_of_frames_are_refused_where_no_row_has_a_rate(folder, capsys, flag):
    flags = ["--nframes=4", flag]
    for command in (["probe"], ["preview", "--out", str(folder / "sheet.png")]):
        assert main([*command, str(folder / "good.webm"), *flags]) == 2
        assert f"{flag[2:12]}: not read with --nframes" in capsys.readouterr().err
    assert main(["check", str(folder / "clean.jsonl"), *flags]) == 0


def test_preview(folder, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "sheet.png"
    assert main(["preview", str(folder / "good.webm"), "--out", str(out), "--nframes", "12"]) == 0
    assert "12 of 12 sampled frames" in capsys.readouterr().out
    with image.open(out) as sheet:
        assert sheet.width > 1200
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 1000
    assert (
        main(["preview", str(folder / "tall.mp4"), "--out", str(out), "--nframes", "20", "--most", "5"]) == 0
    )
    assert "5 of 20 sampled frames" in capsys.readouterr().out
    odd = tmp_path / r"a$\frac{$.mp4"  # no formula
    odd.symlink_to(folder / "tall.mp4")
    assert main(["preview", str(odd), "--out", str(out)]) == 0, capsys.readouterr().err


def test_a_sheet_that_cannot_be_written_whole_leaves_the_earlier_one(folder, tmp_path, capsys):
    out = tmp_path / "sheet"  # no suffix: PNG, under this very name
    command = ["preview", str(folder / "good.webm"), "--out", str(out)]
    assert main(command) == 0
    before = out.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as on a disk that fills up
    try:
        code = main([*command, "--nframes", "12"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "cannot be written" in capsys.readouterr().err
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("sheet", before)]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["preview", "{}/cut.webm", "--out", "{}/x.png"], 1, "truncated"),
        (["preview", "{}/good.webm", "--out", "{}/none/x.png"], 2, "none does not exist"),
        (["preview", "{}/good.webm", "--out", "{}/x.png", "--fps", "0"], 2, "fps must be positive"),
        (
            ["preview", "{}/good.webm", "--out", "{}/x.png", "--most", "1"],
            2,
            "most: expected 2 or more, got 1",
        ),
        (["check", "{}/none.jsonl"], 2, "none.jsonl"),
        (["check", "{}/clean.jsonl", "--workers", "0"], 2, "workers"),
        (["check", "{}/clean.jsonl", "--shown", "-1"], 2, "shown: expected 0 or more"),
    ],
)
def test_errors_are_one_line(folder, capsys, arguments, code, words):
    assert main([a.format(folder) for a in arguments]) == code
    said = capsys.readouterr().err.strip()
    assert words in said
    assert said.startswith("error: ")
    assert "\n" not in said


def test_check_looks_at_what_each_row_shows(folder, tmp_path, capsys):
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / f"{number}.png")
    pictures = {"video": [f"{number}.png" for number in range(4)], "question": "?", "answer": "a"}
    late = {"video": str(folder / "good.webm"), "video_start": 50, "question": "?", "answer": "a"}
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(pictures) + "\n")
    assert main(["check", str(data), "--workers", "1"]) == 0
    assert "1 good, 0 bad of 1" in capsys.readouterr().out
    data.write_text(json.dumps(pictures) + "\n" + json.dumps(late) + "\n")
    assert main(["check", str(data), "--workers", "1"]) == 1
    assert "no frames between 50 s" in capsys.readouterr().out
    # the picture at fault is named, not the first of its video
    Image.new("RGB", (8, 8)).save(tmp_path / "2.png")
    data.write_text(json.dumps(pictures) + "\n")
    assert main(["check", str(data), "--workers", "1"]) == 1
    assert f"{tmp_path / '2.png'}: 8x8, but the first picture" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1"])
def test_a_timeout_is_a_time(folder, capsys, seconds):
    assert main(["check", str(folder / "mixed.jsonl"), "--timeout", seconds]) == 2
    assert capsys.readouterr().err.startswith("error: timeout: expected a positive number, got ")


def test_no_command_writes_over_a_medium_of_its_rows(tmp_path, capsys):
    write_video(tmp_path / "clip.mp4", counter_frames(4), codec="mpeg4")
    (tmp_path / "link.png").symlink_to("clip.mp4")
    held = (tmp_path / "clip.mp4").read_bytes()
    rows = str(tmp_path / "rows.jsonl")
    row = {"id": "1", "video": "clip.mp4", "question": "What?", "answer": "a", "responses": ["a", "b"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    over = str(tmp_path / "link.png")
    for command, words in (
        (main, ["check", rows, "--quarantine", over]),
        (data_command, ["preview", rows, over]),
        (oracle_command, ["rank", rows, "--output", over]),
        (oracle_command, ["rank", rows, "--cache", over]),
    ):
        assert command(words) == 2
        assert f"{over} is read, and would be lost" in capsys.readouterr().err
    assert (tmp_path / "clip.mp4").read_bytes() == held


def test_a_tilde_is_the_home_folder_in_every_path(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    row = {"video": "good.webm", "question": "?", "answer": "a", "responses": ["a", "b"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    few = [f"--{split}_clips=1" for split in ("sft", "rl", "validation", "test")]
    for command, words in (
        (main, ["probe", "~/good.webm"]),
        (main, ["preview", "~/good.webm", "--out", "sheet.png"]),
        (main, ["check", "~/clean.jsonl"]),
        (main, ["check", "rows.jsonl", "--media_root=~"]),
        (data_command, ["check", "~/clean.jsonl"]),
        (data_command, ["check", "rows.jsonl", "--media_root=~"]),
        (data_command, ["preview", "~/clean.jsonl", "drawn.png"]),
        (data_command, ["make", "~/made", *few]),
        (oracle_command, ["rank", "rows.jsonl", "--media_root=~"]),
    ):
        assert command(words) == 0, capsys.readouterr().err
    assert (folder / "made" / "test.jsonl").is_file()
    examples = read_examples("rows.jsonl", media_root="~")
    assert [medium.path for medium in examples[0].seen] == [str(folder / "good.webm")]
    assert main(["probe", "~no-such-user/good.webm"]) == 1
    assert "~no-such-user/good.webm: does not exist" in capsys.readouterr().out
