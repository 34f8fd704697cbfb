"""Small random models of both families, prompts and responses for them; for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.prompt import EncodedPrompt
from rlaif_fast.policy.tiny import TinySize, build_tokenizer, tiny_config
from rlaif_fast.video.media import Media

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
WORDS = [f"word{i}" for i in range(40)]
TOKENIZER = build_tokenizer(WORDS)
IDS = TOKENIZER.get_vocab()
SIZE = TinySize(
    hidden_size=64, layers=3, heads=4, intermediate_size=96, vision_hidden_size=32, initializer_range=0.15
)


def make_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    seed: int = 0,
    size: TinySize = SIZE,
    mrope_section: Sequence[int] = (4, 2, 2),
):
    from transformers import AutoModelForImageTextToText

    config = tiny_config(family, len(IDS), IDS, size)
    config.text_config.num_key_value_heads = kv_heads
    config.text_config.rope_parameters["mrope_section"] = list(mrope_section)
    config.vision_config.patch_size = 4
    if family == "qwen2_5_vl":
        config.vision_config.window_size = 16
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).train()
    model.generation_config.eos_token_id = IDS["<|im_end|>"]
    model.generation_config.pad_token_id = IDS["<|endoftext|>"]
    return model


def make_policy(family: str, *, model=None, dtype: torch.dtype = torch.float32, **options) -> Policy:
    return Policy(model if model is not None else make_model(family, dtype=dtype), TOKENIZER, **options)


def make_media(key: str, grid: tuple[int, int, int], *, is_video: bool = True, seconds: float = 1.5) -> Media:
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    patches = torch.randn(grid[0] * grid[1] * grid[2], 3 * 2 * 4 * 4, generator=generator)
    return Media(patches, grid, is_video, seconds, key)


def words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    first = IDS["word0"]
    return (first + torch.randint(0, len(WORDS), (count,), generator=generator)).tolist()


def make_prompt(
    family: str, media: tuple[Media, ...] = (), *, before: int = 2, after: int = 3, seed: int = 0
) -> EncodedPrompt:
    """`before` words, each medium in its blocks, `after` words."""
    start, end = IDS["<|vision_start|>"], IDS["<|vision_end|>"]
    ids = words(before, seed)
    for m in media:
        t, h, w = m.grid_thw
        tokens = h * w // 4
        pad = IDS["<|video_pad|>" if m.is_video else "<|image_pad|>"]
        if family == "qwen3_vl" and m.is_video:
            for frame in range(t):
                ids += [IDS[f"<{0.5 * frame:.1f} seconds>"], start, *[pad] * tokens, end]
        else:
            ids += [start, *[pad] * (t * tokens), end]
    ids += words(after, seed + 1)
    return EncodedPrompt(torch.tensor(ids), media)


def standard_prompts(family: str) -> list[EncodedPrompt]:
    """Unequal lengths: one video, text only, two videos, an image and a video, the first video again."""
    a, b = make_media("a", (2, 4, 4)), make_media("b", (3, 4, 8), seconds=0.7)
    picture = make_media("p", (1, 8, 4), is_video=False)
    return [
        make_prompt(family, (a,), seed=1),
        make_prompt(family, (), before=4, after=2, seed=2),
        make_prompt(family, (a, b), after=5, seed=3),
        make_prompt(family, (picture, b), before=1, seed=4),
        make_prompt(family, (replace(a),), before=7, seed=5),
    ]


def make_responses(
    lengths: list[int], *, seed: int = 0, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words, some responses beginning alike; padding holds a token that must not be read."""
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), IDS["<|video_pad|>"])
    common = words(width, seed + 77)
    for row, length in enumerate(lengths):
        own = words(length, seed + row)
        shared = row % 3  # 0, 1 or 2 leading tokens in common
        ids[row, :length] = torch.tensor((common[:shared] + own)[:length])
    return ids, torch.tensor(lengths)
