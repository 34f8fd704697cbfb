"""What is said of errors: of packages that are not installed, the extra that brings them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif_fast.cli import OF_TRAIN
from rlaif_fast.errors import MissingPackage, RlaifFastError, first_line, needed_by

IMPORTED_AS = {"PyYAML": "yaml", "Jinja2": "jinja2", "Pillow": "PIL"}


def without(missing: set[str], module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a Python that has none of `missing`."""
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(missing)!r}))\n"
        f"sys.argv = {['command', *words]!r}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_packages_of_the_extra_are_known() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    extras = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in extras["train"]]
    assert {IMPORTED_AS.get(name, name) for name in names} == OF_TRAIN
    assert any(requirement.startswith("av") for requirement in extras["judge"])


@pytest.mark.parametrize(
    "module", ["train", "evaluate", "data", "video", "oracle", "compare", "plan", "export"]
)
@pytest.mark.parametrize("missing", [OF_TRAIN, OF_TRAIN - {"av"}])
def test_a_command_names_the_extra_that_it_needs(module: str, missing: set[str], tmp_path) -> None:
    words = {
        "train": ["--output_dir", str(tmp_path)],
        "compare": ["--config", str(Path(__file__).parents[1] / "configs" / "compare.yaml"), "--report_only"],
        "evaluate": ["--model", str(tmp_path), "--data", str(tmp_path)],
        "plan": ["tiny"],
        "export": [str(tmp_path), "--out", str(tmp_path / "out")],
        "data": ["make", str(tmp_path / "data")],
        "video": ["probe", str(tmp_path / "a.mp4")],
        "oracle": ["list"],
    }[module]
    done = without(missing, f"rlaif_fast.{module}", *words)
    if missing == OF_TRAIN or module in ("train", "evaluate", "plan", "compare"):
        assert done.returncode != 0
        assert "rlaif-fast[train]" in done.stderr.strip().splitlines()[-1]


def test_doctor_needs_no_extra() -> None:
    done = without(OF_TRAIN, "rlaif_fast.doctor")
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout


@pytest.mark.parametrize("command", ["train", "compare", "plan", "evaluate"])
def test_a_configuration_that_is_not_there_is_looked_for_in_the_package(
    command, tmp_path, monkeypatch, capsys
):
    """Who installed the package without its sources has no folder of that name."""
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(
        "rlaif_fast.plan.__main__" if command == "plan" else f"rlaif_fast.{command}"
    ).main
    assert main(["--config", "configs/tiny.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: config: cannot read configs/tiny.yaml: No such file or directory; the one that"
    )
    assert Path(said.split()[-1]).is_file()
    assert main(["--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: config: cannot read nowhere.yaml: No such file or directory\n"


def test_what_is_missing_is_an_import_error_too() -> None:
    words = r"a test needs nowhere.*rlaif-fast\[train\]"
    with pytest.raises(MissingPackage, match=words) as caught, needed_by("a test", "train"):
        import nowhere  # noqa: F401
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, RlaifFastError)


@pytest.mark.parametrize(
    ("text", "line"), [("\n one\ntwo", "one"), (" \n", "ValueError"), ("", "ValueError")]
)
def test_of_an_error_its_first_line_is_told_or_its_type(text, line):
    assert first_line(ValueError(text)) == line
