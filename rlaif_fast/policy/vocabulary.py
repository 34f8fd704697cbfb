"""Which tokens may be sampled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def allowed_tokens(rows: int, tokenizer: Any, never: Iterable[int], ends: Iterable[int]) -> Tensor:
    """(V,) bool: no special tokens, none of `never`, no row of the embedding that no token uses; but all `ends`.

    Args:
        rows: V, of the output embedding.
        tokenizer: The tokenizer.
        never: Further tokens that may not be drawn.
        ends: Tokens that end a response.
    """
    allowed = torch.ones(rows, dtype=torch.bool)
    allowed[len(tokenizer) :] = False
    allowed[[i for i in (*tokenizer.all_special_ids, *never) if i < rows]] = False
    allowed[list(ends)] = True
    return allowed
