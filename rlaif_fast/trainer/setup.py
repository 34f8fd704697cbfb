"""Builds the parts of a run from its configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlaif_fast.algorithms.registry import find_algorithm
from rlaif_fast.data import VOCABULARY, SyntheticConfig, make_dataset, read_examples
from rlaif_fast.data.identity import contents, group_by_content, media_of
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import UsageError
from rlaif_fast.machine import cores
from rlaif_fast.oracle import CircuitBreaker, NoisyOracle, Oracle, ShuffledOracle, build_oracle
from rlaif_fast.oracle.base import gives_scores
from rlaif_fast.oracle.feedback import CorruptedOracle
from rlaif_fast.oracle.preflight import ask_once
from rlaif_fast.oracle.registry import find_oracle
from rlaif_fast.policy.loading import LoadedModel, ModelOptions, adapter_folder, resolve_device
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.tiny import make_tiny, words_of
from rlaif_fast.policy.weights import adapter_config, check_config
from rlaif_fast.prompts.batches import BatchMaker
from rlaif_fast.prompts.encoder import PromptEncoder, question_text
from rlaif_fast.trainer.options import TINY_FAMILIES, DataOptions, TrainConfig
from rlaif_fast.trainer.run import Datasets
from rlaif_fast.trainer.scoring import check_references, choose_metric, has_answer
from rlaif_fast.video import ClipCache, ClipStore, FrameSampling, PixelBudget

SPLITS = ("sft", "rl", "validation", "test")
PATHS = ("model", "data", "sft_data", "validation_data", "test_data", "media_root", "sft")
MODEL_ORACLES = ("embedding", "local", "reward_model")  # building one loads its model


def process_count(config: TrainConfig) -> int:
    """How many processes the configuration asks for on this machine; under torchrun those that it started."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return int(os.environ["WORLD_SIZE"])
    if config.num_processes > 0:
        return config.num_processes
    # Small operators gain nothing from a second thread, so on a CPU a second process halves the step.
    return 2 if cores() > 1 and resolve_device(config.device).type == "cpu" else 1


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration as it is kept with the run: whole paths of what is there, and the number of processes."""
    words = {*TINY_FAMILIES, "synthetic", "auto", "none"}
    values = {name: getattr(config, name) for name in PATHS}
    paths = {name: Path(value).expanduser() for name, value in values.items() if value and value not in words}
    whole: dict[str, Any] = {name: str(path.resolve()) for name, path in paths.items() if path.exists()}
    return dataclasses.replace(config, num_processes=process_count(config), **whole)


def preflight(config: TrainConfig) -> None:
    """Check what can be checked in seconds, before anything of an earlier run is replaced.

    Raises:
        UsageError: The model, the data or the oracle cannot be what the configuration says.
    """
    resolve_device(config.device)
    check_model(config.model)
    if config.sft not in ("auto", "none") and not Path(config.sft).expanduser().is_dir():
        raise UsageError(f"sft: expected auto, none or a checkpoint folder, got {config.sft!r}")
    if config.resume is None and config.overwrite_output_dir:
        check_overwrite(config)
    check_oracle(config)
    if config.data == "synthetic":
        for split, file in own_files(config).items():
            _read(file, config, require_answer=needs_answers(config, split))
    else:
        load_data(config)


def check_model(model: str) -> None:
    """Refuse a model whose configuration cannot be read; its weights are not."""
    from transformers import AutoConfig

    if is_tiny(model):
        return
    adapters = adapter_folder(model)
    if adapters is not None:
        model = adapter_config(adapters, f"model: {model}")["base_model_name_or_path"]
    check_config(model, "model")
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"model: cannot load {model!r}: {reason}") from error


def check_overwrite(config: TrainConfig) -> None:
    """Refuse to delete what the run starts from."""
    doomed = Path(config.output_dir).resolve() / "checkpoints"
    for name in ("model", "sft"):
        if doomed in Path(getattr(config, name)).expanduser().resolve().parents:
            raise UsageError(
                f"{name}: {getattr(config, name)} is a checkpoint of the run that overwrite_output_dir replaces; "
                "choose another output_dir"
            )


def check_oracle(config: TrainConfig) -> None:
    """Refuse an oracle that cannot be built; one that is a model is only looked up, a remote one is asked once."""
    find_oracle(config.oracle, config.oracle_options)
    if config.oracle not in MODEL_ORACLES:
        ask_once(make_oracle(config))


def set_threads(threads: int, processes: int = 1) -> None:
    """Use `threads` CPU threads; 0 leaves it to torch, or gives each of several processes its share."""
    if threads > 0 or processes > 1:
        torch.set_num_threads(threads or max(1, cores() // processes))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch. The loop draws from generators of its own; this is for the libraries."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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
        note: Called with what a reader of the figures has to know.

    Raises:
        UsageError: A file is missing, empty or wrong, or a split that is needed has no rows.
    """
    rows = read_splits(config, workers=workers, progress=progress)
    rows["rl"] = rows["rl"] or rows["sft"]
    if not rows["validation"] or not rows["test"]:
        hold_out_missing(rows, config)
    metric, why = choose_metric(
        config.metric_for_best_model, config.oracle, config.oracle_options, rows["validation"]
    )
    check_references(config.oracle, config.oracle_options, rows["rl"])
    if metric == "accuracy":
        drop_unanswered(rows, note)
    drop_evaluated_media(rows, note)
    if note is not None and metric != "accuracy":
        note(why)
    return Datasets(**rows, metric=metric)


def read_splits(
    config: TrainConfig, *, workers: int, progress: Callable[[int, int], None] | None
) -> dict[str, list[Example]]:
    """The rows of each split as they are on disk; a split without a file has none."""
    rows: dict[str, list[Example]] = {split: [] for split in SPLITS}
    source, own = Path(config.data).expanduser(), own_files(config)
    if config.data != "synthetic" and source.is_file():
        everything = _read(source, config)
        rows |= {"sft": everything, "rl": everything}
        found = own
    else:
        found = split_files(config, workers=workers, progress=progress) | own
    for split, file in found.items():
        rows[split] = _read(file, config, require_answer=needs_answers(config, split))
    return rows


def needs_answers(config: TrainConfig, split: str) -> bool:
    """Whether a row of the split is wrong where it has no answer."""
    return split == "sft" and config.sft == "auto"


def own_files(config: DataOptions) -> dict[str, Path]:
    """The files that take the place of those in `data`, by split."""
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
    found = {split: path for split in SPLITS if (path := source / f"{split}.jsonl").exists()}
    if "rl" not in found and "sft" not in found:
        raise UsageError(f"data: {source} holds neither rl.jsonl nor sft.jsonl")
    return found


def hold_out_missing(rows: dict[str, list[Example]], config: TrainConfig) -> None:
    """Take the validation and test rows that no file has from the RL rows, in place."""
    _, validation, test = hold_out(rows["rl"], config.holdout_fraction, config.seed)
    held = {id(row) for row in (*validation, *test)}  # one file serves both stages with the same objects
    for split in ("sft", "rl"):
        rows[split] = [row for row in rows[split] if id(row) not in held]
    rows["validation"], rows["test"] = rows["validation"] or validation, rows["test"] or test


def drop_unanswered(rows: dict[str, list[Example]], note: Callable[[str], None] | None = None) -> None:
    """Drop the validation and test rows that accuracy cannot be measured on, in place.

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


def drop_evaluated_media(rows: dict[str, list[Example]], note: Callable[[str], None] | None = None) -> None:
    """Drop the rows to learn from that are about a video or picture of validation or test, in place.

    Raises:
        UsageError: Nothing is left for reinforcement learning.
    """
    held = (*rows["validation"], *rows["test"])
    names = contents((*rows["sft"], *rows["rl"], *held))
    evaluated = media_of(held, names)
    for split in ("sft", "rl"):
        kept = [row for row in rows[split] if media_of([row], names).isdisjoint(evaluated)]
        dropped = len(rows[split]) - len(kept)
        if dropped and not kept and split == "rl":
            raise UsageError(
                "data: every row of the rl split is about media of validation or test; "
                "give validation_data and test_data of other media"
            )
        if dropped and note is not None:
            note(f"Left out: {dropped} {split} rows about media of validation or test.")
        rows[split] = kept


def _read(path: Path, config: DataOptions, *, require_answer: bool = False) -> list[Example]:
    return read_examples(
        path,
        media_root=config.media_root,
        require_answer=require_answer,
        scored=config.scored_answer,
        on_error=config.on_bad_row,
    )


def hold_out(
    rows: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Split rows by their media into train, validation and test; the last two get `fraction` of the media each."""
    groups = group_by_content(rows)
    count = max(1, round(len(groups) * fraction))
    if len(groups) < 2 * count + 1:
        raise UsageError(
            f"data: {len(groups)} videos are too few to hold some out; give validation_data and test_data"
        )
    random.Random(seed).shuffle(groups)
    parts = groups[2 * count :], groups[:count], groups[count : 2 * count]
    train, validation, test = ([row for group in part for row in group] for part in parts)
    return train, validation, test


def tiny_folder(config: TrainConfig, data: Datasets) -> Path:
    """The checkpoint folder of the tiny policy for this seed and this dataset's words, made on first use."""
    family = TINY_FAMILIES[config.model]
    words = set(VOCABULARY)
    for row in (*data.sft, *data.rl, *data.validation, *data.test):
        words |= words_of((question_text(row), row.taught or "", row.system or ""))
    key = hashlib.sha256(json.dumps([3, family, config.seed, sorted(words)]).encode()).hexdigest()[:16]
    folder = cache_folder(config) / "models" / f"{config.model}-{key}"
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        make_tiny(partial, words, family=family, seed=config.seed)
        try:
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial)
            if not folder.exists():
                raise
    return folder


def make_policy(loaded: LoadedModel, options: ModelOptions) -> Policy:
    """Wrap a loaded model with the switches of the configuration."""
    return Policy(
        loaded.model,
        loaded.tokenizer,
        shared_prefix=options.shared_prefix,
        attention_backend=options.attention_backend,
        max_packed_tokens=options.max_packed_tokens,
        max_cached_tokens=options.max_cached_tokens,
        feature_cache_bytes=options.feature_cache_bytes,
    )


def make_batch_maker(
    loaded: LoadedModel, config: TrainConfig, *, blank_frames: bool = False, quarantine: Path | None = None
) -> BatchMaker:
    """What turns rows into encoded prompts for this model; on a GPU frames are decoded, resized and cut there."""
    spec = loaded.patch_spec
    on_gpu = loaded.device.type == "cuda"
    pixels = PixelBudget(
        spec.factor, config.min_pixels, config.max_pixels, config.total_pixels, spec.temporal_patch_size
    )
    encoder = PromptEncoder(
        loaded.tokenizer,
        loaded.model_type,
        spec,
        pixels,
        system_prompt=config.system_prompt,
        device=loaded.device if on_gpu else None,
        dtype=loaded.vision_dtype if on_gpu or config.patchify_backend != "auto" else torch.float32,
        patchify=config.patchify_backend,
    )
    sampling = FrameSampling(
        fps=config.fps,
        nframes=config.nframes,
        min_frames=config.min_frames,
        max_frames=config.max_frames,
        frame_factor=spec.temporal_patch_size,
    )
    store = ClipStore(
        sampling,
        resize=pixels,
        cache=ClipCache(memory_bytes=config.frame_cache_bytes),
        decoder=config.decoder,
        device=loaded.device,
        quarantine=quarantine,
        max_bad_fraction=config.max_bad_fraction,
    )
    return BatchMaker(encoder, store, blank_frames=blank_frames)


def make_oracle(config: TrainConfig) -> Oracle:
    """The oracle of the configuration, with the wrappers of the experiments around it.

    Raises:
        UsageError: It cannot be built, or has no scores where the algorithm needs them.
    """
    oracle = build_oracle(config.oracle, max_invalid_fraction=None, **config.oracle_options)
    if find_algorithm(config).feedback == "scores" and not gives_scores(oracle):
        raise UsageError(
            f"algorithm: {config.algorithm} with advantage {config.advantage} needs scores, and the oracle "
            f"{config.oracle!r} only orders responses; use --algorithm grpo_rank --advantage directed, or an oracle "
            "with scores such as reference or reward_model"
        )
    if config.feedback != "exact":
        oracle = CorruptedOracle(
            oracle, kind=config.feedback, strength=config.feedback_strength, seed=config.seed
        )
    if config.oracle_noise > 0:
        oracle = NoisyOracle(oracle, score_sd=config.oracle_noise, seed=config.seed)
    if config.oracle_shuffle:
        oracle = ShuffledOracle(oracle, seed=config.seed)
    return CircuitBreaker(oracle, max_invalid_fraction=config.max_invalid_fraction)


def resolved_model(config: TrainConfig, data: Datasets) -> ModelOptions:
    """The model options with "tiny" replaced by the folder it was made in."""
    names = {field.name for field in dataclasses.fields(ModelOptions)}
    options = ModelOptions(**{name: getattr(config, name) for name in names})
    if is_tiny(config.model):
        options.model = str(tiny_folder(config, data))
    return options


def is_tiny(model: str) -> bool:
    """Whether the name stands for a model made on the spot.

    Raises:
        UsageError: It looks like one and is none, nor a folder.
    """
    if model in TINY_FAMILIES:
        return True
    if model.startswith("tiny") and not Path(model).is_dir():
        raise UsageError(f"model: unknown tiny model {model!r}; there are {', '.join(TINY_FAMILIES)}")
    return False
