"""Finds what a run can resume from: the newest whole checkpoint, with the records that belong to it."""

from __future__ import annotations

from pathlib import Path

from rlaif_fast.digests import text_digest
from rlaif_fast.errors import RlaifFastError
from rlaif_fast.outputs import INDEX, write_atomically
from rlaif_fast.runs.checkpoint import CheckpointIndex, CheckpointStore
from rlaif_fast.runs.folder import RunDir, is_checkpoint_name
from rlaif_fast.runs.integrity import Damage, Manifest, damaged_logs, read_manifest, unseal


def recover(run_dir: RunDir, dropped: dict[Path, tuple[int, bytes]] | None = None) -> list[str]:
    """Check everything that a run resumes from, take the newest whole checkpoint, and cut the records back to it.

    Args:
        run_dir: The run.
        dropped: Filled with what was cut off, for `RunDir.put_back`.

    Returns:
        One line for each damaged item, and one for a checkpoint that is used instead of a damaged one.

    Raises:
        RlaifFastError: No whole checkpoint is left; nothing was changed.
    """
    store = CheckpointStore(run_dir.checkpoints, {}, read_only=True)
    dropped = {} if dropped is None else dropped
    told: list[str] = []
    index = _index(store, told)
    whole = _whole(run_dir, index, told)
    usable = [name for name in _newest_first(whole) if _is_complete(whole[name], whole)]
    if not usable:
        if told or index.last is not None:
            reason = told[0] if told else f"{store.folder / str(index.last)} is missing"
            raise RlaifFastError(f"resume: no whole checkpoint is left: {reason}; start a new run")
        _check_config(run_dir, None, index, told)
        dropped.update(run_dir.truncate_to({}))
        return told
    name, manifest = usable[0], whole[usable[0]]
    if index.last is not None and name != index.last:
        told.append(
            f"The run goes on from {run_dir.checkpoints / name}, the newest checkpoint that is whole."
        )
    _check_config(run_dir, manifest, index, told)
    if told:
        store = CheckpointStore(run_dir.checkpoints, {}, run=run_dir)
        store.go_back_to(name, manifest, keep=usable)
    dropped.update(run_dir.truncate_to({log: length for log, (length, _) in manifest.logs.items()}))
    return told


def _index(store: CheckpointStore, told: list[str]) -> CheckpointIndex:
    """The index; an empty one if it is damaged, or if it is missing although there are checkpoints."""
    path = store.folder / INDEX
    if not path.exists() and not any(_folders(store.folder)):
        return CheckpointIndex()
    try:
        return CheckpointIndex(**unseal(path))
    except (Damage, TypeError) as error:
        told.append(f"damaged: {error}")
        return CheckpointIndex()


def _whole(run_dir: RunDir, index: CheckpointIndex, told: list[str]) -> dict[str, Manifest]:
    """The manifests of the whole checkpoints with whole records; the others are reported."""
    manifests: dict[str, Manifest] = {}
    folders = {folder.name: folder for folder in _folders(run_dir.checkpoints)}
    for name in sorted(index.kept() - folders.keys()):
        told.append(f"damaged: {run_dir.checkpoints / name} is missing")
    for name, folder in sorted(folders.items()):
        try:
            manifests[name] = read_manifest(folder)
        except (Damage, OSError, TypeError) as error:
            told.append(f"damaged: {error}")
    damaged = damaged_logs(run_dir.path, manifests)
    broken_logs: dict[Path, str] = {}  # with the first checkpoint that reports it
    for name, broken in damaged.items():
        for path in broken:
            broken_logs.setdefault(path, name)
    told += [
        f"damaged: {path} is not as it was written up to checkpoint {name}"
        for path, name in broken_logs.items()
    ]
    return {name: manifest for name, manifest in manifests.items() if not damaged[name]}


def _check_config(
    run_dir: RunDir, manifest: Manifest | None, index: CheckpointIndex, told: list[str]
) -> None:
    """Restore config.yaml from the checkpoint if it is damaged.

    Raises:
        RlaifFastError: It is damaged and no checkpoint has it.
    """
    text = run_dir.read_config()
    saved = manifest.config if manifest else None
    known = {index.config_sha256} if index.config_sha256 else {text_digest(saved)} if saved else set()
    if text is not None and (not known or text_digest(text) in known):
        return
    if saved is None:
        raise RlaifFastError(
            f"resume: {run_dir.config} is damaged, and no checkpoint has a copy; start a new run"
        )
    told.append(f"damaged: {run_dir.config} is not as it was written; the checkpoint's copy takes its place")
    write_atomically(run_dir.config, saved)


def _newest_first(whole: dict[str, Manifest]) -> list[str]:
    return sorted(whole, key=lambda name: whole[name].order, reverse=True)


def _is_complete(manifest: Manifest, whole: dict[str, Manifest]) -> bool:
    """Whether everything that had a role beside this checkpoint is whole too."""
    return all(name in whole for name in manifest.roles.values() if name is not None)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and is_checkpoint_name(path.name)]
