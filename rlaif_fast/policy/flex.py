"""Shared-prefix attention with PyTorch's FlexAttention: the row's pattern as a block mask."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from rlaif_fast.policy.packing import PackedRow


@cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


class FlexContext:
    """FlexAttention over the whole row; blocks that no token attends across are skipped.

    On a GPU the kernel and the mask builder are compiled. On the CPU FlexAttention runs uncompiled, without a
    backward pass.
    """

    def __init__(self, row: PackedRow, device: torch.device) -> None:
        def put(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device)

        node = np.full(row.tokens, -1)
        node[row.node_index] = np.arange(len(row.node_index))
        depth = np.zeros(row.tokens, dtype=np.int64)
        depth[row.node_index] = row.node_depth
        response = np.zeros(row.tokens, dtype=np.int64)
        response[row.node_index] = row.node_response
        group_of = put(np.repeat(np.arange(len(row.prompt_lengths)), row.group_lengths))
        node_of, depth_of, response_of = put(node), put(depth), put(response)
        path = put(np.ascontiguousarray(row.path)) if row.path.size else put(np.full((1, 1), -1))

        def allowed(batch, head, query, key):
            """`PackedRow.allowed`, entry by entry."""
            to_prompt = (node_of[key] < 0) & (query >= key)
            on_path = path[response_of[query], depth_of[key]] == node_of[key]
            to_node = (
                (node_of[key] >= 0) & (node_of[query] >= 0) & (depth_of[key] <= depth_of[query]) & on_path
            )
            return (group_of[query] == group_of[key]) & (to_prompt | to_node)

        self._compiles = device.type == "cuda"
        build = _compiled(create_block_mask) if self._compiles else create_block_mask
        self._mask = build(allowed, None, None, row.tokens, row.tokens, device=str(device))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        attention = _compiled(flex_attention) if self._compiles else flex_attention
        gqa = query.shape[1] != key.shape[1]
        output = attention(query, key, value, block_mask=self._mask, scale=scale, enable_gqa=gqa)
        return output.transpose(1, 2)
