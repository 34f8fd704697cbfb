"""Attention in a vision tower without a call per frame.

A tower attends within frames or windows. Without flash-attn, transformers cuts the packed patches at `cu_seqlens` and
calls attention once per piece and layer: 64 temporal patches and 27 layers make 1,728 small calls. Pieces of equal
length form a batch, so one call per length does the same.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# transformers passes the whole row and its `cu_seqlens` to implementations with "flash" in their name.
NAME = "rlaif_fast_batched_sdpa_like_flash"
_LAST: dict[str, tuple[weakref.ref[Tensor], int, list[int]]] = {}  # what `_lengths` read last


def install(tower: Any) -> None:
    """Let a tower that runs on SDPA attend in one call for all pieces of equal length."""
    from transformers import AttentionInterface

    if tower.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, batched_sdpa)
        tower.config._attn_implementation = NAME


def is_installed(tower: Any) -> bool:
    """Whether the tower attends by `batched_sdpa`, which reads the ends of pieces on the host."""
    config = getattr(tower, "config", None)
    return getattr(config, "_attn_implementation", None) == NAME


def _lengths(ends: Tensor) -> list[int]:  # (pieces + 1,)
    """Lengths of the pieces; read from the device once per batch, since every layer passes the same tensor."""
    version = 0 if ends.is_inference() else ends._version  # inference tensors have no version
    known = _LAST.get("ends")
    if known is None or known[0]() is not ends or known[1] != version:
        _LAST["ends"] = (weakref.ref(ends), version, torch.diff(ends).tolist())
    return _LAST["ends"][2]


def batched_sdpa(
    module: Any,
    query: Tensor,  # (1, H, S, D)
    key: Tensor,  # (1, H, S, D)
    value: Tensor,  # (1, H, S, D)
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,  # (pieces + 1,)
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each piece of the row to itself: (1, S, H, D)."""
    lengths = _lengths(cu_seq_lens_q)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    in_order = order == list(range(len(lengths)))
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # (S, H, D)
    if not in_order:
        pieces = torch.arange(rows[0].shape[0], device=query.device).split(lengths)
        index = torch.cat([pieces[i] for i in order])
        rows = [row.index_select(0, index) for row in rows]
    outputs, begin = [], 0
    for length in sorted({*lengths} - {0}):
        end = begin + length * lengths.count(length)
        q, k, v = (row[begin:end].unflatten(0, (-1, length)).transpose(1, 2) for row in rows)  # (n, H, L, D)
        output = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        begin = end
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if not in_order:
        output = torch.empty_like(output).index_copy(0, index, output)
    return output[None], None
