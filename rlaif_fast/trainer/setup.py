"""Builds the parts of a run from its configuration."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlaif_fast.algorithms import make_algorithm
from rlaif_fast.algorithms.registry import find_algorithm
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError, require
from rlaif_fast.machine import cores
from rlaif_fast.oracle import CircuitBreaker, Oracle, ShuffledOracle, build_oracle
from rlaif_fast.oracle.base import gives_scores
from rlaif_fast.oracle.feedback import CorruptedOracle
from rlaif_fast.oracle.wrappers import WINDOW, check_window, oracles_in
from rlaif_fast.policy.loading import LoadedModel, ModelOptions, load_model
from rlaif_fast.policy.model_files import base_record, file_prints
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.batches import BatchMaker, filling_prompt
from rlaif_fast.prompts.encoder import PromptEncoder
from rlaif_fast.prompts.make import make_encoder
from rlaif_fast.rollout import make_sampler
from rlaif_fast.rollout.reasoning import check_budget
from rlaif_fast.runs.checkpoint import CheckpointStore, read_processor_files
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.runs.logging import RunLogger, SilentLogger
from rlaif_fast.termination import Termination
from rlaif_fast.trainer.cached_model import tiny_folder
from rlaif_fast.trainer.datasets import load_data
from rlaif_fast.trainer.inputs import refuse_other_data, refuse_other_model
from rlaif_fast.trainer.notes import older_names, uneven_steps
from rlaif_fast.trainer.options import TINY_FAMILIES, TrainConfig
from rlaif_fast.trainer.run import Datasets, Run
from rlaif_fast.trainer.scoring import BEHIND_REASONING, behind_reasoning, scorer_of
from rlaif_fast.video import ClipCache, ClipStore, FrameSampling


def build_run(
    world: World,
    config: TrainConfig,
    run_dir: RunDir,
    logger: RunLogger | SilentLogger,
    open_parts: contextlib.ExitStack,
    termination: Termination,
) -> tuple[Run, tuple[str, ...]]:
    """The parts of a run, and what a reader of its report has to know.

    Args:
        world: The processes of the run.
        config: Its configuration.
        run_dir: Its folder.
        logger: Where to log.
        open_parts: Closes the parts that need closing.
        termination: Knows whether the run has to end.
    """
    data_notes: list[str] = []
    reads_files = world.rank % world.local_size == 0  # one process of each machine
    with world.main_first():
        with logger.timer("data"):
            data = load_with_progress(config, logger, data_notes.append)
            refuse_other_data(run_dir, data, files=reads_files)
        with logger.timer("model"):
            options = resolved_model(config, data)
            prints = file_prints(options.model) if reads_files else {}
            refuse_other_model(run_dir, prints)
    with logger.timer("model"):
        loaded = load_model(options)
        policy = make_policy(loaded, options)
        world.broadcast([p.data for p in policy.model.parameters()])
    make_batch = open_parts.enter_context(
        make_batch_maker(loaded, config, quarantine=run_dir.path / "quarantine.jsonl")
    )
    with logger.timer("model"):
        shard(policy, config, world, make_batch.encoder)
    config, reasoning = for_reasoning(config, make_batch.encoder)
    notes = (
        *loaded.notes,
        *reasoning,
        *data_notes,
        *uneven_steps(config, world.size),
        *older_names(config),
    )
    for note in notes:
        logger.message(note)
    files = read_processor_files(options.model) | base_record(loaded.model, prints)
    oracle = make_oracle(config)
    sampler = make_sampler(policy, config.sampler, config.sampler_options)
    if hasattr(sampler, "close"):
        open_parts.callback(sampler.close)
    run = Run(
        config=config,
        policy=policy,
        sampler=sampler,
        make_batch=make_batch,
        oracle=oracle,
        scorer=scorer_of(oracle, config.oracle_options, reasons=make_batch.encoder.reasons),
        algorithm=make_algorithm(config),
        data=data,
        logger=logger,
        store=CheckpointStore(
            run_dir.checkpoints,
            files,
            read_only=not world.is_main,
            run=run_dir,
            keep=config.keep_checkpoints,
            asynchronous=config.async_checkpoints,
        ),
        world=world,
        termination=termination,
    )
    return run, notes


def load_with_progress(
    config: TrainConfig, logger: RunLogger | SilentLogger, note: Callable[[str], None]
) -> Datasets:
    """Load the data, with a bar while synthetic clips are made; `note` takes what a reader has to know."""
    total = (
        config.synthetic_sft_clips
        + config.synthetic_rl_clips
        + config.synthetic_validation_clips
        + config.synthetic_test_clips
    )
    if config.data != "synthetic":
        return load_data(config, note=note)
    with logger.stage("clips", total=total) as update:
        return load_data(config, workers=cores(), progress=lambda done, _: update(done), note=note)


def set_threads(threads: int, processes: int = 1) -> None:
    """Use `threads` CPU threads; 0 leaves it to torch, or gives each of several processes its share."""
    if threads > 0 or processes > 1:
        torch.set_num_threads(threads or max(1, cores() // processes))


def make_policy(loaded: LoadedModel, options: ModelOptions) -> Policy:
    """Wrap a loaded model with the switches of the configuration.

    Raises:
        UsageError: The switches do not fit the model or the device.
    """
    try:
        return Policy(
            loaded.model,
            loaded.tokenizer,
            shared_prefix=options.shared_prefix,
            attention_backend=options.attention_backend,
            max_packed_tokens=options.max_packed_tokens,
            max_cached_tokens=options.max_cached_tokens,
            feature_cache_bytes=options.feature_cache_bytes,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def shards_together(config: TrainConfig, processes: int, on_machine: int) -> int:
    """How many processes together hold the weights once: 1 without sharding.

    Args:
        config: The configuration.
        processes: Processes of the run.
        on_machine: Those on this machine.

    Raises:
        UsageError: Sharding is on, and the processes cannot be divided that way.
    """
    if config.sharding == "none":
        return 1
    together = config.sharding_size or on_machine
    if processes == 1:
        raise UsageError(
            "sharding: fsdp2 needs several processes, and this run has one; use torchrun, --num_processes N, or "
            "sharding: none"
        )
    if together == 1 or processes % together:
        raise UsageError(
            f"sharding_size: expected a divisor of the {processes} processes larger than 1, got {together}"
        )
    return together


def shard(policy: Policy, config: TrainConfig, world: World, encoder: PromptEncoder) -> None:
    """Shard the policy's weights over the processes, if the configuration says so."""
    together = shards_together(config, world.size, world.local_size)
    if together > 1:
        from rlaif_fast.policy.shard import make_mesh, shard_policy

        world.connect()
        mesh = make_mesh(policy.device, world.size, together)
        filler = filling_prompt(encoder, with_media=policy.vision.trains)
        shard_policy(policy, mesh, filler, offload=config.optimizer_offload)


def make_batch_maker(
    loaded: LoadedModel, config: TrainConfig, *, blank_frames: bool = False, quarantine: Path | None = None
) -> BatchMaker:
    """A function that turns rows into encoded prompts for this model; on a GPU it decodes, resizes and cuts there."""
    spec = loaded.patch_spec
    on_gpu = loaded.device.type == "cuda"
    pixels = spec.budget(config.min_pixels, config.max_pixels, config.total_pixels)
    encoder = make_encoder(
        loaded,
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
    fault = sampling.fault()
    if fault is not None:
        raise UsageError(f"{fault}; give that many or more")
    store = ClipStore(
        sampling,
        resize=pixels,
        cache=ClipCache(memory_bytes=config.frame_cache_bytes),
        decoder=config.decoder,
        device=loaded.device,
        workers=config.decode_workers,
        timeout=config.decode_timeout,
        quarantine=quarantine,
        max_bad_fraction=config.max_bad_fraction,
    )
    return BatchMaker(encoder, store, blank_frames=blank_frames)


def for_reasoning(config: TrainConfig, encoder: PromptEncoder) -> tuple[TrainConfig, tuple[str, ...]]:
    """The configuration of a model that reasons before it answers, and what a reader has to know.

    If the chat template leaves the prompt inside the reasoning, the answer is what follows the reasoning, unless
    `extract` says otherwise.

    Raises:
        UsageError: `max_reasoning_tokens` cannot be enforced.
    """
    budget = config.max_reasoning_tokens
    if not encoder.reasons:
        require(
            budget is None, "max_reasoning_tokens", "null, as the chat template opens no reasoning", budget
        )
        return config, ()
    note = "reasoning: the template opens it, so taught answers close it first"
    if budget is not None:
        require(config.sampler != "vllm", "max_reasoning_tokens", "null where sampler is vllm", budget)
        check_budget(budget, encoder.tokenizer, config.max_completion_length)
        note += f"; behind {budget} tokens it is closed, and the loss leaves the closing tokens out"
    options, whole = behind_reasoning(config.oracle, config.oracle_options)
    if whole:
        names = ", ".join(map(repr, dict.fromkeys(whole)))
        note += f"; the oracle {names} sees responses whole, reasoning included"
    if options == config.oracle_options:
        return config, (note,)
    note += f"; the oracle sees what stands behind it (extract: {BEHIND_REASONING})"
    return dataclasses.replace(config, oracle_options=options), (note,)


def make_oracle(config: TrainConfig) -> Oracle:
    """The oracle of the configuration, inside the wrappers of the experiments.

    Raises:
        UsageError: It cannot be built, lacks scores that the algorithm needs, or cannot judge so many responses.
    """
    options, window = oracle_options(config)
    oracle = build_oracle(config.oracle, max_invalid_fraction=None, **options)
    if find_algorithm(config).feedback == "scores" and not gives_scores(oracle):
        raise UsageError(
            f"algorithm: {config.algorithm} with advantage {config.advantage} needs scores, and the oracle "
            f"{config.oracle!r} only orders responses; use --algorithm grpo_rank --advantage directed, or an oracle "
            "with scores such as reference or reward_model"
        )
    for judge in oracles_in(oracle):
        if hasattr(judge, "check_group_size"):  # a judge in this process, perhaps inside another oracle
            judge.check_group_size(config.num_generations)
    if config.feedback != "exact":
        oracle = CorruptedOracle(
            oracle, kind=config.feedback, strength=config.feedback_strength, seed=config.seed
        )
    if config.oracle_noise > 0:
        oracle = CorruptedOracle(oracle, kind="gaussian", strength=config.oracle_noise, seed=config.seed)
    if config.oracle_shuffle:
        oracle = ShuffledOracle(oracle, seed=config.seed)
    return CircuitBreaker(oracle, max_invalid_fraction=config.max_invalid_fraction, window=window)


def oracle_options(config: TrainConfig) -> tuple[dict[str, Any], int]:
    """The options of the oracle itself, and how many groups its circuit breaker looks back.

    Raises:
        UsageError: An option belongs elsewhere.
    """
    options = dict(config.oracle_options)
    for key, place in (("max_invalid_fraction", "max_invalid_fraction"), ("name", "oracle")):
        if key in options:
            raise UsageError(f"oracle_options: {key}: set the run's own key {place} instead")
    window = options.pop("window", None)
    window = WINDOW if window is None else window
    check_window(window)
    return options, window


def resolved_model(config: TrainConfig, data: Datasets) -> ModelOptions:
    """The model options with "tiny" replaced by the tiny policy's folder."""
    names = {field.name for field in dataclasses.fields(ModelOptions)}
    options = ModelOptions(**{name: getattr(config, name) for name in names})
    if is_tiny(config.model):
        options.model = str(tiny_folder(config, data))
    return options


def is_tiny(model: str) -> bool:
    """Whether the name is that of a model made on the spot.

    Raises:
        UsageError: It looks like such a name but is none, nor a folder.
    """
    if model in TINY_FAMILIES:
        return True
    if model.startswith("tiny") and not Path(model).is_dir():
        raise UsageError(f"model: unknown tiny model {model!r}; there are {', '.join(TINY_FAMILIES)}")
    return False
