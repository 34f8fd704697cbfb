"""What distinguishes a model, or a question, from another of the same name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from rlaif_fast.data.identity import files_of
from rlaif_fast.data.schema import Example
from rlaif_fast.oracle import identity
from rlaif_fast.policy.model_files import hub_commit
from rlaif_fast.runs.integrity import MANIFEST, Damage, unseal

WEIGHTS = (".safetensors", ".bin")


def model_digest(model: str) -> str | None:
    """What identifies the weights of a model and its preprocessing; for LoRA adapters, those of their base too.

    Args:
        model: A folder, whose files are read, or a hub name, which is identified by its commit.

    Returns:
        The digest; None if the model cannot be found, which loading it will report.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return hub_commit(model)
    return identity.model_digest(model, known=_written_digests(folder), commit_of=hub_commit)


def _written_digests(folder: Path) -> dict[str, str]:
    """The digests in a checkpoint's manifest; `check_weights` has compared them with its files."""
    try:
        files = dict(unseal(folder / MANIFEST)["files"])
    except (Damage, KeyError, TypeError, ValueError):
        return {}
    return {name: digest for name, digest in files.items() if name.endswith(WEIGHTS)}


def asked_digest(example: Example) -> str:
    """Identifies everything an item asks: its words, options, answer and media, with their cuts and sizes."""
    asked = {
        "question": example.question,
        "asked": example.asked,
        "system": example.system,
        "options": example.options,
        "layout": example.layout,
        "answer": example.answer,
        "media": [dataclasses.asdict(medium) for medium in example.seen],
        "bytes": [_size(path) for medium in example.seen for path in files_of(medium)],
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def _size(path: str) -> int | None:
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return None
