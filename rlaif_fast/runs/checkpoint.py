"""Checkpoints: weights as an ordinary Hugging Face folder, and what a run needs to resume as if never stopped."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlaif_fast.digests import text_digest
from rlaif_fast.errors import RlaifFastError, UsageError, refusal, writing
from rlaif_fast.outputs import INDEX, sync, write_atomically
from rlaif_fast.policy.shard import cut_like
from rlaif_fast.policy.weights import (
    ADAPTER_CONFIG,
    check_config,
    load_adapters,
    load_strictly,
    refuse_unlike,
    save_quietly,
)
from rlaif_fast.runs.background import Background, copied, copied_weights
from rlaif_fast.runs.folder import RunDir, is_checkpoint_name
from rlaif_fast.runs.integrity import (
    Damage,
    LogDigests,
    Manifest,
    digests,
    read_manifest,
    sealed,
    unseal,
    write_manifest,
)
from rlaif_fast.runs.sharded import begin_shards, is_sharded, whole_weights, write_shards

STATE = "trainer_state.pt"
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class CheckpointIndex:
    """Which folders matter: `last` to resume from, `best` by validation, `sft` where RL began.

    Attributes:
        last: The newest checkpoint.
        best: The best by validation.
        sft: Where RL began.
        recent: The newest ones, newest first, each with the names of the checkpoints that a run resumed from it needs.
        order: Number of checkpoints written so far.
        config_sha256: Digest of the run's config.yaml.
    """

    last: str | None = None
    best: str | None = None
    sft: str | None = None
    recent: Mapping[str, Sequence[str]] = field(default_factory=dict)
    order: int = 0
    config_sha256: str | None = None

    @property
    def roles(self) -> dict[str, str | None]:
        """Checkpoint names by role."""
        return {"last": self.last, "best": self.best, "sft": self.sft}

    def kept(self) -> set[str]:
        """The names of all checkpoints that the run keeps."""
        needed = [*self.roles.values(), *self.recent, *itertools.chain(*self.recent.values())]
        return {name for name in needed if name is not None}


class CheckpointStore:
    """The checkpoints of one run. A checkpoint appears whole or not at all: it is written elsewhere and then renamed.

    Args:
        folder: RUN/checkpoints.
        processor_files: Preprocessor settings to copy into each checkpoint, by file name.
        read_only: Never write; for all processes of a run but the first.
        run: The run whose records and configuration the manifests cover; None covers only the checkpoints.
        keep: How many of the newest checkpoints are kept, besides those with a role.
        asynchronous: Copy a checkpoint's contents, and write them while the run continues. The next checkpoint waits
            until they are written, and so does reading the index.
    """

    def __init__(
        self,
        folder: Path,
        processor_files: Mapping[str, str],
        *,
        read_only: bool = False,
        run: RunDir | None = None,
        keep: int = 2,
        asynchronous: bool = False,
    ) -> None:
        self.folder = folder
        self.processor_files = processor_files
        self.read_only = read_only
        self.keep = keep
        self._background = Background() if asynchronous else None
        self._group: dist.ProcessGroup | None = None  # for exchanges during writing in the background
        self._logs = LogDigests(run.path, [path.name for path in run.records]) if run else None
        self._config = run.config.read_text(encoding="utf-8") if run and run.config.is_file() else None
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def index(self) -> CheckpointIndex:
        """The index of checkpoints, once all of them are written.

        Raises:
            RlaifFastError: The index is damaged, or the last checkpoint could not be written.
        """
        self.wait()
        return self._read_index()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            RlaifFastError: It could not be written; see `save`.
        """
        if self._background is not None:
            self._background.wait()

    def _read_index(self) -> CheckpointIndex:
        path = self.folder / INDEX
        if not path.exists():
            return CheckpointIndex()
        try:
            return CheckpointIndex(**unseal(path))
        except Damage as error:
            raise RlaifFastError(
                f"damaged: {error}; continue the run with --resume {self.folder.parent}"
            ) from error

    def save(self, name: str, model: nn.Module, tokenizer, state: Mapping[str, Any], **roles: bool) -> Path:
        """Write checkpoint `name` and give it the given roles (`last=True`, `best=True`, `sft=True`).

        With sharded weights all processes of the run call it; each writes its part of `state["shards"]`.

        Raises:
            RlaifFastError: The disk is full or not writable, or the run's folder is gone; earlier checkpoints are
                untouched. If this one is written in the background, `wait` raises the error.
        """
        self.wait()
        target, partial = self.folder / name, self.folder / f".{name}.partial"
        state = dict(state)
        tensors = state.pop("shards", None)
        weights = None
        if not self.read_only:
            if not self.folder.is_dir():
                raise RlaifFastError(f"the folder {self.folder} was removed while the run went on")
            shutil.rmtree(partial, ignore_errors=True)
        if is_sharded(model):
            if not self.read_only:
                with writing(target):
                    partial.mkdir()  # before the first exchange: the other processes write there
            weights = whole_weights(model)
        finish_shards = self._begin_shards(partial, tensors or {})
        if self.read_only:
            self._run(lambda: self._tell_refusals(target, partial, finish_shards))
            return target
        if self._background is not None:
            weights, state = copied_weights(model) if weights is None else weights, copied(state)
        logs = self._logs.up_to_now() if self._logs else {}

        def write() -> None:
            save_model(partial, model, tokenizer, self.processor_files, weights)
            finish_shards()
            torch.save(state, partial / STATE)
            self._complete(target, partial, logs, {role: name for role, plays in roles.items() if plays})

        self._run(lambda: self._tell_refusals(target, partial, write))
        return target

    def _run(self, write: Callable[[], Any]) -> None:
        """Write now, or while the run continues."""
        if self._background is None:
            write()
        else:
            self._background.begin(write)

    def _begin_shards(self, partial: Path, tensors: Mapping[str, Tensor]) -> Callable[[], Any]:
        """Copy the processes' parts if they are written in the background; returns a function that ends the writing."""
        if not tensors:
            return lambda: None
        if self._background is None:
            return lambda: write_shards(partial, tensors)
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return begin_shards(partial, tensors, self._group)

    def _tell_refusals(self, target: Path, partial: Path, write: Callable[[], None]) -> None:
        """Report what could not be written, and remove what was."""
        try:
            write()
        except Exception as error:
            reason = refusal(error)
            if reason is None:
                raise
            if not self.read_only:
                self._remove_unlisted()
            raise RlaifFastError(f"cannot write checkpoint {target}: {reason}") from error
        finally:
            if not self.read_only:
                shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, target: Path, partial: Path, logs: Mapping, roles: Mapping[str, str]) -> None:
        """Seal the finished files and move them into place."""
        index = self._index_with(roles)
        write_manifest(partial, Manifest(index.order, digests(partial), logs, self._config, index.roles))
        for path in (*partial.rglob("*"), partial):
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        self._write_index(index)

    def mark(self, **roles: str) -> None:
        """Give roles to existing checkpoints, by name."""
        if not self.read_only:
            self._write_index(replace(self.index, **cast(dict[str, Any], roles)))

    def note_config(self, text: str) -> None:
        """Record the run's configuration, which a resumed run may have changed."""
        self._config = text
        if self.index.last is not None:
            self._write_index(replace(self.index, config_sha256=text_digest(text)))

    def go_back_to(self, name: str, manifest: Manifest, keep: Sequence[str]) -> None:
        """Make `name` the last checkpoint again, with the roles of its time; of the others, only `keep` stay."""
        recent = {kept: _needs(read_manifest(self.folder / kept).roles) for kept in keep}
        digest = None if self._config is None else text_digest(self._config)
        self._write_index(
            CheckpointIndex(**manifest.roles, recent=recent, order=manifest.order, config_sha256=digest)
        )

    def path(self, role: str) -> Path:
        """The folder of the checkpoint with this role.

        Raises:
            UsageError: There is none.
        """
        name = getattr(self.index, role)
        if name is None or not (self.folder / name).is_dir():
            raise UsageError(
                f"{self.folder}: no {role!r} checkpoint; it was removed, or the run stopped before its first one"
            )
        return self.folder / name

    def checked(self, role: str) -> Path:
        """The folder of the checkpoint with this role, after checking that its files have not changed.

        Raises:
            RlaifFastError: A file has changed.
            UsageError: There is none.
        """
        folder = self.path(role)
        try:
            read_manifest(folder)
        except Damage as error:
            raise RlaifFastError(f"damaged: {error}") from error
        return folder

    def last_state(self) -> dict[str, Any] | None:
        """The trainer state to resume from; None before the first checkpoint."""
        last = self.index.last
        return None if last is None else load_state(self.folder / last)

    def _index_with(self, roles: Mapping[str, str]) -> CheckpointIndex:
        """The index after writing a checkpoint with `roles`."""
        index = replace(self._read_index(), **cast(dict[str, Any], roles))
        recent = dict(index.recent)
        if "last" in roles:
            recent = {roles["last"]: _needs(index.roles)} | {
                n: r for n, r in recent.items() if n != roles["last"]
            }
        digest = None if self._config is None else text_digest(self._config)
        newest = dict(list(recent.items())[: self.keep])
        return replace(index, recent=newest, order=index.order + 1, config_sha256=digest)

    def _write_index(self, index: CheckpointIndex) -> None:
        write_atomically(self.folder / INDEX, sealed(asdict(index)))
        self._remove_unlisted()

    def _remove_unlisted(self) -> None:
        """Remove the checkpoints without a role, and leftovers of interrupted writes.

        Folders that no run writes belong to someone else and stay.
        """
        kept = self._read_index().kept()
        for child in self.folder.iterdir():
            if child.is_dir() and is_checkpoint_name(child.name, partial=True) and child.name not in kept:
                shutil.rmtree(child, ignore_errors=True)


def _needs(roles: Mapping[str, str | None]) -> list[str]:
    return sorted({name for name in roles.values() if name is not None})


def save_model(
    folder: Path,
    model: Any,
    tokenizer,
    processor_files: Mapping[str, str],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights (safetensors), config, tokenizer and preprocessor settings; with adapters, only the adapters.

    Args:
        folder: The folder to write.
        model: The model.
        tokenizer: Its tokenizer.
        processor_files: Preprocessor settings, by file name.
        weights: Used instead of the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_quietly(model, folder, **({} if weights is None else {"state_dict": weights}))
    tokenizer.save_pretrained(folder)
    for name, text in processor_files.items():
        (folder / name).write_text(text)


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint written by `save_model` into a model of the same shape, in place.

    Raises:
        UsageError: They fit only in part or not at all; the model is unchanged.
    """
    what = f"the checkpoint {folder}"
    if hasattr(model, "peft_config"):
        load_adapters(model, folder, what)
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{what} holds LoRA adapters, and the run has none; set lora_r and lora_alpha as they were"
        )
    check_config(folder, what)
    dtype = next(model.parameters()).dtype
    saved, own = load_strictly(type(model), folder, what, dtype=dtype).state_dict(), model.state_dict()
    refuse_unlike(what, saved, own)
    model.load_state_dict(cut_like(saved, own))


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
    """The preprocessor settings beside a model, to be copied beside its checkpoints."""
    from transformers.utils import cached_file

    found = {}
    for name in PROCESSOR_FILES:
        path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            found[name] = Path(path).read_text()
    return found
