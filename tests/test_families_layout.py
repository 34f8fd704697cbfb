"""The text that stands for a video, against what each family's Hugging Face processor writes.

The processors cannot be built without torchvision; the methods that write the text need only a few of their attributes.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import family_checkpoints
import pytest
import torch

from rlaif_fast.policy.families import FAMILIES
from rlaif_fast.policy.families.smolvlm import in_words
from rlaif_fast.video.base import Clip
from rlaif_fast.video.preprocess import preprocess

SETTINGS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "merge_size": 2}
FPS, FRAMES = 2.0, 6
# model type -> module, class and the attributes of the processor that its text depends on.
PROCESSORS = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VLProcessor", {"video_token": "<|video_pad|>"}),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLProcessor", {"video_token": "<|video_pad|>"}),
    "qwen3_vl": (
        "qwen3_vl",
        "Qwen3VLProcessor",
        {
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    ),
    "glm4v": ("glm4v", "Glm4vProcessor", {"image_token": "<|image|>"}),
    "glm46v": ("glm46v", "Glm46VProcessor", {"image_token": "<|image|>"}),
    "internvl": (
        "internvl",
        "InternVLProcessor",
        {
            "image_token": "<IMG_CONTEXT>",
            "image_seq_length": 4,
            "start_image_token": "<img>",
            "end_image_token": "</img>",
        },
    ),
    "llava_onevision": (
        "llava_onevision",
        "LlavaOnevisionProcessor",
        {"video_token": "<video>", "num_image_tokens": 16},
    ),
    "smolvlm": (
        "smolvlm",
        "SmolVLMProcessor",
        {
            "image_token": "<image>",
            "image_seq_len": 4,
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
    ),
    "video_llama_3": ("video_llama_3", "VideoLlama3Processor", {"video_token": "<|video_pad|>"}),
}
PROCESSORS["qwen3_vl_moe"] = PROCESSORS["qwen3_5"] = PROCESSORS["qwen3_5_moe"] = PROCESSORS["qwen3_vl"]
PROCESSORS["glm4v_moe"] = PROCESSORS["glm4v"]
# What the processor leaves standing around its text.
AROUND = {
    "qwen2_vl": "<|vision_start|>{}<|vision_end|>",
    "qwen2_5_vl": "<|vision_start|>{}<|vision_end|>",
    "glm4v": "<|begin_of_video|>{}<|end_of_video|>",
    "glm46v": "<|begin_of_video|>{}<|end_of_video|>",
    "glm4v_moe": "<|begin_of_video|>{}<|end_of_video|>",
}


def a_clip() -> Clip:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (FRAMES, 24, 24, 3), generator=generator).to(torch.uint8)
    frames[3] = frames[2]
    times = tuple(index / FPS for index in range(FRAMES))
    return Clip(frames, times, key="clip", sample_fps=FPS)


def test_every_family_but_one_is_compared() -> None:
    assert set(FAMILIES) - set(PROCESSORS) == {"gemma3"}  # its processor knows no videos


@pytest.mark.parametrize("model_type", sorted(PROCESSORS))
def test_the_text_of_a_video_is_the_processors(model_type, monkeypatch) -> None:
    module_name, class_name, attributes = PROCESSORS[model_type]
    module = importlib.import_module(f"transformers.models.{module_name}.processing_{module_name}")
    write = getattr(getattr(module, class_name), "replace_video_token", None)
    if write is None:
        pytest.skip("this transformers writes the text inside the processor's call")
    monkeypatch.setattr(module, "num2words", in_words, raising=False)
    family = FAMILIES[model_type]
    config = family_checkpoints.make_config(model_type, family_checkpoints.make_tokenizer(model_type))
    spec, clip = family.patch_spec(config, SETTINGS), a_clip()
    media = preprocess(clip, spec, min_pixels=256, max_pixels=1024)
    grid = torch.tensor([media.grid_thw])
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(
            merge_size=spec.merge_size, temporal_patch_size=spec.temporal_patch_size
        ),
        **attributes,
    )
    for name in ("_calculate_timestamps", "replace_frame_token_id"):
        if hasattr(getattr(module, class_name), name):
            method = getattr(getattr(module, class_name), name)
            setattr(
                processor, name, lambda *args, method=method, **options: method(processor, *args, **options)
            )
    inputs = {
        "video_grid_thw": grid,
        "video_merge_sizes": torch.tensor([spec.merge_size]),
        "video_compression_mask": media.kept,
        "pixel_values_videos": torch.zeros(1, FRAMES, 3, 16, 16),
        "pixel_values": torch.zeros(1, FRAMES, 3, 16, 16),
        "video_metadata": [
            SimpleNamespace(
                fps=FPS,
                timestamps=list(clip.timestamps),
                frames_indices=list(range(FRAMES)),
                duration=FRAMES / FPS,
            )
        ],
    }
    if model_type == "video_llama_3":
        assert media.kept is not None
        assert not media.kept.all()  # the frame that repeats another is dropped but for a token
    expected = AROUND.get(model_type, "{}").format(write(processor, inputs, 0))
    assert family.video_text(clip, media, spec) == expected


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (8, "eight"),
        (15, "fifteen"),
        (40, "forty"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (128, "one hundred and twenty-eight"),
        (1001, "one thousand and one"),
        (2345, "two thousand, three hundred and forty-five"),
    ],
)
def test_numbers_in_words(number, words) -> None:
    assert in_words(number) == words
