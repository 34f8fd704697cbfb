"""The configuration as it is saved with a run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from rlaif_fast.data.benchmarks import BENCHMARKS
from rlaif_fast.distributed.launch import under_torchrun
from rlaif_fast.errors import UsageError
from rlaif_fast.machine import cores
from rlaif_fast.policy.loading import resolve_device
from rlaif_fast.trainer.options import TINY_FAMILIES, TrainConfig

PATHS = ("model", "data", "sft_data", "validation_data", "test_data", "media_root", "sft")
OPTION_PATHS = {"model", "path", "cache"}  # of an oracle


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration as saved with the run: absolute paths of what exists, and the number of processes."""
    whole: dict[str, Any] = {name: _whole_path(getattr(config, name)) for name in PATHS}
    whole["cache_dir"] = _whole_path(config.cache_dir, made=True)
    whole["output_dir"] = str(_expanded(config.output_dir))
    whole["oracle_options"] = _whole_paths(config.oracle_options)
    return dataclasses.replace(config, num_processes=process_count(config), **whole)


def process_count(config: TrainConfig) -> int:
    """How many processes the configuration starts on this machine; under torchrun, those that it started."""
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if config.num_processes > 0:
        return config.num_processes
    # Small operators gain nothing from a second thread, so on a CPU a second process halves the step.
    return 2 if cores() > 1 and resolve_device(config.device).type == "cpu" else 1


def _whole_path(value: str | None, *, made: bool = False) -> str | None:
    """A path or a benchmark's path as an absolute one; other words, and what does not exist, unchanged.

    Args:
        value: The path, or another word.
        made: The value is a path, which may be created later.
    """
    if value is None or value in {*TINY_FAMILIES, "synthetic", "auto", "none"}:
        return value
    name, colon, folder = value.partition(":")
    if name not in BENCHMARKS or _expanded(value).exists():
        name, colon, folder = "", "", value
    path = _expanded(folder)
    is_there = path.exists() if not made else not path.is_absolute()
    return f"{name}{colon}{path.resolve()}" if is_there else value


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # an account without a home folder
        raise UsageError(f"{path}: there is no such home folder; set HOME, or give a whole path") from None


def _whole_paths(options: Any) -> Any:
    """The options of an oracle, and of the oracles in it, with absolute paths."""
    if isinstance(options, list):
        return [_whole_paths(option) for option in options]
    if not isinstance(options, dict):
        return options
    found = {name: _whole_paths(value) for name, value in options.items()}
    for name in OPTION_PATHS & found.keys():
        if isinstance(found[name], str):
            found[name] = _whole_path(found[name], made=name == "cache")
    return found
