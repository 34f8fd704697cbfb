"""The smallest run of every stage, and its records."""

from pathlib import Path

import pytest

from rlaif_fast import train as train_module
from rlaif_fast.runs.files import read_jsonl

SMALL = {
    "seed": 5,
    "synthetic_sft_clips": 12,
    "synthetic_rl_clips": 8,
    "synthetic_validation_clips": 4,
    "synthetic_test_clips": 5,
    "sft_steps": 4,
    "sft_videos_per_step": 4,
    "max_steps": 4,
    "videos_per_step": 3,
    "num_generations": 4,
    "eval_steps": 2,
    "gallery_clips": 1,
    "report": "false",
    "tensorboard": "false",
    "num_processes": 1,
    "threads": 1,
}


def in_a_file(values: dict, path: Path) -> list[str]:
    """The words of a command that reads values from a file: keys of a stage that is left out may stand there."""
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items() if value is not None))
    return ["--config", str(path)]


def metrics(folder: Path) -> list[dict]:
    """Everything logged but how long it took."""
    return [{k: v for k, v in row.items() if k != "time"} for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture
def run(tmp_path, cache, capsys):
    """Runs the train command and returns (exit code, run folder, what it wrote to stderr)."""

    def start(name: str = "run", **changes) -> tuple[int, Path, str]:
        folder = tmp_path / name
        values = SMALL | {"output_dir": folder, "cache_dir": cache} | changes
        code = train_module.main(in_a_file(values, tmp_path / f"{name}.yaml"))
        return code, folder, capsys.readouterr().err

    return start


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = SMALL | {"output_dir": folder, "cache_dir": cache, "report": "true", "tensorboard": "true"}
    assert train_module.main([f"--{key}={value}" for key, value in values.items()]) == 0
    return folder
