"""A run continues with the rows, media and model files that it began with, or says which of them differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif_fast.data.identity import digest_of_metadata, digest_of_rows, digests_of_media
from rlaif_fast.data.schema import Example
from rlaif_fast.data.splits import SPLITS
from rlaif_fast.errors import UsageError, first_line
from rlaif_fast.policy.model_files import differences, refuse_other_base
from rlaif_fast.policy.policy import Policy
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer.run import Datasets

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
SHOWN = 3  # tokens in a message


def refuse_other_data(run_dir: RunDir, data: Datasets, *, files: bool = True) -> None:
    """Check that a run continues with the data it began with; the first call records that data.

    Args:
        run_dir: The run.
        data: Its rows.
        files: Also compare the contents of the media files.

    Raises:
        UsageError: A split has other rows or other metadata, or a media file has changed.
    """
    _refuse_rows(run_dir, {split: getattr(data, split) for split in SPLITS}, files=files)


def refuse_other_test(run_dir: RunDir, test: Sequence[Example]) -> None:
    """Check that a run is evaluated on the test rows it began with; nothing is written.

    Args:
        run_dir: The run.
        test: The rows that its configuration gives now.

    Raises:
        UsageError: The rows or their metadata differ, or a media file has changed.
    """
    _refuse_rows(run_dir, {"test": test}, keep=False, way_out="give what is there now as --data")


def _refuse_rows(
    run_dir: RunDir,
    splits: Mapping[str, Sequence[Example]],
    *,
    files: bool = True,
    keep: bool = True,
    way_out: str = "begin anew",
) -> None:
    """Compare rows, their metadata and, with `files`, the contents of their media files with what a run began with."""
    rows = {split: digest_of_rows(found) for split, found in splits.items()}

    def compare(kind: str, found: Mapping[str, str], what: str) -> None:
        known = run_dir.began_with(kind, found, keep=keep)
        changed = [split for split in found if known.get(split) != found[split]]
        if kind == "data":
            before = {split: known.get(split, "none").partition(",")[0] for split in changed}
            changed = [f"{s} ({rows[s].partition(',')[0]}, {before[s]} before)" for s in changed]
        if changed:
            raise UsageError(_other(run_dir, what, changed, way_out))

    compare("data", rows, "data: not the rows")
    metadata = {split: digest_of_metadata(found) for split, found in splits.items()}
    compare("metadata", metadata, "data: not the metadata of the rows")
    if files:
        compare("media", digests_of_media(splits), "data: not the media files")


def refuse_other_model(run_dir: RunDir, prints: Mapping[str, str]) -> None:
    """Check that a run continues with the model files it began with; the first call records them.

    Args:
        run_dir: The run.
        prints: The digests of its model's files (`model_files.file_prints`).

    Raises:
        UsageError: A file changed, is gone, or is new.
    """
    if not prints:
        return
    known = run_dir.began_with("model", prints)
    if changed := differences(known, prints):
        raise UsageError(_other(run_dir, "model: not the files", changed))


def _other(run_dir: RunDir, what: str, changed: list[str], way_out: str = "begin anew") -> str:
    return f"{what} that {run_dir.path} began with: {', '.join(changed)}; bring them back, or {way_out}"


def refuse_other_start(policy: Policy, folder: Path) -> None:
    """Refuse a starting checkpoint with another tokenizer, or with adapters of another base.

    One without a tokenizer, or without a record of its base, is accepted unchecked.

    Args:
        policy: The policy that gets its weights.
        folder: The checkpoint.

    Raises:
        UsageError: Its tokenizer or its base differs, or cannot be read.
    """
    from transformers import AutoTokenizer

    if hasattr(policy.model, "peft_config"):
        model: Any = policy.model
        refuse_other_base(folder, model.peft_config["default"].base_model_name_or_path, f"sft: {folder}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises plain exceptions
        raise UsageError(f"sft: {folder}: its tokenizer cannot be read: {first_line(error)}") from error
    difference = tokenizer_difference(policy.tokenizer, theirs)
    if difference is not None:
        raise UsageError(f"sft: {folder} does not fit the model: its tokenizer differs: {difference}")


def tokenizer_difference(ours: Any, theirs: Any) -> str | None:
    """How one tokenizer's tokens differ from another's: in their ids, or in which are special.

    Padding may differ: no weight depends on it.
    """
    mine, other = ours.get_vocab(), theirs.get_vocab()
    moved = sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token))
    if moved:
        shown = ", ".join(
            f"{token!r} is {other.get(token)}, not {mine.get(token)}" for token in moved[:SHOWN]
        )
        return f"of {len(moved)} tokens the id ({shown})"
    for name in ("eos_token", "bos_token"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"{name} is {getattr(theirs, name)!r}, not {getattr(ours, name)!r}"
    padding = {ours.pad_token, theirs.pad_token}
    special = sorted((set(ours.all_special_tokens) ^ set(theirs.all_special_tokens)) - padding)
    return f"special in one of them alone is {', '.join(special[:SHOWN])}" if special else None
