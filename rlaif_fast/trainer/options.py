"""The configuration: one dataclass a component, under the names TRL uses where TRL has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.registry import find_algorithm
from rlaif_fast.errors import check_fields, require, require_least, require_positive
from rlaif_fast.loss.options import MAX_GROUP_SIZE
from rlaif_fast.oracle.options import OracleOptions
from rlaif_fast.policy.loading import ModelOptions, check_lora
from rlaif_fast.runs.trackers import check_trackers

TINY_FAMILIES = {"tiny": "qwen3_vl", "tiny-qwen3_vl": "qwen3_vl", "tiny-qwen2_5_vl": "qwen2_5_vl"}

OWN_SAMPLERS = ("auto", "shared_prefix", "cuda_graphs", "plain")  # these draw with the policy itself


@dataclass
class DataOptions:
    """The datasets, and how clips become frames.

    Attributes:
        data: "synthetic" (clips made on the spot), a JSONL file, or a folder with sft, rl, validation and test .jsonl.
            A single file serves SFT and RL; `holdout_fraction` of its videos is held out for validation, and as much
            for the test, unless they have files of their own.
        sft_data: JSONL for supervised fine-tuning, in place of the one in `data`.
        validation_data: JSONL that checkpoints are chosen by, in place of the one in `data`; or a published benchmark,
            as "videomme:FOLDER" (see `rlaif_fast.evaluate --benchmark`).
        test_data: JSONL that the final figures are measured on, in place of the one in `data`.
        media_root: Folder that relative media paths start from; null is the folder of the JSONL file.
        holdout_fraction: Share of the videos held out for validation, and as many for the test, where it has no file.
        scored_answer: Part of an answer that is scored: the content of its `<answer>` block ("answer"), or the "whole".
        on_bad_row: Stop at the first file with bad rows ("raise"), or leave such rows out and count them ("skip").
        max_bad_fraction: Share of unreadable media above which the run stops.
        decode_workers: Processes that scan and decode videos, for each process of the run.
        decode_timeout: Seconds to scan a video, and again to decode it; one that takes longer is unreadable.
        fps: Frames sampled per second.
        nframes: Frames sampled per video, in place of `fps`.
        min_frames: Fewest frames sampled.
        max_frames: Most frames sampled.
        decoder: "auto", "pyav", "dali", "torchcodec".
        patchify_backend: What cuts frames into patches: "auto" (Triton on a GPU), "triton", "torch", "reference".
        frame_cache_bytes: Bytes of decoded frames kept in memory.
        synthetic_sft_clips: Clips made for supervised fine-tuning.
        synthetic_rl_clips: Clips made for reinforcement learning.
        synthetic_validation_clips: Clips made for validation.
        synthetic_test_clips: Clips made for the test.
        synthetic_questions_per_clip: Most questions about one synthetic clip, of distinct categories.
        synthetic_difficulty: 1 to 3: more objects, noise and distractors.
        synthetic_ocr_fraction: Share of the synthetic clips whose objects show digits, with questions about them.
        label_noise: Share of the synthetic SFT answers in which a random wrong fact replaces one fact.
        label_confusion: Of the synthetic SFT answers with an easily confused value ("blue", "moves left"; about a third
            of all), the share that has the other value instead: an annotator's systematic error.
        multiple_choice_fraction: Share of the synthetic questions asked with options.
        codec: Codec of the synthetic clips, "vp9" or "h264".
    """

    data: str = "synthetic"
    sft_data: str | None = None
    validation_data: str | None = None
    test_data: str | None = None
    media_root: str | None = None
    holdout_fraction: float = 0.1
    scored_answer: Literal["answer", "whole"] = "answer"
    on_bad_row: Literal["raise", "skip"] = "raise"
    max_bad_fraction: float = 0.05
    decode_workers: int = 2
    decode_timeout: float = 300.0
    fps: float = 2.0
    nframes: int | None = None
    min_frames: int = 4
    max_frames: int = 64
    decoder: str = "auto"
    patchify_backend: Literal["auto", "triton", "torch", "reference"] = "auto"
    frame_cache_bytes: int = 2**30
    synthetic_sft_clips: int = 768
    synthetic_rl_clips: int = 768
    synthetic_validation_clips: int = 64
    synthetic_test_clips: int = 192
    synthetic_questions_per_clip: int = 4
    synthetic_difficulty: int = 1
    synthetic_ocr_fraction: float = 0.0
    label_noise: float = 0.0
    label_confusion: float = 0.65
    multiple_choice_fraction: float = 0.1
    codec: str = "vp9"

    def check_data(self) -> None:
        """Raise `UsageError` for values that cannot work."""
        for name in ("label_noise", "label_confusion", "max_bad_fraction", "synthetic_ocr_fraction"):
            require(0 <= getattr(self, name) <= 1, name, "a share in [0, 1]", getattr(self, name))
        share = self.holdout_fraction
        require(0 < share < 0.5, "holdout_fraction", "a share in (0, 0.5)", share)
        require_positive("fps", self.fps)
        require_least("decode_workers", self.decode_workers, 1)
        require_positive("decode_timeout", self.decode_timeout)
        require_least("nframes", self.nframes, 1)
        least, most = self.min_frames, self.max_frames
        require(1 <= least <= most, "min_frames", f"1 to max_frames ({most})", least)
        require_least("frame_cache_bytes", self.frame_cache_bytes, 0)
        require(self.codec in ("vp9", "h264"), "codec", "vp9 or h264", self.codec)
        level = self.synthetic_difficulty
        require(level in (1, 2, 3), "synthetic_difficulty", "1, 2 or 3", level)


@dataclass
class SftOptions:
    """The supervised stage.

    Attributes:
        sft: "auto" runs it, "none" skips it, a checkpoint folder starts RL from there.
        sft_steps: Optimizer steps.
        sft_learning_rate: Peak learning rate.
        sft_videos_per_step: Videos per step; all their questions are learned together.
        sft_warmup_steps: Steps of linear warm-up; a cosine to a tenth of the peak follows.
        sft_weight_decay: AdamW weight decay.
    """

    sft: str = "auto"
    sft_steps: int = 200
    sft_learning_rate: float = 1e-5
    sft_videos_per_step: int = 8
    sft_warmup_steps: int = 10
    sft_weight_decay: float = 0.01

    def check_sft(self) -> None:
        """Raise `UsageError` for values that cannot work."""
        require_least("sft_steps", self.sft_steps, 0)
        require_positive("sft_learning_rate", self.sft_learning_rate)
        require_least("sft_warmup_steps", self.sft_warmup_steps, 0)
        require_least("sft_weight_decay", self.sft_weight_decay, 0)
        require_least("sft_videos_per_step", self.sft_videos_per_step, 1)


@dataclass
class RlOptions:
    """The reinforcement-learning stage.

    Attributes:
        max_steps: Rollouts, each followed by its updates.
        videos_per_step: Videos per rollout, each with all its questions, up to `questions_per_video`.
        questions_per_video: Most questions about one video in a step.
        num_generations: Responses per prompt, G, 2 to 64.
        top_p: Nucleus mass kept when sampling.
        top_k: Tokens kept when sampling; 0 keeps all.
        sampler: What draws responses: "auto", "shared_prefix", "cuda_graphs" (decode steps captured on a GPU), "plain",
            "vllm", or one from the entry-point group `rlaif_fast.samplers`.
        sampler_options: Keyword arguments of that sampler, as YAML or JSON (see docs/engines.md).
        sampling_ratio_cap: Largest weight of a token where the sampler's probabilities differ from the policy's.
        rollout_lag: With 1, servers (`sampler: vllm` with `urls`) sample the next step's responses while the policy
            learns from this step's; the ratio corrects for the update in between. 0 samples with the current weights.
        num_iterations: Passes over each rollout; more than 1 makes the clipping matter.
        steps_per_generation: Optimizer steps per pass; the rollout is split into as many parts, by group.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up.
        lr_scheduler_type: "cosine" (to `min_lr_ratio` of the peak), "linear" or "constant".
        min_lr_ratio: Where the cosine ends, as a share of the peak.
        weight_decay: AdamW weight decay.
        adam_beta1: AdamW beta 1.
        adam_beta2: AdamW beta 2.
        max_grad_norm: Gradient clipping.
        optimizer_offload: Keep float32 weights, gradients and moments in main memory, and update there. Of 18 bytes per
            trained bfloat16 weight, 2 stay on the GPU. Each gradient and each new weight crosses the bus. With
            `sharding`, all shards are kept there, also those of frozen weights.
        mask_truncated_completions: Leave responses without an end of sequence out of the loss.
        dynamic_sampling: Replace groups without signal (all tied) by fresh prompts.
        dynamic_sampling_rounds: Most extra rollouts per step for that.
        eval_steps: Steps between two evaluations on the validation set; a checkpoint is written at each. Supervised
            fine-tuning evaluates and writes at every fourth of them, and at its end.
        metric_for_best_model: Validation metric that selects the best checkpoint: "accuracy"; "oracle", the share of
            greedy answers that the run's oracle ranks above those from the start of RL; "none" keeps the last; "auto"
            is "oracle" where answers are free text or missing, else "accuracy".
        async_checkpoints: Copy a checkpoint's contents and write them while the run continues. The copy takes main
            memory. A run that is killed during the writing resumes from the checkpoint before.
        keep_checkpoints: Newest checkpoints that are kept, at least 2, so that a run goes on where one is damaged.
        early_stopping_patience: Evaluations without a better score after which the stage ends; 0 never ends it early.
    """

    max_steps: int = 500
    videos_per_step: int = 8
    questions_per_video: int = 16
    num_generations: int = 8
    top_p: float = 1.0
    top_k: int = 0
    sampler: str = "auto"
    sampler_options: dict[str, Any] = field(default_factory=dict)
    sampling_ratio_cap: float = 2.0
    rollout_lag: int = 0
    num_iterations: int = 1
    steps_per_generation: int = 1
    learning_rate: float = 1e-6
    warmup_steps: int = 10
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    optimizer_offload: bool = False
    mask_truncated_completions: bool = False
    dynamic_sampling: bool = False
    dynamic_sampling_rounds: int = 2
    eval_steps: int = 50
    metric_for_best_model: Literal["auto", "accuracy", "oracle", "none"] = "auto"
    async_checkpoints: bool = False
    keep_checkpoints: int = 2
    early_stopping_patience: int = 0

    def check_rl(self) -> None:
        """Raise `UsageError` for values that cannot work."""
        require(
            2 <= self.num_generations <= MAX_GROUP_SIZE,
            "num_generations",
            f"2 to {MAX_GROUP_SIZE} (a ranking needs at least two responses)",
            self.num_generations,
        )
        require_least("max_steps", self.max_steps, 0)
        require_least("videos_per_step", self.videos_per_step, 1)
        require_least("questions_per_video", self.questions_per_video, 1)
        require(0 < self.top_p <= 1, "top_p", "a share in (0, 1]", self.top_p)
        require_least("top_k", self.top_k, 0)
        require_least("sampling_ratio_cap", self.sampling_ratio_cap, 1)
        if self.rollout_lag != 0:
            self.check_rollout_lag()
        require_least("num_iterations", self.num_iterations, 1)
        groups = self.videos_per_step * self.questions_per_video
        require(
            1 <= self.steps_per_generation <= groups,
            "steps_per_generation",
            f"1 to videos_per_step * questions_per_video ({groups}), as a group is never cut",
            self.steps_per_generation,
        )
        require_positive("learning_rate", self.learning_rate)
        require_least("warmup_steps", self.warmup_steps, 0)
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "a share in [0, 1]", self.min_lr_ratio)
        require_least("weight_decay", self.weight_decay, 0)
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, "a share in [0, 1)", getattr(self, name))
        require_positive("max_grad_norm", self.max_grad_norm)
        require_least("eval_steps", self.eval_steps, 1)
        require_least("early_stopping_patience", self.early_stopping_patience, 0)
        require_least("keep_checkpoints", self.keep_checkpoints, 2)
        metrics, metric = ("auto", "accuracy", "oracle", "none"), self.metric_for_best_model
        require(metric in metrics, "metric_for_best_model", ", ".join(metrics), metric)
        patience = self.early_stopping_patience
        ends = patience == 0 or metric != "none"
        require(ends, "early_stopping_patience", "0 where metric_for_best_model is none", patience)
        require_least("dynamic_sampling_rounds", self.dynamic_sampling_rounds, int(self.dynamic_sampling))

    @property
    def rounds(self) -> int:
        """Most rollouts of one step."""
        return 1 + self.dynamic_sampling_rounds if self.dynamic_sampling else 1

    @property
    def vllm_here(self) -> bool:
        """Whether vLLM draws in the process of the run, and not on servers."""
        return self.sampler == "vllm" and not self.sampler_options.get("urls")

    def check_rollout_lag(self) -> None:
        """Refuse rollouts drawn ahead if nothing can draw them meanwhile."""
        require(self.rollout_lag == 1, "rollout_lag", "0 or 1", self.rollout_lag)
        # A sampler of another package is asked when it is made.
        served = self.sampler not in OWN_SAMPLERS and not self.vllm_here
        require(served, "rollout_lag", f"0 where sampler is {self.sampler} without urls", self.rollout_lag)
        require(
            not self.dynamic_sampling, "rollout_lag", "0 where dynamic_sampling is true", self.rollout_lag
        )


@dataclass
class RunOptions:
    """Where the run is kept, its processes, and what it records.

    Attributes:
        output_dir: Folder of the run. It must be new or empty, or be an unfinished run that `resume` continues.
        overwrite_output_dir: Replace an earlier run in `output_dir`, which is deleted once this one has made a step.
        resume: Folder of a run to continue from its last checkpoint, with the configuration it began with. A few keys
            may change (learning rates, dtype, options of the oracle); other changes are refused.
        cache_dir: Where synthetic data and tiny models are kept between runs.
        seed: Seed of weights, data, order and sampling.
        num_processes: Processes on this machine that share every step; 0 is one, or two where there is no GPU and
            more than one core. Under torchrun its processes are used instead.
        sharding: "fsdp2" shards weights, gradients and the optimizer's moments over the processes (PyTorch's FSDP2);
            with "none" each process holds the whole model.
        sharding_size: With fsdp2, how many processes together hold the weights once; 0 is all of a machine's. With more
            processes than that, each group of this size holds the weights.
        threads: CPU threads per process; 0 leaves it to torch, and divides the cores among several processes.
        logging_steps: Steps between two lines in metrics.jsonl; blind controls and evaluations always have one.
        eval_videos_per_step: Videos evaluated at once, while the next ones are decoded.
        gallery_clips: Test clips shown in the report with the responses before and after.
        tensorboard: Write TensorBoard events.
        report_to: Trackers that also get the metrics: trackio, wandb, swanlab, mlflow.
        report: Write report.html and its figures at the end.
        grace_seconds: Longest time to finish the step and save on SIGTERM or SIGHUP; then the run ends anyway. A step
            that has used half of it and has not begun to update the weights is given up.
        debug: Show tracebacks.
    """

    output_dir: str = "runs/tiny"
    overwrite_output_dir: bool = False
    resume: str | None = None
    cache_dir: str = "~/.cache/rlaif_fast"
    seed: int = 0
    num_processes: int = 1
    sharding: Literal["none", "fsdp2"] = "none"
    sharding_size: int = 0
    threads: int = 0
    logging_steps: int = 1
    eval_videos_per_step: int = 16
    gallery_clips: int = 12
    tensorboard: bool = True
    report_to: list[str] = field(default_factory=list)
    report: bool = True
    grace_seconds: float = 25.0
    debug: bool = False

    def check_run(self) -> None:
        """Raise `UsageError` for values that cannot work."""
        require_least("num_processes", self.num_processes, 0)
        require(self.sharding in ("none", "fsdp2"), "sharding", "none or fsdp2", self.sharding)
        require_least("sharding_size", self.sharding_size, 0)
        unused = self.sharding == "none" and self.sharding_size > 0
        require(not unused, "sharding_size", "0 where sharding is none", self.sharding_size)
        require_least("threads", self.threads, 0)
        require_positive("grace_seconds", self.grace_seconds)
        require_least("logging_steps", self.logging_steps, 1)
        require_least("eval_videos_per_step", self.eval_videos_per_step, 1)
        require_least("gallery_clips", self.gallery_clips, 0)
        check_trackers(self.report_to)


@dataclass
class TrainConfig(
    ModelOptions, DataOptions, SftOptions, RlOptions, AlgorithmOptions, OracleOptions, RunOptions
):
    """Every key of `python -m rlaif_fast.train`; the defaults are for a model of billions of parameters."""

    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 256 * 32 * 32
    total_pixels: int | None = 16384 * 32 * 32

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_model()
        self.check_data()
        self.check_sft()
        self.check_rl()
        self.check_algorithm()
        self.check_oracle()
        self.check_run()
        if self.sharding == "fsdp2":
            self.check_sharding()
        if self.load_in_4bit:
            self.check_4bit()
        warm = self.sampler != "vllm" or self.temperature >= 0.01
        require(warm, "temperature", "at least 0.01, as vllm draws, where sampler is vllm", self.temperature)
        from_start = self.rollout_lag == 1 and find_algorithm(self).samples_from == "start"
        require(not from_start, "rollout_lag", f"0 where algorithm is {self.algorithm}", self.rollout_lag)
        late = find_algorithm(self).has_critic and 0 < self.max_steps <= self.reward_model_steps
        require(not late, "reward_model_steps", f"less than {self.max_steps}", self.reward_model_steps)

    def check_sharding(self) -> None:
        """Refuse what cannot work with sharded weights."""
        require(self.shared_prefix, "sharding", "none where shared_prefix is false", self.sharding)
        require(not self.vllm_here, "sharding", "none where sampler is vllm without urls", self.sharding)
        fits = {"sampler": self.sampler != "cuda_graphs", "algorithm": not find_algorithm(self).has_critic}
        for name, ok in fits.items():
            require(ok, "sharding", f"none where {name} is {getattr(self, name)}", self.sharding)

    def check_4bit(self) -> None:
        """Refuse options that read or cut weights packed in 4 bits."""
        fits = {"sampler": self.sampler != "vllm", "sharding": self.sharding == "none"}
        fits["algorithm"] = not find_algorithm(self).has_critic
        for name, ok in fits.items():
            require(ok, "load_in_4bit", f"false where {name} is {getattr(self, name)}", True)

    def check_model(self) -> None:
        """Raise `UsageError` for values that cannot work."""
        require_least("lora_r", self.lora_r, 0)
        check_lora(self)
        require(0 <= self.lora_dropout < 1, "lora_dropout", "a share in [0, 1)", self.lora_dropout)
        require_least("max_packed_tokens", self.max_packed_tokens, 1)
        require_least("max_cached_tokens", self.max_cached_tokens, 1)
        require_least("feature_cache_bytes", self.feature_cache_bytes, 0)
        require(
            1 <= self.min_pixels <= self.max_pixels,
            "min_pixels",
            f"1 to max_pixels ({self.max_pixels})",
            self.min_pixels,
        )
        require(
            self.total_pixels is None or self.total_pixels >= self.min_pixels,
            "total_pixels",
            f"null, or at least min_pixels ({self.min_pixels}), which every frame gets",
            self.total_pixels,
        )
