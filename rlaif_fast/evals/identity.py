"""What tells one model, and one question, from another that bears the same name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from rlaif_fast.data.identity import files_of
from rlaif_fast.data.schema import Example
from rlaif_fast.digests import file_digest, text_digest
from rlaif_fast.policy.loading import adapter_folder
from rlaif_fast.policy.weights import adapter_config
from rlaif_fast.runs.integrity import MANIFEST, Damage, unseal

_WEIGHTS = (".safetensors", ".bin")
_SETTINGS = (".json", ".jinja", ".model", ".txt")  # the model's, its tokenizer's, its processor's


def model_digest(model: str) -> str | None:
    """What identifies the weights of a model and what feeds them; of LoRA adapters, of their base too.

    Args:
        model: A folder, whose files are read, or a hub name, which is known by its commit.

    Returns:
        None where the model cannot be found, which loading it says.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _commit(model)
    known = _written_digests(folder)
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (*_WEIGHTS, *_SETTINGS) and path.name != MANIFEST and path.is_file()
    )
    found: dict[str, str | None] = {
        path.name: (known.get(path.name) if path.suffix in _WEIGHTS else None) or file_digest(path)
        for path in files
    }
    if adapter_folder(model) is not None:
        base = adapter_config(folder, f"model: {model}")["base_model_name_or_path"]
        found["base"] = model_digest(base)
    return text_digest(json.dumps(found, sort_keys=True))


def _written_digests(folder: Path) -> dict[str, str]:
    """The digests in a checkpoint's manifest, which `check_weights` has compared with its files."""
    try:
        files = unseal(folder / MANIFEST)["files"]
    except (Damage, KeyError):
        return {}
    return dict(files) if isinstance(files, dict) else {}


def _commit(model: str) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return extract_commit_hash(cached_file(model, "config.json"), None)
    except (OSError, ValueError):
        return None


def asked_digest(example: Example) -> str:
    """What identifies all that an item asks: its words, options, answer and media, with their cuts and sizes."""
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
