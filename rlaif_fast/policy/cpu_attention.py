"""Attention of a group's response tokens in two parts, by PyTorch's flash kernel for CPUs.

One masked call scores every response token of a group against every other: N^2 scores, though each response needs only
those of its own path. Here all N tokens attend to the prompt without a mask, and each response of L tokens to itself
causally: N P + sum(L^2) / 2 scores. The two calls see disjoint keys and merge by their log-sum-exp, also in the
backward pass (see `flash`).

A response that begins like another shares its tokens with it. For its own call these are gathered a second time as
queries, keys and values; their outputs are dropped and their gradients are zero, so the call stays causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlaif_fast.policy.flash import merge
from rlaif_fast.policy.packing import PackedRow, starts

# Below this many response tokens in a group, one masked call is used: at 250 both take equally long, at 500 two calls
# are 1.2 times as fast.
MIN_NODES = 448
MIN_GAIN = 1.2  # the masked call must have this many times the scores


@dataclass(frozen=True)
class GroupParts:
    """One group of a row.

    Attributes:
        begin: Where it begins in the row.
        prompt: P.
        nodes: N.
        path: (B * L,) node of each token of each response, counted in the group; 0 in padding.
        owned: (N,) the slot of `path` where a node appears in the response that owns it.
        shared: Slots of `path` whose node belongs to another response.
        padding: (B * L,) bool, slots after the end of a response.
        length: L, the longest response.
    """

    begin: int
    prompt: int
    nodes: int
    path: Tensor
    owned: Tensor
    shared: Tensor
    padding: Tensor
    length: int

    def gather(self, x: Tensor, repeat: int = 1) -> Tensor:
        """(heads, N, D) -> (B, heads * repeat, L, D), the tokens of each response."""
        heads, _, size = x.shape
        x = x.index_select(1, self.path).view(heads, -1, self.length, size)
        return x.repeat_interleave(repeat, dim=0).transpose(0, 1)

    def bring(self, x: Tensor) -> Tensor:
        """(B, heads, L, ...) -> (heads, N, ...), each node's value from the response that owns it."""
        return x.transpose(0, 1).flatten(1, 2).index_select(1, self.owned)


def group_parts(row: PackedRow, groups: np.ndarray) -> list[GroupParts] | None:
    """The layout of some groups of a row for `attend`; None if one masked call is cheaper or no kernel can do it."""
    nodes = row.node_counts[groups]
    if nodes.min() < MIN_NODES or not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return None
    ends = np.cumsum(row.group_sizes)
    first_node = starts(row.node_counts)
    found, masked, needed = [], 0, 0
    for group in groups.tolist():
        path = row.path[ends[group] - row.group_sizes[group] : ends[group]]
        path = path[:, : int((path >= 0).sum(1).max())]
        in_group = np.where(path < 0, 0, path - first_node[group])
        padding = (path < 0).ravel()
        # Nodes are ordered by response and then by depth, so the first slot of each node is its owner's.
        real = np.flatnonzero(~padding)
        _, first = np.unique(in_group.ravel()[real], return_index=True)
        owned = real[first]
        prompt, count = int(row.prompt_lengths[group]), int(row.node_counts[group])
        masked += count * (prompt + count)
        needed += count * prompt + path.size * path.shape[1] // 2
        found.append(
            GroupParts(
                begin=int(row.group_starts[group]),
                prompt=prompt,
                nodes=count,
                path=torch.from_numpy(in_group.ravel()),
                owned=torch.from_numpy(owned),
                shared=torch.from_numpy(np.setdiff1d(real, owned)),
                padding=torch.from_numpy(padding),
                length=path.shape[1],
            )
        )
    return found if masked >= MIN_GAIN * needed else None


def attend(
    q: Tensor,  # (H, N, D)
    prompt_key: Tensor,  # (K, P, D)
    prompt_value: Tensor,
    key: Tensor,  # (K, N, D)
    value: Tensor,
    parts: GroupParts,
    scale: float,
) -> Tensor:
    """Attention of a group's response tokens to their prompt and their own responses: (H, N, D)."""
    return _TwoParts.apply(q, prompt_key, prompt_value, key, value, parts, scale)


class _TwoParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, prompt_key, prompt_value, key, value, parts: GroupParts, scale: float) -> Tensor:
        repeat = len(q) // len(key)
        out_1, lse_1 = _forward(_fold(q, repeat), prompt_key[None], prompt_value[None], False, scale)
        own = parts.gather(q), parts.gather(key, repeat), parts.gather(value, repeat)
        out_2, lse_2 = _forward(*own, True, scale)
        of_prompt = out_1.reshape(q.shape), lse_1.reshape(q.shape[:-1])
        out, lse = merge(*of_prompt, parts.bring(out_2), parts.bring(lse_2))
        ctx.save_for_backward(q, prompt_key, prompt_value, key, value, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, prompt_key, prompt_value, key, value, out, lse = ctx.saved_tensors
        parts, scale, repeat = ctx.parts, ctx.scale, len(q) // len(key)
        folded = _fold(q, repeat)
        dq_1, dk_1, dv_1 = _backward(
            _fold(grad, repeat),
            (folded, prompt_key[None], prompt_value[None]),
            _fold(out, repeat),
            lse.reshape(folded.shape[:-1]),
            False,
            scale,
        )
        slots = len(parts.path)
        own = parts.gather(q), parts.gather(key, repeat), parts.gather(value, repeat)
        own_grad = grad.new_zeros(len(q), slots, q.shape[2]).index_copy_(1, parts.owned, grad)
        # exp(s - inf) is 0: no gradient flows through padding.
        own_lse = lse.index_select(1, parts.path).masked_fill_(parts.padding, float("inf"))
        dq_2, dk_2, dv_2 = _backward(
            own_grad.view(len(q), -1, parts.length, q.shape[2]).transpose(0, 1),
            own,
            parts.gather(out),
            own_lse.view(len(q), -1, parts.length).transpose(0, 1).contiguous(),
            True,
            scale,
        )
        dq = dq_1.reshape(q.shape) + parts.bring(dq_2)
        dk, dv = (_to_nodes(x, parts, repeat) for x in (dk_2, dv_2))
        return dq, dk_1[0], dv_1[0], dk, dv, None, None


def _fold(x: Tensor, repeat: int) -> Tensor:
    """(H, N, D) -> (1, K, repeat * N, D): the query heads of one key head become more queries."""
    return x.reshape(1, len(x) // repeat, -1, x.shape[2])


def _to_nodes(x: Tensor, parts: GroupParts, repeat: int) -> Tensor:
    """Gradients (B, H, L, D) of the gathered keys or values -> (K, N, D) of the nodes."""
    heads, size = x.shape[1], x.shape[3]
    by_slot = x.transpose(0, 1).reshape(heads // repeat, repeat, -1, size).sum(1)
    nodes = by_slot.index_select(1, parts.owned)
    if len(parts.shared):
        nodes.index_add_(1, parts.path[parts.shared], by_slot.index_select(1, parts.shared))
    return nodes


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *qkv, out, lse, 0.0, causal, scale=scale
    )
