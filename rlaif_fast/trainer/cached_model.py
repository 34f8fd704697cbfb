"""The tiny policy: what its runs start from, and its folder in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rlaif_fast.cli import packaged_config
from rlaif_fast.data import VOCABULARY
from rlaif_fast.errors import RlaifFastError, UsageError, writing
from rlaif_fast.policy.tiny import holds_tiny, make_tiny, words_of
from rlaif_fast.prompts.encoder import question_text
from rlaif_fast.runs.integrity import Damage, Manifest, digests, read_manifest, write_manifest
from rlaif_fast.trainer.datasets import cache_folder
from rlaif_fast.trainer.options import TINY_FAMILIES, TrainConfig
from rlaif_fast.trainer.run import Datasets


def defaults_of(model: str, tell: Callable[[str], None]) -> Path | None:
    """The file with the tiny policy's own defaults; None for other models, which use the defaults of the classes.

    Args:
        model: A name or a checkpoint folder; one from a tiny run counts as the tiny policy.
        tell: Gets a line if this cannot be told from the name.
    """
    if model not in TINY_FAMILIES:
        if not holds_tiny(model):
            return None
        tell(f"model: {model} is a tiny policy, so what is not set is that of configs/tiny.yaml")
    return packaged_config("tiny.yaml")


def refuse_made(model: str | None) -> None:
    """Refuse a name of the tiny policy where a checkpoint is read.

    Raises:
        UsageError: It is such a name.
    """
    if model in TINY_FAMILIES:
        raise UsageError(f"model: {model!r} is made by the run that trains it; give a checkpoint of that run")


def tiny_folder(config: TrainConfig, data: Datasets) -> Path:
    """The checkpoint folder of the tiny policy for this seed and this dataset's words; made on first use.

    Raises:
        RlaifFastError: The cached one has changed since it was made.
    """
    family = TINY_FAMILIES[config.model]
    words = set(VOCABULARY)
    for row in (*data.sft, *data.rl, *data.validation, *data.test):
        words |= words_of((question_text(row), row.taught or "", row.system or ""))
    key = hashlib.sha256(json.dumps([4, family, config.seed, sorted(words)]).encode()).hexdigest()[:16]
    folder = cache_folder(config) / "models" / f"{config.model}-{key}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        with writing(partial):
            make_tiny(partial, words, family=family, seed=config.seed)
            write_manifest(partial, Manifest(0, digests(partial)))
        try:
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial)
            if not folder.exists():
                raise
    refuse_damaged(folder)
    return folder


def refuse_damaged(folder: Path) -> None:
    """Refuse a cached model whose files have changed since it was made.

    Raises:
        RlaifFastError: A file differs, is missing, or was added.
    """
    try:
        read_manifest(folder)
    except Damage as error:
        raise RlaifFastError(f"damaged: {error}; delete {folder}, and it is made again") from error
