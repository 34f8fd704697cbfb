"""Builds the parts of a run from its configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlaif_fast.algorithms.registry import find_algorithm
from rlaif_fast.data.benchmarks import BENCHMARKS
from rlaif_fast.distributed.launch import under_torchrun
from rlaif_fast.distributed.world import World
from rlaif_fast.errors import UsageError, require
from rlaif_fast.loss import backends
from rlaif_fast.machine import cores
from rlaif_fast.oracle import CircuitBreaker, Oracle, ShuffledOracle, build_oracle
from rlaif_fast.oracle.base import gives_scores
from rlaif_fast.oracle.feedback import CorruptedOracle
from rlaif_fast.oracle.preflight import ask_once
from rlaif_fast.oracle.registry import find_oracle
from rlaif_fast.oracle.wrappers import WINDOW, check_window
from rlaif_fast.policy import quantization
from rlaif_fast.policy.families import check_shared_prefix
from rlaif_fast.policy.frontend import load_frontend
from rlaif_fast.policy.loading import LoadedModel, ModelOptions, adapter_folder, resolve_device
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.weights import adapter_config
from rlaif_fast.prompts.batches import BatchMaker, filling_prompt
from rlaif_fast.prompts.encoder import PromptEncoder
from rlaif_fast.prompts.make import check_encoding, make_encoder
from rlaif_fast.rollout.reasoning import check_budget
from rlaif_fast.runs.integrity import check_weights
from rlaif_fast.trainer.cached_model import tiny_folder
from rlaif_fast.trainer.datasets import load_data, needs_answers, own_files, read_file
from rlaif_fast.trainer.options import TINY_FAMILIES, TrainConfig
from rlaif_fast.trainer.run import Datasets
from rlaif_fast.trainer.scoring import BEHIND_REASONING
from rlaif_fast.video import ClipCache, ClipStore, FrameSampling
from rlaif_fast.video.preprocess import PATCHIFIERS

TAKES_EXTRACT = ("reference", "api", "local")
OPTION_PATHS = {"model", "path", "cache"}  # of an oracle
PATHS = ("model", "data", "sft_data", "validation_data", "test_data", "media_root", "sft")
MODEL_ORACLES = ("embedding", "local", "reward_model")  # building one loads its model


def process_count(config: TrainConfig) -> int:
    """How many processes the configuration asks for on this machine; under torchrun those that it started."""
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if config.num_processes > 0:
        return config.num_processes
    # Small operators gain nothing from a second thread, so on a CPU a second process halves the step.
    return 2 if cores() > 1 and resolve_device(config.device).type == "cpu" else 1


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration as it is kept with the run: whole paths of what is there, and the number of processes."""
    whole: dict[str, Any] = {name: _whole_path(getattr(config, name)) for name in PATHS}
    whole["cache_dir"] = _whole_path(config.cache_dir, made=True)
    whole["oracle_options"] = _whole_paths(config.oracle_options)
    return dataclasses.replace(config, num_processes=process_count(config), **whole)


def _whole_path(value: str | None, *, made: bool = False) -> str | None:
    """A path, or that of a benchmark, as it is from any folder; other words as they are, and what is not there.

    Args:
        value: The path, or another word.
        made: It is a path, which may be made later.
    """
    if value is None or value in {*TINY_FAMILIES, "synthetic", "auto", "none"}:
        return value
    name, colon, folder = value.partition(":")
    if name not in BENCHMARKS or Path(value).expanduser().exists():
        name, colon, folder = "", "", value
    path = Path(folder).expanduser()
    is_there = path.exists() if not made else not path.is_absolute()
    return f"{name}{colon}{path.resolve()}" if is_there else value


def _whole_paths(options: Any) -> Any:
    """The options of an oracle, and of those in it, with whole paths."""
    if isinstance(options, list):
        return [_whole_paths(option) for option in options]
    if not isinstance(options, dict):
        return options
    found = {name: _whole_paths(value) for name, value in options.items()}
    for name in OPTION_PATHS & found.keys():
        if isinstance(found[name], str):
            found[name] = _whole_path(found[name], made=name == "cache")
    return found


def preflight(config: TrainConfig) -> None:
    """Check what can be checked in seconds, before anything of an earlier run is replaced.

    Raises:
        RlaifFastError: It starts from a checkpoint whose weights are not as they were written.
        UsageError: The model, the data or the oracle cannot be what the configuration says.
    """
    # Draws are numbered from a multiple of it, in 64 bits.
    require(abs(config.seed) < 2**32, "seed", "a number of 32 bits", config.seed)
    device = resolve_device(config.device)
    check_backend(config, device)
    if config.patchify_backend != "auto":
        reason = PATCHIFIERS[config.patchify_backend][0](device.type, torch.float32)
        if reason is not None:
            raise UsageError(f"patchify_backend: {config.patchify_backend} cannot run here: {reason}")
    needless = config.optimizer_offload and device.type == "cpu"
    require(not needless, "optimizer_offload", "false where the device is cpu", True)
    shards_together(config, config.num_processes, config.num_processes)
    check_model(config.model, shared_prefix=config.shared_prefix)
    for start in (config.model, config.sft):
        check_weights(Path(start).expanduser())
    if config.load_in_4bit:
        quantization.check_available()
    if config.sft not in ("auto", "none") and not Path(config.sft).expanduser().is_dir():
        raise UsageError(f"sft: expected auto, none or a checkpoint folder, got {config.sft!r}")
    if config.resume is None and config.overwrite_output_dir:
        check_overwrite(config)
    check_oracle(config)
    if config.data == "synthetic":
        for split, file in own_files(config).items():
            read_file(file, config, require_answer=needs_answers(config, split))
    else:
        load_data(config)


def check_model(model: str, *, shared_prefix: bool = False) -> None:
    """Refuse a model that cannot be trained as far as that is known without its weights.

    Its configuration is read, and a question about a generated clip is encoded.
    """
    if is_tiny(model):
        return
    adapters = adapter_folder(model)
    if adapters is not None:
        model = adapter_config(adapters, f"model: {model}")["base_model_name_or_path"]
    frontend = load_frontend(model)
    if shared_prefix:
        check_shared_prefix(frontend.config)
    check_encoding(frontend)


def check_backend(config: TrainConfig, device: torch.device) -> None:
    """Refuse a backend of the loss that cannot run on the device."""
    for row in backends.rows("linear_loss"):
        reason = row.refuses(device.type, torch.float32, config.num_generations)
        if row.name == config.backend and reason is not None:
            raise UsageError(f"backend: {row.name} cannot run here: {reason}")


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
    options, _ = _oracle_options(config)
    find_oracle(config.oracle, options)
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


def seed_step(config: TrainConfig, world: World, stage: str, step: int) -> None:
    """Seed the libraries for one step: dropout differs by process and step, and not where a run was resumed."""
    name = f"{config.seed}/{world.rank}/{stage}/{step}"
    seed_everything(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big"))


def make_policy(loaded: LoadedModel, options: ModelOptions) -> Policy:
    """Wrap a loaded model with the switches of the configuration.

    Raises:
        UsageError: They do not fit the model or the device.
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
    """How many processes hold the weights together once: 1 without sharding.

    Args:
        config: The configuration.
        processes: Of the run.
        on_machine: Those of them on this machine.

    Raises:
        UsageError: Sharding is asked for, and the processes cannot be divided so.
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
    """Cut the policy's weights over the processes, where that is asked for."""
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
    """What turns rows into encoded prompts for this model; on a GPU frames are decoded, resized and cut there."""
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
        quarantine=quarantine,
        max_bad_fraction=config.max_bad_fraction,
    )
    return BatchMaker(encoder, store, blank_frames=blank_frames)


def for_reasoning(config: TrainConfig, encoder: PromptEncoder) -> tuple[TrainConfig, tuple[str, ...]]:
    """The configuration of a model that reasons before it answers, and what a reader has to know.

    Where the chat template leaves the prompt inside the reasoning, what stands behind it is the answer, unless
    `extract` says otherwise.

    Raises:
        UsageError: `max_reasoning_tokens` cannot be kept.
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
    if "extract" in config.oracle_options:
        return config, (note,)
    if config.oracle not in TAKES_EXTRACT:
        return config, (f"{note}; the oracle {config.oracle!r} sees responses whole, reasoning included",)
    options = config.oracle_options | {"extract": BEHIND_REASONING}
    notes = (f"{note}; the oracle sees what stands behind it (extract: {BEHIND_REASONING})",)
    return dataclasses.replace(config, oracle_options=options), notes


def make_oracle(config: TrainConfig) -> Oracle:
    """The oracle of the configuration, with the wrappers of the experiments around it.

    Raises:
        UsageError: It cannot be built, or has no scores where the algorithm needs them.
    """
    options, window = _oracle_options(config)
    oracle = build_oracle(config.oracle, max_invalid_fraction=None, **options)
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
        oracle = CorruptedOracle(oracle, kind="gaussian", strength=config.oracle_noise, seed=config.seed)
    if config.oracle_shuffle:
        oracle = ShuffledOracle(oracle, seed=config.seed)
    return CircuitBreaker(oracle, max_invalid_fraction=config.max_invalid_fraction, window=window)


def _oracle_options(config: TrainConfig) -> tuple[dict[str, Any], int]:
    """The options of the oracle itself, and how many groups its circuit breaker looks back.

    Raises:
        UsageError: One belongs elsewhere.
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
