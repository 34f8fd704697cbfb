"""Empty paths, flags that are given twice, and the home folder, in the commands with options of their own."""

import runpy
import sys
from pathlib import Path

import pytest

from rlaif_fast import compare
from rlaif_fast.command_parser import CommandParser


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("command", "words", "name"),
    [
        ("compare", ["--config", "FILE", "--output_dir", ""], "--output_dir"),
        ("compare", ["--config", ""], "--config"),
        ("compare", [""], "RUN"),
        ("export", ["RUN", "--out", ""], "--out"),
        ("export", ["", "--out", "DIR"], "RUN"),
        ("data", ["check", "FILE", "--media_root", ""], "--media_root"),
        ("data", ["make", ""], "out"),
        ("video", ["check", "FILE", "--media_root="], "--media_root"),
        ("oracle", ["rank", "FILE", "--output", ""], "--output"),
        ("report.html", [""], "run_dir"),
    ],
)
def test_an_empty_path_is_refused_by_name(command, words, name, monkeypatch, capsys):
    """It stood for the working directory, or was ignored."""
    monkeypatch.setattr(sys, "argv", [command, *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"rlaif_fast.{command}", run_name="__main__")
    assert end.value.code == 2
    assert f"argument {name}: expected a path, got ''" in capsys.readouterr().err


def test_of_a_flag_that_is_given_twice_it_is_told_which_wins(capsys):
    parser = CommandParser()
    rank = parser.add_subparsers().add_parser("rank")
    rank.add_argument("files", nargs="+", type=Path)
    rank.add_argument("--output", type=Path)
    rank.add_argument("--option", action="append")
    rank.add_argument("--full", action="store_true")
    once = ["rank", "a", "b", "--output", "c", "--option", "k=1", "--option", "l=2", "--full", "--full"]
    assert parser.parse_args(once).output == Path("c")
    assert capsys.readouterr().err == ""
    parser = CommandParser()
    parser.add_argument("--fps", type=float, default=2.0)
    assert parser.parse_args(["--fps", "2.0", "--fps=3"]).fps == 3.0
    assert capsys.readouterr().err == "fps: 3.0 (the last of 2 flags)\n"


def test_a_path_after_an_equals_sign_starts_at_home(tmp_path, monkeypatch, capsys):
    """A shell leaves the `~` of `--config=~/FILE`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plan.yaml").write_text("output_dir: ~/out\narms: {a: {algorithm: grpo}}\ntables: {}\n")
    assert compare.main(["--config=~/plan.yaml", "--report_only"]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'out' / 'comparison.md'}\n"
    (tmp_path / "file").touch()
    assert compare.main(["--config=~/plan.yaml", "--output_dir=~/file", "--report_only"]) == 2
    assert capsys.readouterr().err.endswith("file is a file; give a folder\n")
