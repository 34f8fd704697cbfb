"""SHA-256 digests of what a checkpoint was written with, to find damage when a run is resumed.

Each checkpoint holds `manifest.json`, written last: the digests of its own files, the length of each of the run's
records and its digest up to there, the configuration as text, and the roles of the checkpoints. The manifest has a
digest of itself, and so does the index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif_fast.digests import BLOCK, beginning_digests, file_digest, text_digest
from rlaif_fast.errors import RlaifFastError

MANIFEST = "manifest.json"


class Damage(Exception):
    """Something has changed since it was written; the message is one line."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint was written with.

    Attributes:
        order: Number of the checkpoint in the run; later ones have larger numbers.
        files: SHA-256 of each file of the checkpoint except the manifest, by name.
        logs: (bytes, SHA-256 of these bytes) of each record of the run, by name; a missing one has 0 bytes.
        config: The run's config.yaml.
        roles: Checkpoint names by role, including this one.
    """

    order: int
    files: Mapping[str, str]
    logs: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    config: str | None = None
    roles: Mapping[str, str | None] = field(default_factory=dict)


class LogDigests:
    """Digests of files that only grow; each byte is read once.

    Args:
        folder: Where they are.
        names: Their names.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self._seen = {name: (0, hashlib.sha256()) for name in names}

    def up_to_now(self) -> dict[str, tuple[int, str]]:
        """(bytes, SHA-256) of each file."""
        for name, (length, digest) in self._seen.items():
            path = self.folder / name
            if path.is_file():
                with path.open("rb") as file:
                    file.seek(length)
                    while block := file.read(BLOCK):
                        digest.update(block)
                        length += len(block)
                self._seen[name] = length, digest
        return {name: (length, digest.hexdigest()) for name, (length, digest) in self._seen.items()}


def sealed(values: Mapping[str, Any]) -> str:
    """A JSON object with a digest of itself."""
    return json.dumps({**values, "sha256": _digest_of(values)}, indent=1) + "\n"


def unseal(path: Path) -> dict[str, Any]:
    """The object that `sealed` wrote.

    Raises:
        Damage: The file is missing or has changed since it was written.
    """
    try:
        content = path.read_bytes()  # read once: another process may replace the file
        values = json.loads(content)
        seal = values.pop("sha256")
    except FileNotFoundError:
        raise Damage(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise Damage(f"{path} cannot be read") from None
    if seal != _digest_of(values) or content != sealed(values).encode():
        raise Damage(f"{path} is not as it was written")
    return values


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose other files are complete."""
    (folder / MANIFEST).write_text(sealed(vars(manifest)), encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder except its manifest, by name."""
    return {name: file_digest(folder / name) for name in sorted(_names(folder))}


def _names(folder: Path) -> set[str]:
    """The files in a folder except its manifest."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, after checking that its files have not changed.

    Raises:
        Damage: A file has changed, is missing, or was added.
    """
    manifest = Manifest(**unseal(folder / MANIFEST))
    _check_files(folder, manifest.files)
    for name in _names(folder) - manifest.files.keys():
        raise Damage(f"{folder / name} was added after the checkpoint was written")
    return manifest


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Raise `Damage` unless each file has the digest given for its name."""
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise Damage(f"{folder / name} is missing")
        if file_digest(folder / name) != digest:
            raise Damage(f"{folder / name} is not as it was written")


def check_weights(folder: Path) -> None:
    """Refuse a run's checkpoint if its weights have changed since they were written.

    Other files may have been edited, and a folder from elsewhere has no manifest: neither is refused.

    Raises:
        RlaifFastError: A file of weights is missing or has changed, or the manifest has.
    """
    if not _has_own_manifest(folder):
        return
    try:
        files = Manifest(**unseal(folder / MANIFEST)).files
        _check_files(folder, {name: files[name] for name in files if name.endswith(".safetensors")})
    except Damage as error:
        raise RlaifFastError(f"damaged: {error}") from error


def _has_own_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest of ours, and not another program's file of that name."""
    try:
        values = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True  # an unreadable file counts as ours
    return isinstance(values, dict) and "sha256" in values and "files" in values


def damaged_logs(folder: Path, manifests: Mapping[str, Manifest]) -> dict[str, list[Path]]:
    """The records of a run that have changed since a checkpoint was written, by the checkpoint's name.

    Growth is not damage. Each record is read once for all checkpoints.
    """
    names = {log for manifest in manifests.values() for log in manifest.logs}
    found = {
        log: beginning_digests(folder / log, {m.logs[log][0] for m in manifests.values() if log in m.logs})
        for log in names
        if (folder / log).is_file()
    }
    return {
        name: [
            folder / log
            for log, (length, digest) in manifest.logs.items()
            if length and found.get(log, {}).get(length) != digest
        ]
        for name, manifest in manifests.items()
    }


def _digest_of(values: Mapping[str, Any]) -> str:
    return text_digest(json.dumps(values))
