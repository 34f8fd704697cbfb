"""The stages of bench/run_gpu.sh select tests and benchmarks on a GPU machine, whatever these are called today."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "run_gpu.sh"
# A worker of pytest-xdist says so there, and pytest-benchmark then runs nothing.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def dry_run(out: Path, stage: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One stage of the script as it goes without a GPU."""
    environment = {**ENVIRONMENT, "PYTHON": sys.executable, "STAGES": stage, **environment}
    command = ["bash", str(SCRIPT), str(out), "--dry-run"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_gpu_stage_selects_of_every_file_with_a_gpu_test(tmp_path):
    done = dry_run(tmp_path, "gpu_tests")
    log = (tmp_path / "gpu_tests.log").read_text()
    assert done.returncode == 0, log
    files = (ROOT / "tests").glob("test_*.py")
    marked = {path.stem for path in files if re.search(r"mark\.gpu", path.read_text())}
    assert "test_rank_penalty" in marked
    assert set(re.findall(r"^tests/(test_\w+)\.py: [1-9]", log, re.MULTILINE)) == marked


def test_a_stage_out_of_time_says_what_failed_before(tmp_path):
    """Real tests, dealt to processes and interrupted: one fails, the others would run for a minute."""
    tests = tmp_path / "tests"
    tests.mkdir()
    lines = ["import time", "def test_wrong(): assert 1 == 2"]
    lines += [f"def test_{number}(): time.sleep(60)" for number in range(24)]
    (tests / "test_some.py").write_text("\n".join(lines))
    script = SCRIPT.read_text()
    (stage,) = re.findall(r"    (timeout --signal.*) \"\$limit\" \"\$@\"", script)
    (sharded,) = re.findall(r"^sharded\(\).*?^}\n", script, re.MULTILINE | re.DOTALL)
    conftest = ROOT / "tests" / "conftest.py"
    (tests / "conftest.py").write_text(conftest.read_text())
    run = f"set -uo pipefail; collect=(); {sharded} sharded some {tests}"
    done = subprocess.run(
        ["bash", "-c", f'{stage} 20 bash -c "$1"', "_", run],
        env={**ENVIRONMENT, "out": str(tmp_path), "python": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=80,
    )
    assert done.returncode == 124
    assert done.stdout.count("FAILED") == 1 and "test_wrong" in done.stdout


def test_a_stage_that_selects_nothing_fails(tmp_path):
    done = dry_run(tmp_path, "gpu_tests", PYTEST_ADDOPTS="-k no_test_of_this_name")
    assert done.returncode == 1 and re.search(r"gpu_tests +NO TESTS", done.stdout), done.stdout


def test_every_benchmark_stage_selects_a_case_of_the_gpu():
    script = SCRIPT.read_text()
    named = re.findall(r"^run (bench_\w+) \d+ benchmark \1$", script, re.MULTILINE)
    (chosen,) = re.findall(r'--benchmark-only .* -k "([^"]+)"', script)
    assert len(named) == 9
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "pretend_gpu", "-k", chosen]
    path = os.pathsep.join([str(ROOT / "bench"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [*command, "--benchmark-only", *(f"bench/{name}.py" for name in named)],
        env={**ENVIRONMENT, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert set(re.findall(r"^bench/(bench_\w+)\.py::", done.stdout, re.MULTILINE)) == set(named)


def test_the_pretended_gpu_runs_nothing():
    path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "pretend_gpu", "tests/test_recent.py"],
        env={**ENVIRONMENT, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "pretend_gpu: expected --collect-only" in done.stderr


def test_kernels_are_tested_where_no_video_can_be_read():
    """A GPU machine may have torch, Triton and pytest and nothing else; nothing that all tests load needs more."""
    missing = ("av", "jsonargparse", "httpx", "tenacity", "trl", "liger_kernel")
    hide = f"import sys; sys.modules.update(dict.fromkeys({missing})); import pytest; "
    words = ["--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_triton_rank_penalty.py"]
    done = subprocess.run(
        [sys.executable, "-c", hide + f"sys.exit(pytest.main({words}))"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "bench").glob("*.sh"))])
def test_a_script_tells_what_it_does_and_does_nothing(name, tmp_path):
    command = ["bash", str(ROOT / "bench" / name), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=20)
    assert f"bench/{name} " in done.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["fix_torchvision", "sanitize", "step_arms"])
def test_a_program_tells_what_it_does(name):
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--help"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {name}.py")


@pytest.mark.parametrize(
    "command", [["sanitize"], ["tune_rows"], ["step_arms", "cuda", "ours", *"8421", "clip.mp4"]]
)
def test_a_program_for_a_gpu_says_so_without_one(command):
    name, *arguments = command
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / f"{name}.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr.splitlines()[-1]
