"""The examples of a run: which files they come from, and what keeps the splits apart."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

from rlaif_fast.data import SyntheticConfig, make_dataset, read_examples
from rlaif_fast.data.benchmarks import BENCHMARKS, read_benchmark
from rlaif_fast.data.identity import Names, contents, group_by_content
from rlaif_fast.data.schema import Example
from rlaif_fast.data.splits import SPLITS, files_of_splits, is_one_table, rows_apart
from rlaif_fast.errors import UsageError, require
from rlaif_fast.trainer.options import DataOptions, TrainConfig
from rlaif_fast.trainer.run import Datasets
from rlaif_fast.trainer.scoring import check_references, choose_metric, has_answer


def cache_folder(config: TrainConfig) -> Path:
    """Where synthetic data and tiny models are kept."""
    return Path(config.cache_dir).expanduser()


def synthetic_config(config: DataOptions, seed: int) -> SyntheticConfig:
    """The dataset that "synthetic" stands for."""
    weights = {1: (1.0, 0.0, 0.0), 2: (0.5, 0.5, 0.0), 3: (0.34, 0.33, 0.33)}
    return SyntheticConfig(
        seed=seed,
        sft_clips=config.synthetic_sft_clips,
        rl_clips=config.synthetic_rl_clips,
        validation_clips=config.synthetic_validation_clips,
        test_clips=config.synthetic_test_clips,
        difficulty=weights[config.synthetic_difficulty],
        label_noise=config.label_noise,
        label_confusion=config.label_confusion,
        multiple_choice_fraction=config.multiple_choice_fraction,
        questions_per_clip=config.synthetic_questions_per_clip,
        ocr_fraction=config.synthetic_ocr_fraction,
        codec=config.codec,
    )


def load_data(
    config: TrainConfig,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Datasets:
    """The rows of the four splits; the synthetic dataset is made on first use and kept in the cache.

    Args:
        config: Where the data is, or what to make.
        workers: Processes that make synthetic clips.
        progress: Called with the number of clips made and their total.
        note: Called with what a reader of the results has to know.

    Raises:
        UsageError: A file is missing, empty or wrong, or a split that is needed has no rows.
    """
    rows = read_splits(config, workers=workers, progress=progress)
    rows["rl"] = rows["rl"] or rows["sft"]
    names = contents(row for split in SPLITS for row in rows[split])  # once: it looks at every file
    if not rows["validation"] or not rows["test"]:
        hold_out_missing(rows, config, names)
    metric, why = choose_metric(
        config.metric_for_best_model, config.oracle, config.oracle_options, rows["validation"]
    )
    check_references(config.oracle, config.oracle_options, rows["rl"])
    if metric == "accuracy":
        drop_unanswered(rows, note)
    drop_evaluated_media(rows, names, note)
    if note is not None and metric != "accuracy":
        note(why)
    return Datasets(**rows, metric=metric)


def read_splits(
    config: TrainConfig, *, workers: int, progress: Callable[[int, int], None] | None
) -> dict[str, list[Example]]:
    """The rows of each split as they are on disk; a split without a file has none."""
    rows: dict[str, list[Example]] = {split: [] for split in SPLITS}
    source, own = Path(config.data).expanduser(), own_files(config)
    if config.data != "synthetic" and (source.is_file() or is_one_table(source)):
        everything = read_file(source, config)
        rows |= {"sft": everything, "rl": everything}
        found = own
    else:
        found = split_files(config, workers=workers, progress=progress) | own
    generated = dataclasses.replace(config, media_root=None) if config.data == "synthetic" else config
    for split, file in found.items():
        options = config if split in own else generated
        rows[split] = read_file(file, options, require_answer=needs_answers(config, split))
    return rows


def needs_answers(config: TrainConfig, split: str) -> bool:
    """Whether every row of the split needs an answer."""
    return split == "sft" and config.sft == "auto"


def own_files(config: DataOptions) -> dict[str, Path]:
    """The files that replace those in `data`, by split."""
    given = {"sft": config.sft_data, "validation": config.validation_data, "test": config.test_data}
    return {split: Path(path).expanduser() for split, path in given.items() if path is not None}


def split_files(
    config: TrainConfig, *, workers: int, progress: Callable[[int, int], None] | None
) -> dict[str, Path]:
    """The files of the synthetic dataset or of the folder `data`, by split."""
    if config.data == "synthetic":
        synthetic = synthetic_config(config, config.seed)
        folder = cache_folder(config) / "data" / synthetic.digest()[:16]
        paths = make_dataset(folder, synthetic, workers=workers, progress=progress)
        return {split: getattr(paths, split) for split in SPLITS}
    source = Path(config.data).expanduser()
    if not source.is_dir():
        raise UsageError(
            f"data: there is no file or folder {source}; name a .jsonl file, a folder of them, or synthetic"
        )
    found = files_of_splits(source, {*own_files(config), *(() if config.sft == "auto" else ("sft",))})
    if "rl" not in found and "sft" not in found:
        raise UsageError(f"data: {source} holds neither rl.jsonl nor sft.jsonl")
    return found


def hold_out_missing(rows: dict[str, list[Example]], config: TrainConfig, names: Names) -> None:
    """Move RL rows to the validation and test splits that have no file, in place; `names`: the `contents` of all rows.

    The two splits share no media: one chooses the checkpoint, the other measures it.
    """
    missing = [split for split in ("validation", "test") if not rows[split]]
    free = rows_apart(rows["rl"], (*rows["validation"], *rows["test"]), names)
    _, *parts = hold_out(free, config.holdout_fraction, config.seed, names, parts=len(missing))
    held = {id(row) for part in parts for row in part}  # one file serves both stages with the same objects
    for split in ("sft", "rl"):
        rows[split] = [row for row in rows[split] if id(row) not in held]
    rows |= dict(zip(missing, parts, strict=True))


def drop_unanswered(rows: dict[str, list[Example]], note: Callable[[str], None] | None = None) -> None:
    """Drop the validation and test rows without an answer, by which accuracy cannot be measured, in place.

    Raises:
        UsageError: Nothing is left.
    """
    for split in ("validation", "test"):
        kept = [row for row in rows[split] if has_answer(row)]
        if not kept:
            raise UsageError(
                f"data: no row of the {split} split has an answer, so accuracy cannot be measured; add answers, or "
                "set metric_for_best_model to oracle"
            )
        if len(kept) < len(rows[split]) and note is not None:
            note(f"Left out: {len(rows[split]) - len(kept)} {split} rows without an answer.")
        rows[split] = kept


def drop_evaluated_media(
    rows: dict[str, list[Example]], names: Names, note: Callable[[str], None] | None = None
) -> None:
    """Drop the training rows about a video or picture of validation or test, in place.

    A row without media is dropped if a validation or test row asks the same.

    Args:
        rows: Of all splits.
        names: Their `contents`.
        note: Called with how many were dropped.

    Raises:
        UsageError: Nothing is left for reinforcement learning.
    """
    held = (*rows["validation"], *rows["test"])
    for split in ("sft", "rl"):
        kept = rows_apart(rows[split], held, names)
        dropped = len(rows[split]) - len(kept)
        if dropped and not kept and split == "rl":
            raise UsageError(
                "data: every row of the rl split is about media of validation or test; "
                "give validation_data and test_data of other media"
            )
        if dropped and note is not None:
            note(f"Left out: {dropped} {split} rows about media of validation or test.")
        rows[split] = kept


def read_file(path: Path, config: DataOptions, *, require_answer: bool = False) -> list[Example]:
    """The examples of a file, or of a published benchmark ("videomme:FOLDER"), read as configured.

    Raises:
        UsageError: A row is wrong or its media are missing, and `on_bad_row` is not "skip".
    """
    name, _, folder = str(path).partition(":")
    if name in BENCHMARKS and folder and not path.exists():
        possible = config.scored_answer == "answer" or BENCHMARKS[name].in_parts
        require(possible, "scored_answer", f"answer with the benchmark {path}", "whole")
        items = read_benchmark(name, folder, scored=config.scored_answer)
        missing = [item for item in items if item.trouble]
        if missing and (config.on_bad_row == "raise" or len(missing) == len(items)):
            raise UsageError(f"{path}: {len(missing)} of {len(items)} questions: {missing[0].trouble}")
        return [item.example for item in items if not item.trouble]
    return read_examples(
        path,
        media_root=config.media_root,
        require_answer=require_answer,
        scored=config.scored_answer,
        on_error=config.on_bad_row,
    )


def hold_out(
    rows: list[Example], fraction: float, seed: int, names: Names, *, parts: int = 2
) -> list[list[Example]]:
    """Split rows by their media: what is left to train on, then `parts` parts with `fraction` of the media each.

    Raises:
        UsageError: There are too few media.
    """
    groups = group_by_content(rows, names)
    count = max(1, round(len(groups) * fraction))
    if len(groups) < parts * count + 1:
        raise UsageError(
            f"data: {len(groups)} videos are too few to hold some out; give validation_data and test_data"
        )
    random.Random(seed).shuffle(groups)
    chosen = [groups[parts * count :], *(groups[k * count : (k + 1) * count] for k in range(parts))]
    return [[row for group in part for row in group] for part in chosen]
