"""Going on with a run: the configuration it began with, and the little of it that can still change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlaif_fast.errors import UsageError
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.setup import resolved

CHANGEABLE = (
    "oracle_options",
    "sampler_options",
    "max_invalid_fraction",
    "max_bad_fraction",
    "learning_rate",
    "sft_learning_rate",
    "dtype",
    "num_processes",
    "sharding",
    "sharding_size",
    "optimizer_offload",
    "threads",
    "logging_steps",
    "tensorboard",
    "report_to",
    "report",
    "debug",
    "async_checkpoints",
    "keep_checkpoints",
    "grace_seconds",
)


def saved_config(run_dir: RunDir) -> TrainConfig:
    """The configuration that a run began with, in the folder where it lies now.

    Raises:
        UsageError: There is none, or another version wrote it.
    """
    if not run_dir.config.is_file():
        raise UsageError(f"{run_dir.path} has no {run_dir.config.name}: the run never began; start it again")
    values = yaml.safe_load(run_dir.config.read_text())
    try:
        return TrainConfig(**(values | {"output_dir": str(run_dir.path)}))
    except TypeError as error:
        raise UsageError(f"{run_dir.config} is from another version ({error})") from error


def resumed_config(run_dir: RunDir, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration that a run began with, with what the resuming command changes.

    Args:
        run_dir: The run.
        given: The keys that the command sets; those of `oracle_options` and `sampler_options` are set one by one.

    Raises:
        UsageError: A key differs that must stay, or the number of processes does.
    """
    saved = saved_config(run_dir)
    changes = {name: value for name, value in given.items() if name not in ("resume", "output_dir")}
    for name in ("oracle_options", "sampler_options"):
        if name in changes:
            changes[name] = getattr(saved, name) | changes[name]
    config = resolved(dataclasses.replace(saved, **changes))
    changed = [name for name in changes if getattr(config, name) != getattr(saved, name)]
    fixed = [name for name in changed if name not in (*CHANGEABLE, "max_steps")]
    if config.max_steps < saved.max_steps:
        raise UsageError(
            f"resume: max_steps can be raised to extend a run, and {config.max_steps} is less than {saved.max_steps}"
        )
    if Path(given.get("output_dir", run_dir.path)).resolve() != run_dir.path.resolve():
        fixed.append("output_dir")
    if fixed:
        raise UsageError(
            f"resume: {', '.join(fixed)} cannot change in the middle of a run, leave it out or start a new run; "
            f"what can change is {', '.join(CHANGEABLE)}, and max_steps can be raised"
        )
    if "num_processes" not in changes and saved.num_processes not in (0, config.num_processes):
        raise UsageError(
            f"num_processes: expected the {saved.num_processes} that the run began with, got "
            f"{config.num_processes}; add --num_processes {config.num_processes} to go on with other draws"
        )
    return dataclasses.replace(config, resume=str(run_dir.path))
