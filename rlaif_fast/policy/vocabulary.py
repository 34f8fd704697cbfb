"""Which tokens may be sampled, and which are text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.errors import UsageError

# They open and close reasoning. A policy may draw them; they count as text even if the tokenizer has them as special.
OPENS, CLOSES = "<think>", "</think>"
THINKING = {OPENS, CLOSES}


def allowed_tokens(rows: int, tokenizer: Any, never: Iterable[int], ends: Iterable[int]) -> Tensor:
    """(V,) bool: excludes special tokens except those of reasoning, tokens of `never`, and rows of the embedding that
    no token uses; always includes `ends`.

    Args:
        rows: V, the rows of the output embedding.
        tokenizer: The tokenizer.
        never: Further tokens that may not be drawn.
        ends: Tokens that end a response.

    Raises:
        UsageError: One of `ends` has no row.
    """
    ends = list(ends)
    beyond = [token for token in ends if token >= rows]
    if beyond:
        raise UsageError(
            f"model: eos_token_id {beyond[0]} is none of the {rows} tokens of its output embedding; set it right in "
            "generation_config.json or tokenizer_config.json"
        )
    allowed = torch.zeros(rows, dtype=torch.bool)
    allowed[[i for i in tokenizer.get_vocab().values() if i < rows]] = True  # there may be holes among them
    special = set(tokenizer.all_special_ids) - _reasoning(tokenizer)
    allowed[[i for i in (*special, *never) if i < rows]] = False
    allowed[ends] = True
    return allowed


def texts_of(tokenizer: Any, responses: Sequence[Sequence[int] | Tensor]) -> list[str]:
    """Responses as texts, keeping only the special tokens of reasoning, which tell where an answer begins."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number for number, token in added.items() if token.special}
    dropped = special - _reasoning(tokenizer)
    if len(dropped) == len(special):
        return tokenizer.batch_decode(responses, skip_special_tokens=True)
    return tokenizer.batch_decode(
        [[i for i in map(int, response) if i not in dropped] for response in responses]
    )


def _reasoning(tokenizer: Any) -> set[int]:
    """The ids of `THINKING`, if the tokenizer has them as added tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {number for number, token in added.items() if str(token) in THINKING}
