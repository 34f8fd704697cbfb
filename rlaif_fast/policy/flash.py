"""Shared-prefix attention with FlashAttention-2's varlen kernels, flash-attn's own or those inside PyTorch.

Three calls per layer: the prompts to themselves (causal), all response tokens of a group to its prompt (not
causal), and each response to itself (causal). The last two see disjoint keys for the same queries, so their
outputs merge exactly by their log-sum-exp:

    lse = logaddexp(lse_1, lse_2)        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Backward: a flash kernel recomputes p = exp(s - lse) and also needs rowsum(dout * out). Given the merged `lse` and
    `out`, each call's p is its share of the whole softmax on its own keys. Running both backward kernels with the
    merged values therefore gives the exact dk and dv of each part, and dq is their sum.

Prefix keys and values are stored once per group; nothing is expanded or padded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlaif_fast.policy.packing import PackedRow


@dataclass(frozen=True)
class Sequences:
    """Sequences side by side in one tensor: cumulative lengths (n + 1,) int32, and the longest."""

    ends: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> Sequences:
        ends = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(device)
        return cls(ends, int(lengths.max(initial=0)))


@dataclass(frozen=True)
class Call:
    """One call of a varlen kernel: sequences of queries that attend to sequences of keys.

    Attributes:
        q: (Tq, H, D).
        k: (Tk, K, D).
        v: (Tk, K, D).
        queries: How q splits into sequences.
        keys: How k and v do.
        scale: Factor on the scores.
        causal: Whether a query sees only the keys up to its own place.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    queries: Sequences
    keys: Sequences
    scale: float
    causal: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v."""
        return self.q, self.k, self.v

    @property
    def sequences(self) -> tuple[Tensor, Tensor, int, int]:
        """The sequences as the kernels take them."""
        return self.queries.ends, self.keys.ends, self.queries.longest, self.keys.longest


class VarlenKernel(Protocol):
    """Attention with its log-sum-exp."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """out (Tq, H, D), lse (H, Tq) float32."""
        ...

    def backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv for p = exp(scale q k - lse) and the given out."""
        ...


class FlashAttention2:
    """The kernels of flash-attn 2.7 and later."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, _, _ = _flash_attn_varlen_forward(
            *call.tensors,
            *call.sequences,
            dropout_p=0.0,
            softmax_scale=call.scale,
            causal=call.causal,
        )
        return out, lse

    def backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        # Zeroed: no block of the kernel writes the keys of a group without response tokens.
        dq, dk, dv = gradients = [torch.zeros_like(x) for x in call.tensors]
        _flash_attn_varlen_backward(
            dout.contiguous(),
            *call.tensors,
            out,
            lse,
            *gradients,
            *call.sequences,
            dropout_p=0.0,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return dq, dk, dv


class TorchFlash:
    """The FlashAttention-2 kernels inside PyTorch, called as `torch.nn.attention.varlen` does."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *call.tensors,
            *call.sequences,
            dropout_p=0.0,
            is_causal=call.causal,
            return_debug_mask=False,
            scale=call.scale,
        )
        return out, lse

    def backward(self, call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._flash_attention_backward(
            dout.contiguous(),
            *call.tensors,
            out,
            lse,
            *call.sequences,
            dropout_p=0.0,
            is_causal=call.causal,
            rng_state=torch.zeros(2, dtype=torch.uint64, device=call.q.device),  # for dropout; not read
            unused=call.q.new_empty(0),
            scale=call.scale,
        )


def merge(out_1: Tensor, lse_1: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys as one: out (..., D) in its dtype, lse (...)."""
    lse = torch.logaddexp(lse_1, lse_2)
    share_1, share_2 = ((part - lse).exp()[..., None] for part in (lse_1, lse_2))
    return (share_1 * out_1 + share_2 * out_2).to(out_1.dtype), lse


@dataclass(frozen=True)
class _Layout:
    """Where the tokens of a row are, and how they split into sequences."""

    prompt_index: Tensor  # (sum of P,)
    node_index: Tensor  # (nodes,)
    prompts: Sequences
    group_nodes: Sequences  # the nodes of each group
    responses: Sequences  # the nodes of each response

    def prompt_call(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
        """The prompts to themselves."""
        return Call(q, k, v, self.prompts, self.prompts, scale, causal=True)

    def prefix_call(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
        """The nodes of each group to its prompt."""
        return Call(q, k, v, self.group_nodes, self.prompts, scale, causal=False)

    def response_call(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
        """Each response to itself."""
        return Call(q, k, v, self.responses, self.responses, scale, causal=True)


class _SharedPrefixAttention(torch.autograd.Function):
    """The three calls as one function: (S, H, D) and (S, K, D) twice -> (S, H, D)."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, layout: _Layout, scale: float, kernel: VarlenKernel
    ) -> Tensor:
        q_p, k_p, v_p = (x.index_select(0, layout.prompt_index) for x in (q, k, v))
        q_r, k_r, v_r = (x.index_select(0, layout.node_index) for x in (q, k, v))
        out_p, lse_p = kernel.forward(layout.prompt_call(q_p, k_p, v_p, scale))
        output = torch.empty_like(q)
        output.index_copy_(0, layout.prompt_index, out_p)
        saved = [q_p, k_p, v_p, out_p, lse_p]
        if len(q_r):
            out_1, lse_1 = kernel.forward(layout.prefix_call(q_r, k_p, v_p, scale))
            out_2, lse_2 = kernel.forward(layout.response_call(q_r, k_r, v_r, scale))
            out_r, lse_r = merge(out_1, lse_1.T, out_2, lse_2.T)
            output.index_copy_(0, layout.node_index, out_r)
            saved += [q_r, k_r, v_r, out_r, lse_r.T.contiguous()]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        return output

    @staticmethod
    def backward(ctx, dout: Tensor):  # type: ignore[override]
        layout, scale, kernel = ctx.layout, ctx.scale, ctx.kernel
        saved = ctx.saved_tensors  # read once: a gradient checkpoint hands each of them out once
        q_p, k_p, v_p, out_p, lse_p = saved[:5]
        dout_p = dout.index_select(0, layout.prompt_index)
        dq_p, dk_p, dv_p = kernel.backward(layout.prompt_call(q_p, k_p, v_p, scale), dout_p, out_p, lse_p)
        dq = dout.new_zeros(len(dout), *q_p.shape[1:])
        dk, dv = (dout.new_zeros(len(dout), *k_p.shape[1:]) for _ in range(2))
        if len(saved) > 5:
            q_r, k_r, v_r, out_r, lse_r = saved[5:]
            dout_r = dout.index_select(0, layout.node_index)
            dq_1, dk_1, dv_1 = kernel.backward(layout.prefix_call(q_r, k_p, v_p, scale), dout_r, out_r, lse_r)
            dq_2, dk_r, dv_r = kernel.backward(
                layout.response_call(q_r, k_r, v_r, scale), dout_r, out_r, lse_r
            )
            dk_p, dv_p = dk_p + dk_1, dv_p + dv_1
            for whole, part in ((dq, dq_1 + dq_2), (dk, dk_r), (dv, dv_r)):
                whole.index_copy_(0, layout.node_index, part)
        for whole, part in ((dq, dq_p), (dk, dk_p), (dv, dv_p)):
            whole.index_copy_(0, layout.prompt_index, part)
        return dq, dk, dv, None, None, None


class FlashContext:
    """Attention of one row by varlen kernels.

    Args:
        row: Packed with merge="duplicates" or "none": its nodes must be runs that begin at the first token of
            a response.
        device: Where the layout goes.
        kernel: The kernels; tests pass one written in PyTorch.
    """

    def __init__(self, row: PackedRow, device: torch.device, kernel: VarlenKernel | None = None) -> None:
        _, lengths = np.unique(row.node_response, return_counts=True)
        heads = int((row.node_depth == 0).sum())
        assert heads == len(lengths), "a response of this row continues another one"
        self._kernel = kernel or FlashAttention2()
        self._layout = _Layout(
            prompt_index=torch.from_numpy(row.prompt_index).to(device),
            node_index=torch.from_numpy(row.node_index).to(device),
            prompts=Sequences.of(row.prompt_lengths, device),
            group_nodes=Sequences.of(row.node_counts, device),
            responses=Sequences.of(lengths, device),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return _SharedPrefixAttention.apply(q, k, v, self._layout, scale, self._kernel)[None]


def refuses_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run here; None if it can."""
    return refuses_kernels(device, dtype) or missing_flash_attn()


def missing_flash_attn() -> str | None:
    """Why the package flash-attn cannot be used; None if it can."""
    try:  # flash-attn-4 has a module of the same name and none of these kernels
        found = version("flash-attn")
    except PackageNotFoundError:
        return "flash-attn is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < (2, 7):
        return f"flash-attn {found} is older than 2.7"
    return None


def refuses_torch_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why PyTorch's FlashAttention cannot run here; None if it can."""
    # Releases before this module have other log-sum-exps or other arguments.
    found = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return refuses_kernels(device, dtype) or (None if found else "it needs PyTorch 2.10")


def refuses_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no FlashAttention-2 kernel can run on a device and dtype; None if they can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0"
    return None
