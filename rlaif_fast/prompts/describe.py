"""Describes how a model would be trained, from its folder but without its weights."""

from __future__ import annotations

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.families import check_shared_prefix, find_family
from rlaif_fast.policy.frontend import load_frontend
from rlaif_fast.policy.loading import base_of
from rlaif_fast.prompts.make import check_encoding, make_encoder


def describe_model(model: str) -> list[tuple[str, str]]:
    """Pairs of a term and its description.

    Args:
        model: A folder, possibly of LoRA adapters, or a hub name.

    Raises:
        UsageError: The model would be refused; the message says why.
    """
    from transformers import __version__ as version

    base = base_of(model)
    frontend = load_frontend(base)
    config, spec = frontend.config, frontend.patch_spec
    family = find_family(config.model_type)
    tokens = check_encoding(frontend)
    encoder = make_encoder(frontend, spec.budget(spec.factor**2, spec.factor**2))
    known = "not in the table; its own processor makes the prompts" if family is None else family.name
    lines = [("transformers", version), ("type", config.model_type), ("family", known)]
    if base != model:
        lines.insert(0, ("adapters", f"LoRA, of {base}"))
    try:
        check_shared_prefix(config)
        lines.append(("shared prefix", "yes"))
    except UsageError as error:
        lines.append(("shared prefix", f"no: {str(error).removeprefix('shared_prefix: ')}"))
    if family is not None:
        fixed = f"whole, {spec.factor}x{spec.factor}"
        cut = f"patches of {spec.patch_size}x{spec.patch_size}, {spec.temporal_patch_size} frames"
        lines += [
            ("frames", cut if spec.tokens_a_frame is None else fixed),
            ("pictures", "yes" if family.pictures else "no, videos alone"),
            (
                "LoRA",
                f"{', '.join(family.lora_names(config))} of the decoder, unless lora_target_modules says else",
            ),
        ]
        lines += [("note", note) for note in family.notes(config, lora=True)]
    reasons = "the template opens it; taught answers close it first" if encoder.reasons else "none"
    return [*lines, ("reasoning", reasons), ("trial prompt", f"{tokens} tokens for a clip of four frames")]
