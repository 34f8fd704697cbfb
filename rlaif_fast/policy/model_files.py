"""The files of a model, and how to tell them from other files of the same names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif_fast.digests import sampled_digest
from rlaif_fast.errors import UsageError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_BASE = "adapter_base.json"  # beside adapters: digests of the model that they were trained on
MANIFEST = "manifest.json"  # a run's record of a checkpoint (`runs.integrity`), not part of the model
SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".json", ".jinja", ".txt", ".model"}
BASE = "base: "  # prefix of the names of a base's files
UNREAD = {"trainer_state.json", "training_args.bin", "optimizer.bin", "scheduler.bin"}
BLOCKS, BLOCK = 256, 2**18  # sampled from a file above 64 MiB; one block per 20 MB of a 5 GB shard


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that a model may be read from."""
    paths = sorted((*folder.glob("*"), *folder.glob("*/*.json")))
    return [path for path in paths if path.suffix in SUFFIXES and path.name != MANIFEST and path.is_file()]


def file_prints(model: str) -> dict[str, str]:
    """A digest of each file of a model by name; if it holds adapters, those of the base too, as "base: NAME".

    Weights, configuration, tokenizer and processor settings count. Of a file above 64 MiB, only its size and 256 blocks
    spread over it are read. That tells different weights apart in a fraction of their loading time, but misses a few
    damaged bytes between the blocks.

    Args:
        model: A folder, or a hub name, which is identified by its commit.

    Returns:
        Nothing if the model cannot be found; loading it reports that.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        commit = hub_commit(model)
        return {} if commit is None else {"commit": commit}
    read = [
        path for path in model_files(folder) if path.suffix not in (".pt", ".pth") and path.name not in UNREAD
    ]
    prints = {path.relative_to(folder).as_posix(): sampled_digest(path, BLOCKS, BLOCK) for path in read}
    base = base_of(folder)
    if base and Path(base).expanduser() != folder:
        prints |= {BASE + name: print_ for name, print_ in file_prints(base).items()}
    return prints


def base_of(folder: Path) -> str | None:
    """The model that the adapters in a folder belong to."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    base: str | None = saved.get("base_model_name_or_path")
    return base


def hub_commit(model: str) -> str | None:
    """The commit of a hub name in the cache, or None."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return extract_commit_hash(cached_file(model, "config.json"), None)
    except (OSError, ValueError):
        return None


def base_record(model: Any, prints: Mapping[str, str]) -> dict[str, str]:
    """What a checkpoint of adapters records of their base, by file name; nothing if the model has no adapters.

    Args:
        model: The model.
        prints: The digests of the files it was loaded from (`file_prints`): adapters, or the base itself.
    """
    if not hasattr(model, "peft_config"):
        return {}
    base = {name.removeprefix(BASE): print_ for name, print_ in prints.items() if name.startswith(BASE)}
    return {ADAPTER_BASE: json.dumps(base or dict(prints), indent=1) + "\n"}


def differences(known: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names of the files that were changed, removed or added."""
    told = {name: "" if name in found else " (gone)" for name in known}
    told |= dict.fromkeys(found.keys() - known.keys(), " (not there before)")
    return [f"{name}{why}" for name, why in sorted(told.items()) if known.get(name) != found.get(name)]


def refuse_other_base(folder: Path, base: str, what: str) -> None:
    """Refuse adapters if their base's files are not those that they were trained on.

    Adapters from elsewhere, or of an earlier version, do not record their base and are accepted unchecked.

    Args:
        folder: The folder of the adapters.
        base: The model that they are applied to; if it cannot be found, loading it will say so.
        what: The adapters, for the message: "model: FOLDER".

    Raises:
        UsageError: A file differs.
    """
    record = folder / ADAPTER_BASE
    if not record.is_file():
        return
    try:
        known = dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{what}: {ADAPTER_BASE} is damaged ({error})") from error
    found = file_prints(base)
    changed = differences(known, found) if found else []
    if changed:
        raise UsageError(
            f"{what} holds LoRA adapters that were trained on other files than {base} has now: "
            f"{', '.join(changed)}; bring them back, or use a copy of the folder without {ADAPTER_BASE}"
        )
