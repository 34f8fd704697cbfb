"""A text model with random weights and a tokenizer of a few words, for the examples to train."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WORDS = ("<pad>", "<eos>", "<unk>", *"0123456789", "how", "many", "is", "plus", "?")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def model(seed: int = 0) -> Qwen3ForCausalLM:
    """Two layers of width 32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def save(folder: str | Path, seed: int = 0) -> str:
    """Write both as a checkpoint, where TRL also takes the reference policy from; return the folder."""
    model(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
