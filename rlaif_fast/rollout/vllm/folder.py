"""The folder that vLLM starts from: configuration, tokenizer and preprocessor settings; weights come beside them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from rlaif_fast.errors import writing
from rlaif_fast.policy.families import unwrap
from rlaif_fast.policy.policy import Policy

# vLLM builds the family's processor at its start, though it never gets any input.
PROCESSORS = {
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}


def write_model_files(policy: Policy, folder: Path, max_model_len: int) -> None:
    """Write everything that vLLM reads of a model, except its weights.

    Args:
        policy: Whose model it is.
        folder: Where to write.
        max_model_len: Tokens of the longest prompt and response, and so the most of a frame.
    """
    model = unwrap(policy.model)
    config = copy.deepcopy(model.config)
    # The configuration lacks this where the model was made from it.
    config.architectures = [type(model).__name__]
    with writing(folder):
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        for name, settings in _preprocessors(config, max_model_len).items():
            (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _preprocessors(config: Any, max_model_len: int) -> dict[str, dict]:
    vision = config.vision_config
    processor, video_processor = PROCESSORS[config.model_type]
    side = vision.patch_size * vision.spatial_merge_size  # pixels along a side of one token
    settings = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "processor_class": processor,
        "size": {"shortest_edge": side**2, "longest_edge": max_model_len * side**2},
    }
    return {
        "preprocessor_config.json": settings | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": settings | {"video_processor_type": video_processor},
    }
