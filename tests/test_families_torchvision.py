"""Real Hugging Face processors, which need torchvision: what each makes of a clip, and models outside the table."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import family_checkpoints
import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision is not installed, and video processors need it")

import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from transformers.video_utils import VideoMetadata

from rlaif_fast.data.schema import Example
from rlaif_fast.policy.families import FAMILIES
from rlaif_fast.policy.families.smolvlm import in_words
from rlaif_fast.policy.loading import ModelOptions, load_model
from rlaif_fast.policy.policy import Policy
from rlaif_fast.prompts.encoder import PromptEncoder
from rlaif_fast.prompts.make import make_encoder
from rlaif_fast.rollout.base import SamplingParams
from rlaif_fast.rollout.plain import PlainSampler
from rlaif_fast.video import PixelBudget
from rlaif_fast.video.base import Clip

FPS, FRAMES = 2.0, 6
NORMALISED: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
MIN_PIXELS, MAX_PIXELS = 64, 10**6
PATCHES = {
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
}
SQUARE = {"size": {"height": 16, "width": 16}}
# model type -> settings of the video processor, and of the processor.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "internvl": (SQUARE, {"image_seq_length": 4}),
    "llava_onevision": (SQUARE, {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
    "smolvlm": (
        {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}},
        {"image_seq_len": 4},
    ),
    "video_llama_3": ({**PATCHES, "temporal_patch_size": 1}, {}),
    "gemma3": (SQUARE, {"image_seq_length": 4}),
}
GRIDS = {**PATCHES, "temporal_patch_size": 2}
# model type -> names under which a published tokenizer holds its marks.
TOKENS = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "smolvlm": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}
# transformers 5 leaves the template's own marks around Qwen3-VL's timestamped blocks. In transformers 4.57, which came
# with the model, and in vLLM the blocks replace them, and so they do here.
OUTER_MARKS = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
# Gemma 3 resizes by a bilinear filter, SmolVLM2 twice. In units of a normalised pixel, which spans 2.
MAX_DIFFERENCE = {"gemma3": 0.1, "smolvlm": 0.05}


def make_tokenizer(model_type: str):
    tokenizer = family_checkpoints.make_tokenizer(model_type)
    for name, token in TOKENS.get(model_type, {}).items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def of_torchvision(names: Any, fallback: Any) -> Any:
    found = names or fallback
    return getattr(transformers, found["torchvision"] if isinstance(found, dict) else found)


def make_processor(model_type: str, tokenizer) -> Any:
    settings, more = SETTINGS.get(model_type, (GRIDS, {}))
    similar = "glm4v" if model_type.startswith("glm") else "qwen2_vl"
    image_class = of_torchvision(
        IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type), IMAGE_PROCESSOR_MAPPING_NAMES[similar]
    )
    parts = {"image_processor": image_class(**NORMALISED, **(SQUARE if model_type == "gemma3" else {}))}
    if model_type != "gemma3":
        video_class = of_torchvision(
            VIDEO_PROCESSOR_MAPPING_NAMES.get(model_type), VIDEO_PROCESSOR_MAPPING_NAMES[similar]
        )
        parts["video_processor"] = video_class(**NORMALISED, **settings)
    processor = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
    return processor(tokenizer=tokenizer, chat_template=tokenizer.chat_template, **parts, **more)


def make_clip() -> Clip:
    """Smooth frames, as of a camera, of a size that no tower takes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(FRAMES, 3, 4, 5, generator=generator)
    frames = torch.nn.functional.interpolate(coarse, size=(44, 60), mode="bicubic").clamp(0, 1)
    frames = (255 * frames).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    frames[3] = frames[2]
    return Clip(frames, tuple(index / FPS for index in range(FRAMES)), key="clip", sample_fps=FPS)


def processed(processor: Any, model_type: str, clip: Clip, question: str) -> dict[str, torch.Tensor]:
    content = FAMILIES[model_type].content(clip)
    frames = clip.frames.permute(0, 3, 1, 2)
    shown: dict[str, Any] = {"images": [list(frames)]}
    many = FRAMES
    if content["type"] == "video":
        about = VideoMetadata(
            total_num_frames=FRAMES, fps=FPS, frames_indices=list(range(FRAMES)), duration=FRAMES / FPS
        )
        shown, many = {"videos": [frames], "video_metadata": [about], "do_sample_frames": False}, 1
    messages = [{"role": "user", "content": [content] * many + [{"type": "text", "text": question}]}]
    own = FAMILIES[model_type].chat_template(processor.tokenizer, [clip])
    text = processor.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, chat_template=own
    )
    return processor(text=[text], return_tensors="pt", **shown)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_prompt_is_the_processors(model_type, monkeypatch) -> None:
    if model_type == "smolvlm":
        module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
        monkeypatch.setattr(module, "num2words", in_words, raising=False)
    tokenizer, clip = make_tokenizer(model_type), make_clip()
    config = family_checkpoints.make_config(model_type, tokenizer)
    spec = FAMILIES[model_type].patch_spec(config, {**NORMALISED, "merge_size": 2})
    encoder = PromptEncoder(tokenizer, model_type, spec, spec.budget(MIN_PIXELS, MAX_PIXELS))
    prompt = encoder.encode(Example(id="0", question="what color"), [clip])
    made = processed(make_processor(model_type, tokenizer), model_type, clip, "what color")

    expected = made["input_ids"][0].tolist()
    if model_type in OUTER_MARKS:
        start, end = (tokenizer.convert_tokens_to_ids(f"<|vision_{x}|>") for x in ("start", "end"))
        first = expected.index(start)
        last = len(expected) - 1 - expected[::-1].index(end)
        assert expected[last - 1] == end  # the blocks end with one of their own
        del expected[last], expected[first]
    assert prompt.input_ids.tolist() == expected

    pixels = made["pixel_values_videos" if "pixel_values_videos" in made else "pixel_values"]
    (media,) = prompt.media
    assert pixels.numel() == media.patches.numel()
    if "video_grid_thw" in made:
        assert made["video_grid_thw"].tolist() == [list(media.grid_thw)]
    if "video_compression_mask" in made:
        assert media.kept is not None
        assert made["video_compression_mask"].tolist() == media.kept.tolist()
    difference = float((pixels.reshape(-1) - media.patches.reshape(-1)).abs().max())
    assert difference <= MAX_DIFFERENCE.get(model_type, 1e-6)
    if model_type in MAX_DIFFERENCE:
        assert difference > 1e-3  # it is another resize


# --- families outside the table -----------------------------------------------------------------------------

CROPPED = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
IMAGES = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
OTHERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llava_next_video": (
        "LlavaNextVideoProcessor",
        "LlavaNextVideoVideoProcessor",
        "LlavaNextImageProcessor",
        {"image_grid_pinpoints": [[16, 16]]},
    ),
    "video_llava": ("VideoLlavaProcessor", "VideoLlavaVideoProcessor", "VideoLlavaImageProcessor", {}),
}


def write_other_checkpoint(model_type: str, folder: Path) -> Path:
    processor, video, image, more = OTHERS[model_type]
    model, tokenizer = family_checkpoints.make_model(model_type)
    model.save_pretrained(folder)
    getattr(transformers, processor)(
        video_processor=getattr(transformers, video)(**CROPPED, **NORMALISED),
        image_processor=getattr(transformers, image)(**IMAGES, **NORMALISED, **more),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_a_family_outside_the_table_trains_through_its_processor(model_type, tmp_path) -> None:
    folder = write_other_checkpoint(model_type, tmp_path / "model")
    frames = 8 if model_type == "video_llava" else 4  # what its forward is written for
    output = tmp_path / "run"
    options = {"shared_prefix": "false", "nframes": frames}
    assert family_checkpoints.train_a_little(folder, output, tmp_path / "cache", **options) == 0
    family_checkpoints.assert_trained(folder, output)


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_a_family_outside_the_table_sees_the_frames(model_type, tmp_path) -> None:
    loaded = load_model(ModelOptions(model=str(write_other_checkpoint(model_type, tmp_path))))
    encoder = make_encoder(loaded, PixelBudget(16, 256, 1024))
    policy = Policy(loaded.model, loaded.tokenizer, shared_prefix=False)
    question = Example(id="0", question="what color")
    frames = make_clip().frames[torch.arange(8) % FRAMES]
    times = tuple(index / FPS for index in range(len(frames)))
    clips = [
        Clip(shown, times, key=key, sample_fps=FPS) for key, shown in (("a", frames), ("b", frames.flip(0)))
    ]
    prompts = [encoder.encode(question, [clip]) for clip in clips]
    assert prompts[0].input_ids.tolist() == prompts[1].input_ids.tolist()
    rollout = PlainSampler(policy).sample(prompts, 2, SamplingParams(max_new_tokens=4, seed=0))
    lengths = rollout.mask.sum(1)
    logps = policy.response_logps(prompts, rollout.token_ids, lengths)
    torch.testing.assert_close(logps, rollout.logps[rollout.mask], rtol=1e-4, atol=1e-4)
    other = policy.response_logps(prompts[::-1], rollout.token_ids, lengths)
    assert float((logps - other).abs().max()) > 1e-3
