"""Checkpoints: the weights as an ordinary Hugging Face folder, and what a run needs to go on as if never stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.runs.folder import write_atomically

STATE = "trainer_state.pt"
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class CheckpointIndex:
    """Which folders matter: `last` to resume from, `best` by validation score, `sft` where RL began."""

    last: str | None = None
    best: str | None = None
    sft: str | None = None


class CheckpointStore:
    """The checkpoints of one run. A checkpoint appears whole or not at all: it is written aside and renamed.

    Args:
        folder: RUN/checkpoints.
        processor_files: Preprocessor settings to copy into each checkpoint, by file name.
        read_only: Never write; for the processes of a run besides the first.
    """

    def __init__(self, folder: Path, processor_files: Mapping[str, str], *, read_only: bool = False) -> None:
        self.folder = folder
        self.processor_files = processor_files
        self.read_only = read_only
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def index(self) -> CheckpointIndex:
        """Which checkpoints there are."""
        path = self.folder / "index.json"
        return CheckpointIndex(**json.loads(path.read_text())) if path.exists() else CheckpointIndex()

    def save(self, name: str, model: nn.Module, tokenizer, state: Mapping[str, Any], **roles: bool) -> Path:
        """Write checkpoint `name` and let it play the given roles (`last=True`, `best=True`, `sft=True`).

        Raises:
            RlaifFastError: The disk is full or not writable; the checkpoints written before are untouched.
        """
        target, partial = self.folder / name, self.folder / f".{name}.partial"
        if self.read_only:
            return target
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save_model(partial, model, tokenizer, self.processor_files)
            torch.save(dict(state), partial / STATE)
            _flush(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            self._update_index(**{role: name for role, plays in roles.items() if plays})
        except Exception as error:
            reason = _disk_reason(error)
            if reason is None:
                raise
            self._remove_unlisted()
            raise RlaifFastError(f"cannot write checkpoint {target}: {reason}; free some space") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def mark(self, **roles: str) -> None:
        """Let existing checkpoints play roles, by name."""
        if not self.read_only:
            self._update_index(**roles)

    def path(self, role: str) -> Path:
        """The folder of the checkpoint that plays `role`.

        Raises:
            UsageError: There is none.
        """
        name = getattr(self.index, role)
        if name is None or not (self.folder / name).is_dir():
            raise UsageError(
                f"{self.folder}: no {role!r} checkpoint; the run was stopped before its first one"
            )
        return self.folder / name

    def last_state(self) -> dict[str, Any] | None:
        """The trainer state to resume from; None before the first checkpoint."""
        last = self.index.last
        return None if last is None else load_state(self.folder / last)

    def _update_index(self, **names: str) -> None:
        index = CheckpointIndex(**(asdict(self.index) | names))
        write_atomically(self.folder / "index.json", json.dumps(asdict(index)))
        self._remove_unlisted()

    def _remove_unlisted(self) -> None:
        """Remove the checkpoints that play no role, and what is left of those that were not written to the end."""
        kept = set(asdict(self.index).values())
        for child in self.folder.iterdir():
            if child.is_dir() and child.name not in kept:
                shutil.rmtree(child, ignore_errors=True)


def _disk_reason(error: Exception) -> str | None:
    """Why the disk refused, or None for an error of another kind.

    Only Python says it by OSError. safetensors and tokenizers quote the system in errors of their own, and
    torch.save reports where in the file it found itself.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if "(os error " in str(error):
        return str(error)
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return f"{STATE} was not written to its end"
    return None


def _flush(folder: Path) -> None:
    """Have the system put the files of a folder, and their names, on the disk."""
    paths = [*folder.rglob("*"), folder]
    for path in paths if os.name == "posix" else ():  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_model(folder: Path, model: Any, tokenizer, processor_files: Mapping[str, str]) -> None:
    """Write weights (safetensors), config, tokenizer and preprocessor settings; adapters only where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, text in processor_files.items():
        (folder / name).write_text(text)


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint written by `save_model` into a model of the same shape, in place."""
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    saved = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
    model.load_state_dict(saved.state_dict())


def load_state(folder: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint.

    Raises:
        UsageError: The folder holds weights only.
    """
    path = folder / STATE
    if not path.exists():
        raise UsageError(
            f"{folder}: no {STATE}, so a run cannot be resumed from it; pass it as --sft instead"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def read_processor_files(model: str) -> dict[str, str]:
    """The preprocessor settings beside a model, to be kept beside its checkpoints."""
    from transformers.utils import cached_file

    found = {}
    for name in PROCESSOR_FILES:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            found[name] = Path(path).read_text()
    return found
