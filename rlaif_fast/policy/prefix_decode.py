"""Attention of a decode step over shared prompts: the reference, and the choice between it and the Triton kernel.

A group's keys and values are in one buffer [prompt | own]: columns 0 .. P - 1 are the prompt's, seen by every response;
column P + s G + g is the s-th token of response g, seen only by that response.

Letters: N groups, H query heads, K key heads, G responses, L columns, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_columns(
    prompts: Tensor,  # (N,) int
    own: int,
    num_generations: int,
    length: int,
) -> Tensor:
    """Return (N, G, L) bool: which columns of its group's buffer a response sees after `own` tokens of each."""
    column = torch.arange(length, device=prompts.device)
    behind = column - prompts[:, None]  # (N, L)
    response = torch.arange(num_generations, device=prompts.device)
    mine = (behind % num_generations)[:, None, :] == response[:, None]
    return (behind < 0)[:, None, :] | (mine & (behind < own * num_generations)[:, None, :])


def prefix_decode_reference(
    query: Tensor,  # (N, H, G, D)
    keys: Tensor,  # (N, K, L, D), H a multiple of K
    values: Tensor,  # (N, K, L, D)
    prompts: Tensor,  # (N,) int, columns of each prompt, at least 1
    own: Tensor,  # (1,) int, tokens that each response has so far, including the present one
    scale: float,
) -> Tensor:
    """Return the attention of each response's present token, (N, H, G, D); dense mask, softmax written out."""
    repeat = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeat, dim=1) for x in (keys, values))
    seen = visible_columns(prompts, int(own), query.shape[2], keys.shape[2])[:, None]  # (N, 1, G, L)
    scores = (query @ keys.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    values = values.masked_fill(~seen.any(2)[..., None], 0.0)  # unseen columns may hold anything
    return scores.softmax(-1) @ values


def refuses_prefix_decode(device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why the Triton kernel cannot run there, or None."""
    try:
        from rlaif_fast_kernels import launch, prefix_decode
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return launch.unavailable() or prefix_decode.supports(device_type, dtype, head_size)


def prefix_decode(
    query: Tensor, keys: Tensor, values: Tensor, prompts: Tensor, own: Tensor, scale: float
) -> Tensor:
    """Return the result of `prefix_decode_reference`, by the Triton kernel; nothing is read on the host.

    Raises:
        ValueError: The kernel cannot run on these tensors (see `refuses_prefix_decode`).
    """
    reason = refuses_prefix_decode(query.device.type, query.dtype, query.shape[3])
    if reason is not None:
        raise ValueError(f"prefix_decode cannot run: {reason}")
    from rlaif_fast_kernels.prefix_decode import prefix_decode as kernel

    return kernel(query, keys, values, prompts, own, scale)
