"""The options of an evaluation, and the checkpoint that it loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif_fast.cli import parse_config
from rlaif_fast.errors import UsageError, check_fields, require, require_least
from rlaif_fast.evals.answering import Answering
from rlaif_fast.policy.loading import LoadedModel, ModelOptions, load_model
from rlaif_fast.trainer.cached_model import defaults_of, refuse_made
from rlaif_fast.trainer.options import TrainConfig

BENCHMARK_ONLY = (
    "output_dir",
    "answering",
    "subtitles",
    "judge",
    "judge_options",
    "before",
    "limit",
)
PATHS = ("run", "model", "data", "output_dir", "judge", "before", "output", "media_root")
FROM_RUN = (
    "media_root",
    "fps",
    "nframes",
    "min_frames",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "decode_workers",
    "decode_timeout",
    "max_completion_length",
)


@dataclass
class EvaluateConfig:
    """What to evaluate.

    From `media_root` on, null takes the run's value, or without a run the default of training.

    Attributes:
        run: Folder of a run; its best checkpoint is evaluated, with its configuration.
        model: A checkpoint folder, a folder of LoRA adapters or a hub name, in place of the run's.
        data: A JSONL file, in place of the run's test split; with `benchmark` the folder with its files.
        benchmark: "videomme", "msvd_qa", "msrvtt_qa", "activitynet_qa", "nextqa", "mvbench" or "jsonl"; its
            answers, tables and bars are written to `output_dir`.
        output_dir: Folder for a benchmark's results; an interrupted evaluation continues there. null is
            `evals/BENCHMARK`.
        answering: How multiple choice is answered in a benchmark: "generate" generates the answer, "letter" takes the
            most likely letter, "likelihood" the option with the most likely text.
        subtitles: Show the model the subtitles of the video (Video-MME).
        judge: Oracle that grades the answers to open questions, yes or no and 0 to 5; null for none.
        judge_options: Options of the judge.
        before: The `items.jsonl` of another evaluation on the same questions, to compare with.
        limit: Answer only the first questions of a benchmark; null takes all.
        num_processes: Processes that share the questions on this machine; under torchrun those that torchrun started.
        blank_frames: Replace every frame by grey, to see what the policy answers without the video.
        output: JSONL file for the predictions; null writes none.
        device: "auto", "cpu", "cuda".
        videos_per_step: Videos answered at once, while the next ones are decoded.
        debug: Show tracebacks.
        media_root: Folder that relative media paths start from.
        fps: Frames sampled per second.
        nframes: Frames sampled per video, in place of `fps`.
        min_frames: Fewest frames sampled.
        max_frames: Most frames sampled.
        min_pixels: Fewest pixels of a resized frame or image.
        max_pixels: Most pixels of a resized frame or image.
        total_pixels: Most pixels of all frames of a prompt together.
        decode_workers: Processes that scan and decode videos, for each process of the evaluation.
        decode_timeout: Seconds to scan a video, and again to decode it; one that takes longer is unreadable.
        max_completion_length: Most tokens in an answer.
    """

    run: str | None = None
    model: str | None = None
    data: str | None = None
    benchmark: str | None = None
    output_dir: str | None = None
    answering: Answering = "generate"
    subtitles: bool = False
    judge: str | None = None
    judge_options: dict[str, Any] = field(default_factory=dict)
    before: str | None = None
    limit: int | None = None
    num_processes: int = 1
    blank_frames: bool = False
    output: str | None = None
    device: str = "auto"
    videos_per_step: int = 64
    debug: bool = False
    media_root: str | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    decode_workers: int | None = None
    decode_timeout: float | None = None
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in PATHS:
            require(getattr(self, name) != "", name, "a name", "")
        refuse_made(self.model)
        require_least("videos_per_step", self.videos_per_step, 1)
        require_least("num_processes", self.num_processes, 1)
        require_least("max_completion_length", self.max_completion_length, 1)
        if self.fps is not None and self.nframes is not None:
            raise UsageError("fps: give it or nframes, not both")
        if self.benchmark is None:
            self._check_plain()
            return
        if (self.run is None and self.model is None) or self.data is None:
            raise UsageError(
                "evaluate: a benchmark needs --data FOLDER, and --model CHECKPOINT or --run RUN_DIR"
            )
        if self.media_root is not None:
            raise UsageError("media_root: a benchmark's media are found below its data folder; leave it out")
        if self.output is not None:
            raise UsageError("output: a benchmark writes its answers to output_dir; leave output out")
        require(
            self.answering in ("generate", "letter", "likelihood"),
            "answering",
            "generate, letter or likelihood",
            self.answering,
        )
        require_least("limit", self.limit, 1)
        if self.judge is None and self.judge_options:
            raise UsageError("judge_options: there is no judge; name one, or leave them out")

    def _check_plain(self) -> None:
        if self.run is None and (self.model is None or self.data is None):
            raise UsageError("evaluate: give --run RUN_DIR, or --model CHECKPOINT and --data FILE.jsonl")
        for name in BENCHMARK_ONLY:
            if getattr(self, name) not in (EvaluateConfig.__dataclass_fields__[name].default, {}):
                raise UsageError(f"{name}: only a benchmark takes it; add --benchmark, or leave it out")


def configuration(options: EvaluateConfig, tell: Callable[[str], None] = lambda line: None) -> TrainConfig:
    """The run's configuration with the command's changes; its `model` is the checkpoint to evaluate.

    Args:
        options: What to evaluate.
        tell: Gets a line if the run's config.yaml is damaged and a checkpoint's copy is used, or the model is tiny.

    Raises:
        UsageError: There is no such run, or its configuration is lost.
        RlaifFastError: The weights have changed since they were written.
    """
    from rlaif_fast.runs.checkpoint import CheckpointStore
    from rlaif_fast.runs.folder import RunDir
    from rlaif_fast.runs.integrity import check_weights
    from rlaif_fast.trainer.resume import saved_config

    config = TrainConfig()
    if options.model is not None:
        check_weights(Path(options.model).expanduser())
        under = defaults_of(options.model, tell) if options.run is None else None
        if under is not None:
            config = parse_config(TrainConfig, [], prog="rlaif_fast.evaluate", description="", under=under)
    given = {name: value for name in ("model", *FROM_RUN) if (value := getattr(options, name)) is not None}
    if options.fps is not None:
        given["nframes"] = None  # a rate takes the place of the run's number
    if options.run is not None:
        run_dir = RunDir.open(options.run)
        config = saved_config(run_dir, tell)
        best = CheckpointStore(run_dir.checkpoints, {}, read_only=True).checked("best")
        given = {"model": str(best)} | given
    return dataclasses.replace(config, device=options.device, **given)


def load_checkpoint(config: TrainConfig) -> LoadedModel:
    """Load the model of the configuration; LoRA adapters are merged into the model they were trained on.

    Raises:
        UsageError: It cannot be loaded, or the adapters' base model cannot.
    """
    usual = ModelOptions()
    config = dataclasses.replace(
        config,
        lora_r=0,
        load_in_4bit=False,  # what is served: adapters merged into the unquantised weights
        lora_alpha=usual.lora_alpha,
        use_rslora=usual.use_rslora,
        lora_dropout=usual.lora_dropout,
        lora_modules=usual.lora_modules,
        lora_target_modules=usual.lora_target_modules,
        train_router=False,
        gradient_checkpointing=False,
        freeze_vision_tower=None,
        freeze_projector=None,
        freeze_language_model=None,
    )
    return load_model(config)
