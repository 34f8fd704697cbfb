"""What is checked in seconds, before a run begins."""

from __future__ import annotations

from pathlib import Path

import torch

from rlaif_fast.errors import UsageError, require
from rlaif_fast.loss import backends
from rlaif_fast.oracle.preflight import ask_once
from rlaif_fast.oracle.registry import find_oracle
from rlaif_fast.policy import quantization
from rlaif_fast.policy.families import check_shared_prefix
from rlaif_fast.policy.frontend import load_frontend
from rlaif_fast.policy.loading import base_of, resolve_device, resolve_dtype
from rlaif_fast.prompts.make import check_encoding
from rlaif_fast.runs.integrity import check_weights
from rlaif_fast.trainer.datasets import load_data, needs_answers, own_files, read_file
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.setup import is_tiny, make_oracle, oracle_options, shards_together
from rlaif_fast.video.preprocess import PATCHIFIERS

MODEL_ORACLES = ("embedding", "local", "reward_model")  # building one loads its model


def preflight(config: TrainConfig) -> None:
    """Check what can be checked in seconds, before anything of an earlier run is replaced.

    Raises:
        RlaifFastError: The checkpoint it starts from has changed since it was written.
        UsageError: The model, the data or the oracle does not fit the configuration.
    """
    # Draws are numbered from a multiple of the seed, in 64 bits.
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
    check_model(config.model, shared_prefix=config.shared_prefix, system_prompt=config.system_prompt)
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


def check_model(model: str, *, shared_prefix: bool = False, system_prompt: str | None = None) -> None:
    """Refuse a model that cannot be trained, as far as this is known without its weights.

    Its configuration is read, and a question about a generated clip is encoded.
    """
    if is_tiny(model):
        return
    frontend = load_frontend(base_of(model))
    if shared_prefix:
        check_shared_prefix(frontend.config)
    check_encoding(frontend, system_prompt)


def check_backend(config: TrainConfig, device: torch.device) -> None:
    """Refuse a backend of the loss that cannot run on the device, or in the dtype of the weights."""
    dtype = resolve_dtype(config.dtype, device)
    for row in backends.rows("linear_loss"):
        reason = row.refuses(device.type, dtype, config.num_generations)
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
    options, _ = oracle_options(config)
    find_oracle(config.oracle, options)
    if config.oracle not in MODEL_ORACLES:
        ask_once(make_oracle(config))
