"""The tiny policy: the Hugging Face classes of the big models, a small config, random weights, a small tokenizer.

It is saved as an ordinary checkpoint folder and loaded by the code that loads a 7B model, so a laptop runs the code
path of the real job. The sizes were measured to learn from a thousand clips in a minute: see `docs/results.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlaif_fast.policy.model_files import base_of
from rlaif_fast.policy.weights import save_quietly

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
UNKNOWN = "<|unknown|>"
# One token per timestamp: Qwen3-VL writes one before every temporal patch, a large part of a short prompt.
TIMESTAMPS = tuple(f"<{tenths / 10:.1f} seconds>" for tenths in range(100))
TEMPLATE_WORDS = ("user", "assistant", "system", "\n", *"ABCDEFGH", *".,?:")
WORD_PATTERN = r"<\d+\.\d seconds>|[\w']+|[^\w\s]|\n"

# The published template of the Qwen-VL families, without tools and vision counting.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinySize:
    """Widths and depths of the tiny policy; about 1.1 million parameters at the defaults."""

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 384
    vision_hidden_size: int = 64
    vision_layers: int = 2
    vision_heads: int = 4
    vision_intermediate_size: int = 128
    patch_size: int = 8
    vision_positions: int = 16  # a 4 x 4 grid, for a 32 x 32 picture: interpolating a larger one blurs it
    # Weights of about unit gain at these widths; with the usual 0.02, shapes and places are not learned in minutes.
    initializer_range: float = 0.088
    vision_initializer_range: float = 0.1
    vision_position_scale: float = 15.0  # at 1, "where" questions stay at chance


def build_tokenizer(words: Iterable[str]):
    """A word-level tokenizer with the special tokens and the chat template of the Qwen-VL families."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary: dict[str, int] = {}
    for word in (*SPECIAL_TOKENS, UNKNOWN, *TEMPLATE_WORDS, *TIMESTAMPS, *sorted(set(words))):
        vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", END_OF_TEXT)],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def words_of(texts: Iterable[str]) -> set[str]:
    """The words a tiny tokenizer needs to spell `texts` without an unknown token."""
    return {word for text in texts for word in re.findall(WORD_PATTERN, text)}


def tiny_config(family: str, vocab_size: int, token_ids: dict[str, int], size: TinySize):
    """The model config of a tiny `family` ("qwen3_vl" or "qwen2_5_vl")."""
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 4096,
        "initializer_range": size.initializer_range,
        "tie_word_embeddings": True,
        "bos_token_id": token_ids[END_OF_TEXT],
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": token_ids[END_OF_TEXT],
    }
    media_ids: dict[str, Any] = {
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    vision: dict[str, Any] = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden_size,
        "intermediate_size": size.vision_intermediate_size,
        "num_heads": size.vision_heads,
        "patch_size": size.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": size.hidden_size,
        "initializer_range": size.vision_initializer_range,
    }
    if family == "qwen3_vl":
        from transformers import Qwen3VLConfig

        text |= {
            "head_dim": size.hidden_size // size.heads,
            "rope_parameters": rope | {"mrope_interleaved": True},
        }
        vision |= {"num_position_embeddings": size.vision_positions, "deepstack_visual_indexes": [0]}
        return Qwen3VLConfig(text_config=text, vision_config=vision, **media_ids)
    if family == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig

        text |= {"rope_parameters": rope}
        vision |= {"window_size": 4 * size.patch_size, "fullatt_block_indexes": [size.vision_layers - 1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **media_ids)
    raise ValueError(f"family: expected 'qwen3_vl' or 'qwen2_5_vl', got {family!r}")


def holds_tiny(model: str) -> bool:
    """Whether a folder holds a tiny policy of the usual size, or LoRA adapters of one."""
    folder = Path(model).expanduser()
    try:
        config = json.loads((Path(base_of(folder) or folder).expanduser() / "config.json").read_bytes())
        text, vision = config["text_config"], config["vision_config"]
        found = (
            text["hidden_size"],
            text["num_hidden_layers"],
            text["initializer_range"],
            vision["hidden_size"],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # loading it will say what is wrong
    size = TinySize()
    return found == (size.hidden_size, size.layers, size.initializer_range, size.vision_hidden_size)


def make_tiny(
    folder: str | Path,
    words: Iterable[str],
    *,
    family: str = "qwen3_vl",
    size: TinySize | None = None,
    seed: int = 0,
) -> Path:
    """Write a tiny checkpoint (weights, config, tokenizer, processor settings) that loads like a real one.

    Args:
        folder: Where to write it.
        words: Every word that prompts and answers use (see `words_of`); others become unknown tokens.
        family: "qwen3_vl" or "qwen2_5_vl".
        size: Widths and depths.
        seed: Seed of the random weights.
    """
    from transformers import AutoModelForImageTextToText

    size = size or TinySize()
    folder = Path(folder)
    tokenizer = build_tokenizer(words)
    token_ids = tokenizer.get_vocab()
    config = tiny_config(family, len(token_ids), token_ids, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    if family == "qwen3_vl":
        with torch.no_grad():
            position: nn.Embedding = model.model.visual.pos_embed
            position.weight.mul_(size.vision_position_scale)
    model.generation_config.eos_token_id = token_ids["<|im_end|>"]
    model.generation_config.pad_token_id = token_ids[END_OF_TEXT]
    save_quietly(model, folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "patch_size": size.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "video_preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder
