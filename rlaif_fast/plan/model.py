"""A configuration's model on the meta device: every weight has its shape and dtype but no content."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rlaif_fast.errors import UsageError
from rlaif_fast.policy.frontend import read_config
from rlaif_fast.policy.loading import ModelOptions, base_of
from rlaif_fast.policy.parts import ready_to_train
from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.tiny import TinySize, tiny_config
from rlaif_fast.trainer.options import TINY_FAMILIES

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
TINY_VOCABULARY = 320  # about the number of words in the synthetic data

# Published shapes: hidden, layers, heads, key heads, MLP, vocabulary, tied; for the tower hidden, layers, MLP.
_QWEN3 = {
    "2B": (2048, 28, 16, 8, 6144, 151936, True, 1024, 24, 4096),
    "4B": (2560, 36, 32, 8, 9728, 151936, True, 1024, 24, 4096),
    "8B": (4096, 36, 32, 8, 12288, 151936, False, 1152, 27, 4304),
    "32B": (5120, 64, 64, 8, 25600, 151936, False, 1152, 27, 4304),
}
_QWEN25 = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 1280, 32, 3420),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 1280, 32, 3420),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 1280, 32, 3456),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 1280, 32, 3456),
}
PUBLISHED = {
    **{f"Qwen/Qwen3-VL-{size}-Instruct": ("qwen3_vl", shape) for size, shape in _QWEN3.items()},
    **{f"Qwen/Qwen2.5-VL-{size}-Instruct": ("qwen2_5_vl", shape) for size, shape in _QWEN25.items()},
}
MEDIA_TOKENS: dict[str, Any] = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}


class NoTokenizer:
    """What a policy needs of a tokenizer when no text is read or written."""

    all_special_ids: tuple[int, ...] = ()
    eos_token_id = pad_token_id = 0

    def __init__(self, size: int) -> None:
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        """One token per number."""
        return {str(number): number for number in range(self._size)}


def shape_of(model: str) -> Any:
    """The configuration of a published model, of "tiny", or of a folder; for LoRA adapters, that of their base.

    Raises:
        UsageError: It cannot be read, or is of a family without predictions.
    """
    if model in TINY_FAMILIES:
        ids = dict.fromkeys(("<|endoftext|>", "<|im_end|>"), 0)
        media = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        ids |= {token: 1 + place for place, token in enumerate(media)}
        return tiny_config(TINY_FAMILIES[model], TINY_VOCABULARY, ids, TinySize())
    base = base_of(model)
    config = _published(*PUBLISHED[base]) if base in PUBLISHED else read_config(base)
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"model: a plan knows the families {', '.join(FAMILIES)}, and {model!r} is {config.model_type!r}"
        )
    return config


def _published(family: str, shape: tuple) -> Any:
    hidden, layers, heads, key_heads, mlp, vocabulary, tied, tower, depth, tower_mlp = shape
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 1 << 18,
    }
    vision = {
        "hidden_size": tower,
        "depth": depth,
        "num_heads": 16,
        "intermediate_size": tower_mlp,
        "out_hidden_size": hidden,
    }
    if family == "qwen3_vl":
        from transformers import Qwen3VLConfig

        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
        text |= {"head_dim": 128, "rope_parameters": rope | {"mrope_interleaved": True}}
        vision |= {"patch_size": 16, "deepstack_visual_indexes": [5, 11, 17] if depth == 24 else [8, 16, 24]}
        return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **MEDIA_TOKENS)
    from transformers import Qwen2_5_VLConfig

    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **MEDIA_TOKENS)


def with_layers(config: Any, layers: int) -> Any:
    """The configuration with another number of decoder layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def policy_on_meta(options: ModelOptions, config: Any, dtype: torch.dtype) -> Policy:
    """The policy of a configuration, frozen and adapted as in the run."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
        model = ready_to_train(model, options)
    model.to("meta").train()
    return Policy(
        model,
        NoTokenizer(config.get_text_config().vocab_size),
        max_packed_tokens=options.max_packed_tokens,
        max_cached_tokens=options.max_cached_tokens,
        feature_cache_bytes=0,
    )
