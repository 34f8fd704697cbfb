"""What a package holds that is built from the sources and installed elsewhere, not run in the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "csrc",
    "kernels",
    "configs",
    "rlaif_fast",
)
LEFT_OUT = shutil.ignore_patterns("__pycache__", "_C*", "*.egg-info")


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel without compiling; returns the file."""
    out.mkdir()
    code = f"import setuptools.build_meta as m; print('made', m.build_{kind}({str(out)!r}))"
    environment = os.environ | {"RLAIF_FAST_EXT": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, check=True, capture_output=True)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist of the sources, and a wheel made of it."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in BUILT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_OUT)
        else:
            shutil.copy2(ROOT / name, source)
    sdist = build("sdist", source, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked, build("wheel", unpacked, folder / "wheel")


def files_below(folder: Path, *suffixes: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in suffixes}


def test_the_sources_of_the_extension_are_in_the_sdist(built) -> None:
    unpacked, _ = built
    sources = files_below(ROOT / "csrc", ".h", ".cpp", ".cu")
    assert len(sources) > 10
    assert files_below(unpacked / "csrc", ".h", ".cpp", ".cu") == sources


def test_every_file_that_is_imported_or_read_is_in_the_wheel(built) -> None:
    _, wheel = built
    expected = {
        f"{package}/{name}"
        for package, folder in (
            ("rlaif_fast", "rlaif_fast"),
            ("rlaif_fast_kernels", "kernels"),
            ("rlaif_fast_configs", "configs"),
        )
        for name in files_below(ROOT / folder, ".py", ".html", ".yaml", ".typed")
    }
    assert len(expected) > 250
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_commands_of_the_wheel_start_away_from_the_checkout(built, tmp_path) -> None:
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = archive.read(name).decode().partition("[console_scripts]\n")[2].partition("\n\n")[0]
    modules = [line.split(" = ")[1].partition(":")[0] for line in scripts.splitlines()]
    assert len(modules) >= 9
    code = (
        "import importlib, sys, rlaif_fast\n"
        f"assert rlaif_fast.__file__.startswith({str(tmp_path)!r}), rlaif_fast.__file__\n"
        "for name in sys.argv[1:]: assert callable(importlib.import_module(name).main)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", code, *modules], cwd=tmp_path, env=environment, check=True)


SOURCES = """
import runpy
import setuptools
import torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", "/usr/local/cuda"
setuptools.setup = lambda **arguments: print(*[file for one in arguments["ext_modules"] or () for file in one.sources])
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize(("kind", "built"), [("1", {".cpp", ".cu"}), ("cpu", {".cpp"}), ("0", set())])
def test_the_extension_is_built_as_asked_where_torch_has_cuda(kind, built):
    command, environment = [sys.executable, "-c", SOURCES], os.environ | {"RLAIF_FAST_EXT": kind}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert {Path(file).suffix for file in done.stdout.split()} == built


def test_another_kind_of_extension_is_refused_by_name():
    environment = os.environ | {"RLAIF_FAST_EXT": "yes"}
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "RLAIF_FAST_EXT: expected one of 1, cpu, 0, got 'yes'" in done.stderr
