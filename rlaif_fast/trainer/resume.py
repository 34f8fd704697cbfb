"""Resuming a run: the configuration it began with, and the few keys that can still change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from rlaif_fast.cli import parse_config
from rlaif_fast.digests import text_digest
from rlaif_fast.errors import RlaifFastError, UsageError, first_line
from rlaif_fast.runs.checkpoint import CheckpointIndex, CheckpointStore
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.integrity import MANIFEST, Damage, Manifest, unseal
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.resolved import resolved
from rlaif_fast.trainer.unread import SUPERVISED, unread

CHANGEABLE = (
    "oracle_options",
    "sampler_options",
    "max_invalid_fraction",
    "max_bad_fraction",
    "decode_workers",
    "decode_timeout",
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
    # Where the data is: rows, metadata and media files must be those that the run began with.
    "data",
    "sft_data",
    "validation_data",
    "test_data",
    "media_root",
)


def saved_config(run_dir: RunDir, tell: Callable[[str], None] = lambda line: None) -> TrainConfig:
    """The configuration that a run began with, in the folder where the run is now.

    If config.yaml has changed since it was written, a checkpoint's copy is used; nothing on disk is changed.

    Args:
        run_dir: The run.
        tell: Gets a line if the copy is used.

    Raises:
        UsageError: There is none, another version wrote it, or it is damaged and no checkpoint has a copy.
    """
    text, vouched = _written(run_dir, tell)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{run_dir.config} is damaged: not YAML ({first_line(error)}); start a new run"
        ) from None
    if not isinstance(values, dict):
        raise UsageError(f"{run_dir.config} is damaged: it holds no keys; start a new run")
    try:
        config = TrainConfig(**(values | {"output_dir": str(run_dir.path)}))
    except TypeError as error:
        raise UsageError(f"{run_dir.config} is from another version ({error})") from error
    except UsageError as error:  # e.g. a truncated number
        raise UsageError(
            f"{run_dir.config} is damaged, or from another version: {error}; start a new run"
        ) from None
    if not vouched:
        _check_values(run_dir, values)
    return config


def _written(run_dir: RunDir, tell: Callable[[str], None]) -> tuple[str, bool]:
    """The text of config.yaml as the run wrote it, and whether a checkpoint vouches for it."""
    text = run_dir.read_config()
    try:
        index = CheckpointStore(run_dir.checkpoints, {}, read_only=True).index
    except (RlaifFastError, TypeError):
        index = CheckpointIndex()  # whatever needs a checkpoint reports the error there
    copies = [copy for name in index.roles.values() if (copy := _copy_in(run_dir, name)) is not None]
    known = index.config_sha256 or (text_digest(copies[0]) if copies else None)
    if text is not None and known in (None, text_digest(text)):
        return text, known is not None
    if copies:
        tell(f"damaged: {run_dir.config} is not as it was written; the checkpoint's copy is used")
        return next((copy for copy in copies if text_digest(copy) == known), copies[0]), True
    if not run_dir.config.is_file():
        raise UsageError(f"{run_dir.path} has no {run_dir.config.name}: the run never began; start it again")
    raise UsageError(f"{run_dir.config} is damaged, and no checkpoint has a copy; start a new run")


def _copy_in(run_dir: RunDir, name: str | None) -> str | None:
    """The configuration in a checkpoint; None if it has none or its manifest is damaged."""
    if name is None:
        return None
    try:
        return Manifest(**unseal(run_dir.checkpoints / name / MANIFEST)).config
    except (Damage, TypeError):
        return None


def _check_values(run_dir: RunDir, values: Mapping[str, Any]) -> None:
    """Refuse a file without a digest if a key is missing or its value is of another type."""
    lacking = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in values]
    if lacking:
        raise UsageError(
            f"{run_dir.config} is damaged, or from another version: it lacks {', '.join(lacking[:4])}; start a new run"
        )
    try:
        parse_config(TrainConfig, [], prog="rlaif_fast.train", description="", under=run_dir.config)
    except UsageError as error:
        raise UsageError(f"{run_dir.config} is damaged: {error}; start a new run") from None


def resumed_config(run_dir: RunDir, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration that a run began with, plus the changes of the resuming command.

    Args:
        run_dir: The run.
        given: The keys that the command sets; those of `oracle_options` and `sampler_options` are set one by one.

    Raises:
        UsageError: A key that must not change differs, or the number of processes does.
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
    if RunDir(given.get("output_dir", run_dir.path)).path.resolve() != run_dir.path.resolve():
        fixed.append("output_dir")
    if fixed:
        raise UsageError(
            f"resume: {', '.join(fixed)} cannot change in the middle of a run, leave it out or start a new run; "
            f"what can change is {', '.join(CHANGEABLE)}, and max_steps can be raised"
        )
    found = unread(config)
    if CheckpointStore(run_dir.checkpoints, {}, read_only=True).index.sft is not None:
        found = dict.fromkeys(SUPERVISED, "supervised fine-tuning is over") | found
    for name in changed:
        if name in found:
            raise UsageError(f"resume: {name} is not read, since {found[name]}; leave it out")
    if "num_processes" not in changes and saved.num_processes not in (0, config.num_processes):
        raise UsageError(
            f"num_processes: expected the {saved.num_processes} that the run began with, got "
            f"{config.num_processes}; add --num_processes {config.num_processes} to go on with other draws"
        )
    return dataclasses.replace(config, resume=str(run_dir.path))
