"""Makes the embedded dataset: short real videos of moving shapes, with questions and answers.

Four splits are drawn from disjoint sets of worlds. The same configuration and library versions give files
that are identical to the byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif_fast.data.synthetic.encode import CODECS, CONTAINERS, encode_video
from rlaif_fast.data.synthetic.questions import LETTERS, VOCABULARY, drafts
from rlaif_fast.data.synthetic.render import render
from rlaif_fast.data.synthetic.worlds import LEVELS, World, sample_world, with_digits
from rlaif_fast.digests import file_digest, text_digest
from rlaif_fast.errors import RlaifFastError, UsageError, check_fields
from rlaif_fast.termination import EXIT_CODE, end_with_parent

__all__ = ["SPLITS", "VOCABULARY", "DatasetPaths", "SyntheticConfig", "make_dataset"]

# The part of all worlds that each split draws from, by `worlds.share`.
SPLITS = {"sft": (0.0, 0.4), "rl": (0.4, 0.8), "validation": (0.8, 0.88), "test": (0.88, 1.0)}

_FORMAT = 4  # increase when the same configuration gives different files
_MARKER = "dataset.json"
_CLIPS_AT_ONCE = 16  # given to a worker


@dataclass(frozen=True)
class SyntheticConfig:
    """What to make.

    Attributes:
        seed: Seed of everything; other seeds give other worlds, drawn from the same disjoint sets.
        sft_clips: Videos of the split for supervised fine-tuning.
        rl_clips: Videos of the split for reinforcement learning.
        validation_clips: Videos of the split that picks the best checkpoint.
        test_clips: Videos of the split that is reported.
        difficulty: Relative frequency of the levels 1, 2 and 3.
        label_noise: Probability that an SFT answer has one fact wrong at random, in [0, 1].
        label_confusion: Probability that an open SFT answer with a value that is easily taken for another
            (`questions.CONFUSIONS`) has that other value, in [0, 1]: an annotator's systematic error.
        multiple_choice_fraction: Probability that a question is put as multiple choice, in [0, 1].
        num_options: Most options of a multiple-choice question, 2 to 4.
        questions_per_clip: Most questions about one clip, of distinct categories.
        ocr_fraction: Probability that the objects of a clip show digits, which it can then be asked about, in [0, 1].
        width: Pixels, even, at least 32.
        height: Pixels, even, at least 32.
        num_frames: Frames a clip, at least 8.
        fps: Frames per second.
        codec: "vp9" or "h264".
        container: "mp4", or "webm" for VP9.
    """

    seed: int = 0
    sft_clips: int = 1024
    rl_clips: int = 1024
    validation_clips: int = 96
    test_clips: int = 256
    difficulty: tuple[float, float, float] = (1.0, 0.0, 0.0)
    label_noise: float = 0.0
    label_confusion: float = 0.0
    multiple_choice_fraction: float = 0.0
    num_options: int = 4
    questions_per_clip: int = 8
    ocr_fraction: float = 0.0
    width: int = 64
    height: int = 64
    num_frames: int = 12
    fps: float = 6.0
    codec: str = "vp9"
    container: str = "mp4"

    def __post_init__(self) -> None:
        check_fields(self)
        checks = {
            "sft_clips, rl_clips, validation_clips, test_clips": (
                min(self.clips(split) for split in SPLITS) >= 0,
                "at least 0",
            ),
            "difficulty": (
                len(self.difficulty) == len(LEVELS)
                and min(self.difficulty) >= 0
                and sum(self.difficulty) > 0,
                "three weights, none below 0, not all 0",
            ),
            "label_noise": (0 <= self.label_noise <= 1, "in [0, 1]"),
            "label_confusion": (0 <= self.label_confusion <= 1, "in [0, 1]"),
            "multiple_choice_fraction": (0 <= self.multiple_choice_fraction <= 1, "in [0, 1]"),
            "ocr_fraction": (0 <= self.ocr_fraction <= 1, "in [0, 1]"),
            "num_options": (2 <= self.num_options <= len(LETTERS), f"2 to {len(LETTERS)}"),
            "questions_per_clip": (self.questions_per_clip >= 1, "at least 1"),
            "width, height": (
                min(self.width, self.height) >= 32 and not (self.width % 2 or self.height % 2),
                "even and at least 32",
            ),
            "num_frames": (self.num_frames >= 8, "at least 8"),
            "fps": (self.fps > 0, "above 0"),
            "codec": (self.codec in CODECS, f"one of {sorted(CODECS)}"),
            "container": (
                self.container in CONTAINERS and (self.codec, self.container) != ("h264", "webm"),
                "mp4, or webm for vp9",
            ),
        }
        for names, (good, expected) in checks.items():
            if not good:
                values = ", ".join(str(getattr(self, name)) for name in names.split(", "))
                raise UsageError(f"{names}: expected {expected}, got {values}")

    def clips(self, split: str) -> int:
        """Number of videos of a split."""
        return int(getattr(self, f"{split}_clips"))

    def unread(self) -> dict[str, str]:
        """Every option that changes no file beside the other options, with the reason."""
        found = {}
        if self.sft_clips == 0:
            found = dict.fromkeys(("label_noise", "label_confusion"), "sft_clips is 0")
        if self.multiple_choice_fraction == 0:
            found["num_options"] = "multiple_choice_fraction is 0"
        elif self.multiple_choice_fraction == 1:
            found["label_confusion"] = "multiple_choice_fraction is 1"
        return found

    def digest(self) -> str:
        """Names the dataset: equal for equal files."""
        values = dataclasses.asdict(self)
        if not self.ocr_fraction:
            del values["ocr_fraction"]  # folders made before the option existed are still found
        text = json.dumps([_FORMAT, values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class DatasetPaths:
    """Where a dataset is.

    Attributes:
        root: Its folder.
        sft: JSONL of the SFT split.
        rl: JSONL of the RL split.
        validation: JSONL of the validation split.
        test: JSONL of the test split.
        reused: Whether it already existed.
    """

    root: Path
    sft: Path
    rl: Path
    validation: Path
    test: Path
    reused: bool = False


def make_dataset(
    out_dir: str | Path,
    config: SyntheticConfig | None = None,
    *,
    overwrite: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetPaths:
    """Make the dataset, or find an existing one.

    The folder appears complete or not at all; several processes may make the same one at once.

    Args:
        out_dir: Folder to make. A dataset of the same configuration in it is kept and reused.
        config: What to make.
        overwrite: Replace a dataset of another configuration, or a damaged one.
        workers: Processes that make clips; the files are the same for any number. With more than one, call this
            from a script that guards its entry point, as `multiprocessing` asks.
        progress: Called with the number of clips made and their total.

    Raises:
        UsageError: The folder holds something else.
        RlaifFastError: The files cannot be written, or existing ones have changed since they were made.
    """
    config = config or SyntheticConfig()
    out = Path(out_dir).absolute()
    if _reusable(out, config, overwrite):
        return _paths(out, reused=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_all(temporary, config, workers, progress)
        if out.exists() and (out / _MARKER).exists():
            shutil.rmtree(out)  # our own dataset of another configuration, to be replaced
        temporary.rename(out)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and _reusable(out, config, False):
            return _paths(out, reused=True)  # another process was quicker
        raise RlaifFastError(f"{out}: cannot write the dataset: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _paths(out, reused=False)


def _paths(root: Path, *, reused: bool) -> DatasetPaths:
    sft, rl, validation, test = (root / f"{split}.jsonl" for split in SPLITS)
    return DatasetPaths(root, sft, rl, validation, test, reused)


def _reusable(out: Path, config: SyntheticConfig, overwrite: bool) -> bool:
    """Whether `out` holds the dataset; raises if it holds something that must not be replaced."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder for the dataset")
    marker = out / _MARKER
    if not marker.exists():
        if any(out.iterdir()):
            raise UsageError(f"{out} is not empty and not a dataset made here; name another folder")
        return False
    try:
        values = json.loads(marker.read_text())
        same = values.get("digest") == config.digest()
        damaged = _damaged(out, config, values) if same else None
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"{marker} is damaged ({error}); delete the folder or name another") from error
    if overwrite:
        return same and damaged is None
    if not same:
        raise UsageError(
            f"{out} holds a dataset of another configuration; name another folder, or overwrite it"
        )
    if damaged is not None:
        raise RlaifFastError(
            f"damaged: {out / damaged} is not as it was made; delete {out}, and it is made again"
        )
    return True


def _damaged(root: Path, config: SyntheticConfig, marker: Mapping[str, Any]) -> str | None:
    """A file of rows, or a folder of videos, that does not match the marker."""
    known, found = marker["files"], _digests(root, config)
    return next((name for name in found if known.get(name) != found[name]), None)


def _digests(root: Path, config: SyntheticConfig) -> dict[str, str | None]:
    """A digest of each file of rows, and one of each folder of videos; None if something is missing."""
    found: dict[str, str | None] = {}
    for split in SPLITS:
        videos = [root / _video(config, split, index) for index in range(config.clips(split))]
        for name, files in ((f"{split}.jsonl", [root / f"{split}.jsonl"]), (f"videos/{split}", videos)):
            whole = all(file.is_file() for file in files)
            found[name] = text_digest(" ".join(map(file_digest, files))) if whole else None
    return found


def _video(config: SyntheticConfig, split: str, index: int) -> str:
    return f"videos/{split}/{index:05d}.{config.container}"


def _write_all(
    root: Path, config: SyntheticConfig, workers: int, progress: Callable[[int, int], None] | None
) -> None:
    clips = [(split, index) for split in SPLITS for index in range(config.clips(split))]
    rows_of = dict.fromkeys(SPLITS, 0)
    seen: dict[str, str] = {}  # signature -> split
    make_clip = functools.partial(_make_clip, root, config)
    with contextlib.ExitStack() as stack:
        lines = {}
        for split in SPLITS:
            (root / "videos" / split).mkdir(parents=True)
            lines[split] = stack.enter_context((root / f"{split}.jsonl").open("w", encoding="utf-8"))
        made: Iterator[tuple[str, list[dict[str, Any]]]] = map(make_clip, clips)
        if workers > 1 and len(clips) > 4 * _CLIPS_AT_ONCE:
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, context, end_with_parent, (EXIT_CODE,))
            stack.callback(pool.shutdown, cancel_futures=True)
            # The workers start here with Ctrl-C blocked: it ends the parent, and the parent ends them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            made = pool.map(make_clip, clips, chunksize=_CLIPS_AT_ONCE)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for done, ((split, _), (signature, rows)) in enumerate(zip(clips, made), 1):
            assert seen.setdefault(signature, split) == split, "splits share a world"
            lines[split].writelines(json.dumps(row) + "\n" for row in rows)
            rows_of[split] += len(rows)
            if progress is not None:
                progress(done, len(clips))
    marker = {
        "digest": config.digest(),
        "config": dataclasses.asdict(config),
        "questions": rows_of,
        "files": _digests(root, config),
    }
    (root / _MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def _make_clip(
    root: Path, config: SyntheticConfig, clip: tuple[str, int]
) -> tuple[str, list[dict[str, Any]]]:
    """Write one clip's video; returns the signature of its world and the rows about it."""
    split, index = clip
    world = _world(config, split, index)
    video = _video(config, split, index)
    frames = render(world, width=config.width, height=config.height, num_frames=config.num_frames)
    encode_video(root / video, frames, fps=config.fps, codec=config.codec)
    return world.signature, list(_rows(config, split, index, world, video))


def _world(config: SyntheticConfig, split: str, index: int) -> World:
    name = f"{config.seed}/{split}/{index}"
    difficulty = random.Random(f"{name}/difficulty").choices(list(LEVELS), config.difficulty)[0]
    world = sample_world(name, difficulty, SPLITS[split])
    return with_digits(world) if random.Random(f"{name}/ocr").random() < config.ocr_fraction else world


def _rows(
    config: SyntheticConfig, split: str, index: int, world: World, video: str
) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{world.name}/questions")
    found = drafts(world, rng)
    kept = sorted(rng.sample(range(len(found)), min(len(found), config.questions_per_clip)))
    for draft in (found[k] for k in kept):
        noisy = split == "sft" and rng.random() < config.label_noise
        options: tuple[str, ...] = ()
        if rng.random() < config.multiple_choice_fraction:
            options, right = draft.choices(rng, config.num_options)
            letters = LETTERS[: len(options)]
            clean, form = letters[right], f"([{letters}])"
            answer = rng.choice(letters.replace(clean, "")) if noisy else clean
        else:
            clean, form = draft.answer, draft.form
            answer = draft.corrupted(rng).answer if noisy else clean
            if split == "sft" and draft.confused and rng.random() < config.label_confusion:
                answer, noisy = draft.confused, True
        metadata: dict[str, Any] = {
            "world": world.name,
            "difficulty": world.difficulty,
            "kind": draft.kind,
            "form": form,
        }
        if noisy:
            metadata |= {"corrupted": True, "clean_answer": clean}
        row: dict[str, Any] = {
            "id": f"{split}-{index:05d}-{draft.kind}",
            "video": video,
            "question": draft.question,
        }
        row |= {"options": list(options)} if options else {}
        yield {**row, "answer": answer, "category": draft.category, "metadata": metadata}
