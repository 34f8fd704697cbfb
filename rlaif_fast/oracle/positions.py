"""How many tokens a model with learned positions reads; a longer input has no embedding and ends the run."""

from __future__ import annotations

from typing import Any

from torch import nn


def learned_positions(model: Any) -> int | None:
    """The most tokens of an input; None for a model without a table of positions (rotary or relative ones).

    Args:
        model: A Transformers model.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None:
        return None
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and ("position" in name.rpartition(".")[2] or name.endswith("wpe"))
    ]
    # RoBERTa counts from the row after its padding row
    unused = [0 if table.padding_idx is None else table.padding_idx + 1 for table in tables]
    rows = [table.num_embeddings - without for table, without in zip(tables, unused)]
    return min([most, *rows]) if rows else None
