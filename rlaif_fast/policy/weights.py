"""Weights of a folder, all or nothing: a partial fit is refused, naming the missing and surplus weights."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn

from rlaif_fast.errors import UsageError, first_line
from rlaif_fast.outputs import MARKER
from rlaif_fast.policy.families import FAMILIES
from rlaif_fast.policy.model_files import ADAPTER_CONFIG
from rlaif_fast.policy.shard import cut_like

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Settings of adapters that do not change what they compute, or that the weights themselves show.
ELSEWHERE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
KEEP_BASE = {"gaussian", "eva", "orthogonal"}  # initializations that leave the base unchanged
SHOWN = 4  # names in a message
FLOAT32_COPY = "float32_copy"  # the attribute of a parameter


def set_float32_copy(parameter: nn.Parameter, copy: Tensor | None) -> None:
    """Attach to a 16-bit parameter the float32 copy that an optimizer updates in its place; None detaches it.

    A loss that sums a gradient in float32 can then pass it on unrounded; `parameter.grad` has 16 bits.
    """
    vars(parameter)[FLOAT32_COPY] = copy


def float32_copy(parameter: Tensor) -> Tensor | None:
    """The float32 copy of a parameter, if an optimizer keeps one."""
    return vars(parameter).get(FLOAT32_COPY)


def save_quietly(model: Any, folder: Path, **options: Any) -> None:
    """`model.save_pretrained` without a progress bar, which would break up a run's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, **options)
    finally:
        if shown:
            logging.enable_progress_bar()


def refuse_partial(
    what: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str] = ()
) -> None:
    """Refuse weights unless every name and shape matches the model's.

    Args:
        what: The weights, for the message: "model: FOLDER".
        missing: Names that the model has and the weights do not.
        unexpected: Names that the weights have and the model does not.
        mismatched: Names with another shape.

    Raises:
        UsageError: Any of these is not empty.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    found = {kind: sorted(map(str, names)) for kind, names in kinds.items()}
    said = [f"{len(names)} {kind} ({_first(names)})" for kind, names in found.items() if names]
    if said:
        raise UsageError(f"{what} fits the model only in part: of its weights, {'; '.join(said)}")


def refuse_unlike(what: str, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights unless names and shapes equal those of the model's `own`; see `refuse_partial`."""
    shapes = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    refuse_partial(what, own.keys() - weights.keys(), weights.keys() - own.keys(), shapes)


def load_strictly(model_class: Any, folder: str | Path, what: str, **options: Any) -> Any:
    """`from_pretrained`, refused if the folder's weights fit only in part.

    Args:
        model_class: A class of transformers.
        folder: A folder or hub name.
        what: As in `refuse_partial`.
        **options: For `from_pretrained`.

    Raises:
        UsageError: A weight is missing, unexpected, or of another shape.
    """
    model, missing, unexpected, mismatched = _load(model_class, folder, what, options)
    refuse_partial(what, missing, unexpected, mismatched)
    return model


def load_whole(
    model_class: Any, folder: str | Path, what: str, *, unread: str | None = None, **options: Any
) -> Any:
    """`from_pretrained`, refused if the folder lacks a weight of the model; it may hold more.

    Args:
        model_class: A class of transformers.
        folder: A folder or hub name.
        what: As in `refuse_partial`.
        unread: A part of the model that is not used and may be missing.
        **options: For `from_pretrained`.

    Raises:
        UsageError: A weight has another shape, or is missing and would be initialized at random.
    """
    model, missing, _, mismatched = _load(model_class, folder, what, options)
    needed = [name for name in missing if unread is None or unread not in name.split(".")]
    refuse_partial(what, needed, (), mismatched)
    return model


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Name the owner of a damaged file of weights in the error."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # e.g. out of memory
        raise UsageError(
            f"{what}: its weights cannot be read ({type(error).__name__}: {first_line(error)}); a file is damaged, or "
            "not all of it was fetched (git lfs pull)"
        ) from error


def _load(
    model_class: Any, folder: str | Path, what: str, options: Mapping[str, Any]
) -> tuple[Any, list[str], list[str], list[str]]:
    """A model, and the names of its weights that are missing, unexpected and of another shape."""
    with _readable(what):
        model, found = model_class.from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # Names come alone or with both shapes.
    mismatched = [
        entry[0] if isinstance(entry, (tuple, list)) else entry for entry in found["mismatched_keys"]
    ]
    return model, list(found["missing_keys"]), list(found["unexpected_keys"]), mismatched


def load_adapters(model: Any, folder: Path, what: str) -> None:
    """Put the LoRA weights of a folder into a model of peft, in place.

    Args:
        model: A `PeftModel`.
        folder: The folder with adapter_config.json and the weights.
        what: As in `refuse_partial`.

    Raises:
        UsageError: The folder holds no adapters; they were trained with another r, lora_alpha or use_rslora, or for
            other layers; or a weight is missing, unexpected, or of another shape.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    saved, ours = adapter_config(folder, what), model.peft_config["default"]
    settings = {
        "lora_r": ("r", None),
        "lora_alpha": ("lora_alpha", None),
        "use_rslora": ("use_rslora", False),
    }
    for option, (name, usual) in settings.items():
        value = saved.get(name, usual)
        if value != getattr(ours, name):
            raise UsageError(
                f"{what} was trained with {option} {value}, and the run has {getattr(ours, name)}; "
                f"set {option} to {value}"
            )
    started = saved.get("init_lora_weights")
    if isinstance(started, str) and started not in KEEP_BASE:
        raise UsageError(
            f"{what} was trained with init_lora_weights {started!r}, which changes the weights of the base; save it as "
            "an adapter of the base as it was (path_initial_model_for_weight_conversion of peft)"
        )
    for name in sorted(saved.keys() - ELSEWHERE):
        if saved[name] and saved[name] not in ("none", getattr(ours, name, None)):
            raise UsageError(f"{what} was trained with {name} {saved[name]}, which a run here does not have")
    with _readable(what):
        weights = load_peft_weights(str(folder), device="cpu")
    own = get_peft_model_state_dict(model)
    refuse_unlike(what, weights, own)
    set_peft_model_state_dict(model, cut_like(weights, own))


def adapter_config(folder: Path, what: str) -> dict[str, Any]:
    """The settings of the LoRA adapters in a folder.

    Raises:
        UsageError: It holds none or other than LoRA adapters, they cannot be read, or their weights are missing.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UsageError(f"{what} holds no {ADAPTER_CONFIG}, and the run has LoRA adapters (lora_r)")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{what}: {path.name} is not valid JSON ({error})") from error
    if not isinstance(saved, dict) or not saved.get("base_model_name_or_path"):
        raise UsageError(f"{what}: {path.name} names no base_model_name_or_path")
    if saved.get("peft_type") != "LORA":
        raise UsageError(
            f"{what} holds adapters of the type {saved.get('peft_type')}, and those of LoRA are taken alone"
        )
    if saved.get("revision") not in (None, "main"):
        raise UsageError(
            f"{what} was trained on the revision {saved['revision']} of {saved['base_model_name_or_path']}; name a "
            f"folder that holds it as base_model_name_or_path in {path.name}, and take the revision out"
        )
    if not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise UsageError(f"{what} holds {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS[0]}")
    return saved


def check_config(folder: str | Path, what: str) -> None:
    """Refuse a folder that does not say how large its model is: transformers would build one of billions of weights.

    A hub name is left to the hub.

    Raises:
        UsageError: The path does not exist, or the folder lacks a whole config.json.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        if looks_like_a_path(str(folder)):
            raise UsageError(f"{what}: cannot load {str(folder)!r}: there is no such folder")
        return
    config = path / "config.json"
    if not config.is_file():
        is_run = (path / MARKER).is_file()
        hint = (
            f"; it is a run: `python -m rlaif_fast.export {folder} --out DIR` writes its best model"
            if is_run
            else ""
        )
        raise UsageError(f"{what}: cannot load {str(folder)!r}: the folder has no config.json{hint}")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{what}: cannot load {str(folder)!r}: config.json is not valid JSON ({error})"
        ) from error
    if isinstance(values, dict) and values.get("model_type") not in (None, *FAMILIES):
        return  # has a layout of its own
    sized = isinstance(values, dict) and "vision_config" in values
    if not sized or not ("text_config" in values or "hidden_size" in values):
        raise UsageError(
            f"{what}: cannot load {str(folder)!r}: config.json has no vision_config and text_config, so the size of "
            "the model is not known"
        )


def looks_like_a_path(name: str) -> bool:
    """Whether a name that is no folder can only be meant as one: hub names have at most one slash and no space."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name, re.ASCII) is None or (
        "/" in name and Path(name).parent.is_dir()
    )


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
