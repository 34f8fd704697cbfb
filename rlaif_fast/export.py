"""`python -m rlaif_fast.export RUN --out DIR`: the best checkpoint of a run as a folder that other programs load.

The folder holds safetensors, tokenizer, chat template and processor settings, each of the last two under its older and
its current name. It is loaded once more, and its log-probabilities are compared with the checkpoint's.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlaif_fast.cli import run_command
from rlaif_fast.command_parser import CommandParser
from rlaif_fast.errors import RlaifFastError, UsageError, first_line, typed_line, writing
from rlaif_fast.outputs import refuse_records
from rlaif_fast.policy.weights import ADAPTER_CONFIG, save_quietly

if TYPE_CHECKING:
    import torch

    from rlaif_fast.policy.loading import LoadedModel

# Largest allowed difference of a log-probability; equal weights on the same device give 0.
TOLERANCE = 1e-5
PARTIAL = ".partial"  # holds what is written until it has been checked
CONFIG = "config.json"
IMAGE, VIDEO, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(prog="rlaif_fast.export", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write; new or empty")
    parser.add_argument("--merge", action="store_true", help="merge LoRA adapters into their base model")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="what weights are written in; auto is the checkpoint's own, with --merge the base model's",
    )
    parser.add_argument(
        "--push", metavar="NAME", help="also upload to this repository of the Hugging Face hub"
    )
    options = parser.parse_args(argv)

    def command() -> int:
        if options.push is not None:
            check_name(options.push)
        folder = export(options.run, options.out, merge=options.merge, dtype=options.dtype)
        if options.push is not None:
            push(folder, options.push)
        return 0

    return run_command(command)


def export(run: Path, out: Path, *, merge: bool = False, dtype: str = "auto") -> Path:
    """Write a folder that `from_pretrained` loads.

    Args:
        run: A run's folder, for its best checkpoint, or a checkpoint.
        out: A new or empty folder.
        merge: Merge LoRA adapters into the model they were trained on; else they are written unchanged, and name it.
        dtype: Dtype of the written weights: "float32", "bfloat16", "float16", or "auto" for that of the checkpoint or
            of the model that adapters are merged into.

    Raises:
        UsageError: There is no such checkpoint, `out` is not empty, there is nothing to merge, or a dtype is given for
            adapters that are written unchanged.
        RlaifFastError: The written model computes something else than the checkpoint, or the system refused to write
            it; it is removed.
    """
    from rlaif_fast.policy.loading import DTYPES, adapter_folder, base_of

    source, out = checkpoint_of(run.expanduser()), out.expanduser()
    adapters = adapter_folder(str(source)) is not None
    if merge and not adapters:
        raise UsageError(f"merge: {source} holds no LoRA adapters; leave --merge out")
    if adapters and not merge and dtype != "auto":
        raise UsageError(
            f"dtype: LoRA adapters are written as they are, got {dtype!r}; leave --dtype out, or add --merge"
        )
    if out.exists() and (not out.is_dir() or any(path.name != PARTIAL for path in out.iterdir())):
        raise UsageError(f"out: {out} is not empty; choose another folder")
    refuse_records("out", out)
    loaded = load(source)
    if merge and dtype == "auto":
        dtype = dtype_of(base_of(str(source)))
    if dtype != "auto":
        for parameter in loaded.model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    before = probe(loaded)
    partial = out / PARTIAL
    with writing(out):
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
        partial.mkdir(parents=True)
        try:
            if adapters and not merge:
                for path in source.glob("adapter_*"):
                    shutil.copy2(path, partial / path.name)
            else:
                save_quietly(loaded.model, partial)
            tokenizer = cast(Any, loaded.tokenizer)
            tokenizer.save_pretrained(partial)
            write_settings(partial, settings_of(source), tokenizer.chat_template)
            difference = float((probe(load(partial)) - before).abs().max())
            if not difference <= TOLERANCE:
                raise RlaifFastError(
                    f"the exported model's log-probabilities differ from the checkpoint's by {difference:.1e}"
                )
            # The files that make the folder a model come last, so that an incomplete folder is no model.
            for path in sorted(partial.iterdir(), key=lambda path: path.name in (CONFIG, ADAPTER_CONFIG)):
                path.rename(out / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: loaded again, log-probabilities differ by at most {difference:.1e}")
    return out


def checkpoint_of(run: Path) -> Path:
    """The best checkpoint of a run, after checking it, or `run` itself if it is a checkpoint.

    Raises:
        RlaifFastError: Its weights have changed since they were written.
        UsageError: It is neither.
    """
    from rlaif_fast.runs.checkpoint import CheckpointStore
    from rlaif_fast.runs.folder import RunDir
    from rlaif_fast.runs.integrity import check_weights

    if any((run / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):
        check_weights(run)
        return run
    run_dir = RunDir.open(str(run))
    return CheckpointStore(run_dir.checkpoints, {}, read_only=True).checked("best")


def load(folder: Path) -> LoadedModel:
    """Load a checkpoint in the dtype of its weights; LoRA adapters are merged in float32."""
    from rlaif_fast.policy.loading import ModelOptions, adapter_folder, load_model

    dtype = "float32" if adapter_folder(str(folder)) else dtype_of(str(folder))
    return load_model(ModelOptions(model=str(folder), dtype=cast(Any, dtype), device="cpu"))


def dtype_of(model: str) -> str:
    """The dtype of a model's weights, from its configuration or its decoder's; float32 if neither names one."""
    from rlaif_fast.policy.frontend import read_config

    config = read_config(model)
    dtype = config.dtype or config.get_text_config().dtype or "float32"
    return str(dtype).removeprefix("torch.")


def probe(loaded: LoadedModel) -> torch.Tensor:
    """Log-probabilities along a short answer about a generated clip, for the tokens that may be drawn (M, at most V).

    Those of other tokens are about -30000, where float32 resolves only three decimals.
    """
    import torch

    from rlaif_fast.data.schema import Example
    from rlaif_fast.policy.policy import Policy
    from rlaif_fast.prompts.make import TRIAL_PIXELS, make_encoder, trial_clip

    spec = loaded.patch_spec
    encoder = make_encoder(loaded, spec.budget(spec.factor**2, max(spec.factor**2, TRIAL_PIXELS)))
    prompt = encoder.encode(Example(id="probe", question="What is shown?", media=()), [trial_clip()])
    answer = torch.tensor([encoder.encode_answer("Nothing.")])
    policy = Policy(loaded.model, loaded.tokenizer, shared_prefix=False)
    with torch.no_grad(), policy.evaluating():
        hidden = policy.response_hidden([prompt], answer, torch.tensor([answer.shape[1]]))
        return policy.logits(hidden).float().log_softmax(-1)[:, policy.token_ids_allowed]


def settings_of(source: Path) -> dict[str, dict]:
    """The processor settings beside a checkpoint, by file name."""
    paths = [source / name for name in (IMAGE, VIDEO, BOTH)]
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()}


def write_settings(out: Path, settings: dict[str, dict], chat_template: str | dict[str, str] | None) -> None:
    """Write processor settings and chat template in the older layout and in the current one.

    The older layout has one file per kind of medium and chat_template.json, the current one processor_config.json and
    chat_template.jinja. Of named templates, the older layout gets only the default one.
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template["default"]
    both = settings.get(BOTH, {})
    image = settings.get(IMAGE) or both.get("image_processor") or settings.get(VIDEO)
    video = settings.get(VIDEO) or both.get("video_processor") or image
    files: dict[str, Any] = {}
    if image is not None:
        files[IMAGE], files[VIDEO] = image, video
        files[BOTH] = {"image_processor": image, "video_processor": video} | both
    if chat_template is not None:
        files["chat_template.json"] = {"chat_template": chat_template}
        (out / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    for name, values in files.items():
        (out / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_name(name: str) -> None:
    """Refuse a name that no repository of the hub can have.

    Raises:
        UsageError: It is such a name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"push: {first_line(error)}") from error


def push(folder: Path, name: str) -> None:
    """Upload an exported folder to a private repository of the Hugging Face hub, which is created if it does not exist.

    Raises:
        RlaifFastError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # other people's library, over a network
        raise RlaifFastError(
            f"push: {folder} is whole, and was not uploaded ({typed_line(error)}); upload it with: "
            f"hf upload {name} {folder}"
        ) from error
    print(f"uploaded to {name}")


if __name__ == "__main__":
    sys.exit(main())
