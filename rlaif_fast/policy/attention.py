"""Shared-prefix attention, plugged into transformers through `AttentionInterface`.

In a packed row a prompt attends causally to itself, and a response token to its prompt and to the response
tokens on its path (`packing.PackedRow`). The layout reaches the attention function as one keyword argument,
`shared_prefix`, which the model's own forward passes to every layer, also in a gradient checkpoint's second
forward. Without it the function is the model's previous implementation, so the model still generates and
evaluates as before.

Backends, all equal to the dense-mask reference:

- `sdpa`: per bucket of similar groups, one causal call for the prompts and one call for the responses over
  [prompt | responses] with a mask. Any device. On a CPU, groups with many response tokens take two response calls,
  merged by their log-sum-exp (`cpu_attention`).
- `flex`: FlexAttention with a block mask over the whole row.
- `flash`: flash-attn's varlen kernels; the response part is two calls merged by their log-sum-exp.
- `torch_flash`: the same with the FlashAttention-2 kernels inside PyTorch; "auto" uses it if `selfcheck` finds that it
  equals the reference on this very GPU.
- `reference`: one dense mask over the whole row, softmax written out.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlaif_fast.loss.precision import dtype_of
from rlaif_fast.policy.cpu_attention import GroupParts, group_parts
from rlaif_fast.policy.cpu_attention import attend as attend_in_parts
from rlaif_fast.policy.flash import (
    FlashContext,
    TorchFlash,
    refuses_flash,
    refuses_kernels,
    refuses_torch_flash,
)
from rlaif_fast.policy.packing import Bucket, Merge, PackedRow, bucket_mask, make_buckets
from rlaif_fast.policy.selfcheck import HEAD_SIZE, check_attention, describe_check

log = logging.getLogger(__name__)

PREFIX = "rlaif_shared_prefix_"
BIAS_STEP = 16  # columns; CUDA's fused kernels want aligned mask rows
# Passed to the model as its attention mask: a 4D mask goes through untouched, so the model builds none. Nothing reads
# it.
UNUSED_MASK_SHAPE = (1, 1, 1, 1)


class AttentionContext(Protocol):
    """What `shared_prefix=` carries to every attention layer of one forward."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # (1, H, S, D)
        key: Tensor,  # (1, K, S, D)
        value: Tensor,  # (1, K, S, D)
        scale: float,
    ) -> Tensor:
        """Return (1, S, H, D)."""
        ...


def install(decoder: Any) -> None:
    """Route the attention of a text decoder through `AttentionContext`s, when one is given."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    base = decoder.config._attn_implementation or "eager"
    if base.startswith(PREFIX):
        return
    AttentionInterface.register(PREFIX + base, partial(_attention, base=base))
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
    decoder.config._attn_implementation = PREFIX + base


def _attention(module, query, key, value, attention_mask, *, base: str, shared_prefix=None, **kwargs):
    if shared_prefix is not None:
        # Under autocast a head's norm leaves queries and keys wider than values.
        qkv = (x.to(dtype_of(query.device, x.dtype)) for x in (query, key, value))
        return shared_prefix.attend(module.layer_idx, *qkv, kwargs["scaling"]), None
    if base == "eager":  # the only one that transformers keeps in each model's own file
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        function = ALL_ATTENTION_FUNCTIONS[base]
    # Implementations read their own name in the config: transformers' flash attention loads the kernel it names.
    ours, module.config._attn_implementation = module.config._attn_implementation, base
    try:
        return function(module, query, key, value, attention_mask, **kwargs)
    finally:
        module.config._attn_implementation = ours


class _Pad(torch.autograd.Function):
    """Scatter rows to their slots of a zeroed grid; the backward pass reads the same slots."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of `_Pad`."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, slots, grad), None


@dataclass
class DeviceBucket:
    """A bucket with its index tensors on the device; one additive mask serves every layer."""

    bucket: Bucket
    tokens: int
    slots: Tensor | None
    rows: Tensor | None
    allowed: Tensor | None  # (n, 1, R, P + R) bool
    parts: list[GroupParts] | None = None  # the groups one by one, if that is cheaper than a mask
    bias: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def additive_mask(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self.bias:
            assert self.allowed is not None
            *lead, columns = self.allowed.shape
            # A view of rows whose length is rounded up: fused kernels read it as it is, but would copy other shapes.
            wide = torch.zeros(
                *lead, -(-columns // BIAS_STEP) * BIAS_STEP, dtype=dtype, device=self.allowed.device
            )
            self.bias[dtype] = wide[..., :columns].masked_fill_(~self.allowed, float("-inf"))
        return self.bias[dtype]

    def grid(self, x: Tensor) -> Tensor:  # (S, H, D) -> (n, H, P + R, D)
        b, n = self.bucket, len(self.bucket.groups)
        x = x.narrow(0, b.begin, self.tokens) if self.rows is None else x.index_select(0, self.rows)
        width = b.prompt + b.response
        if self.slots is not None:
            x = _Pad.apply(x, self.slots, n * width)
        return x.reshape(n, width, *x.shape[1:]).transpose(1, 2)

    def ungrid(self, x: Tensor) -> Tensor:  # (n, P + R, H, D) -> (tokens, H, D)
        x = x.reshape(-1, *x.shape[2:])
        return x if self.slots is None else _Unpad.apply(x, self.slots)


class SdpaContext:
    """Bucketed attention by `scaled_dot_product_attention`."""

    def __init__(self, row: PackedRow, device: torch.device) -> None:
        def put(index: np.ndarray | None) -> Tensor | None:
            return None if index is None else torch.from_numpy(index).to(device, non_blocking=True)

        buckets = make_buckets(row)
        self._buckets = [
            DeviceBucket(
                bucket=bucket,
                tokens=int(row.group_lengths[bucket.groups].sum()),
                slots=put(bucket.slots),
                rows=put(bucket.rows),
                allowed=None if parts else self._mask(row, bucket, device),
                parts=parts,
            )
            for bucket in buckets
            for parts in [self._parts(row, bucket, device)]
        ]
        self._restore = None  # from bucket order to row order
        if len(buckets) > 1:
            order = np.concatenate(
                [
                    np.arange(b.begin, b.begin + d.tokens) if b.rows is None else b.rows
                    for b, d in zip(buckets, self._buckets)
                ]
            )
            if not (np.diff(order) == 1).all():
                self._restore = put(np.argsort(order))

    def _parts(self, row: PackedRow, bucket: Bucket, device: torch.device) -> list[GroupParts] | None:
        """The groups of a bucket, if they attend one by one and in two parts."""
        return group_parts(row, bucket.groups) if device.type == "cpu" else None

    def _mask(self, row: PackedRow, bucket: Bucket, device: torch.device) -> Tensor | None:
        """(n, 1, R, P + R) bool: what the nodes of a bucket attend to."""
        return bucket_mask(row, bucket, device)[:, None] if bucket.response else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, D)
        outputs = [self._attend_bucket(bucket, query, key, value, scale) for bucket in self._buckets]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self._restore is not None:
            output = output.index_select(0, self._restore)
        return output[None]

    def _attend_bucket(
        self, bucket: DeviceBucket, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        if bucket.parts is not None:
            return torch.cat([_attend_group(group, query, key, value, scale) for group in bucket.parts])
        q, k, v = bucket.grid(query), bucket.grid(key), bucket.grid(value)
        prompt, response = bucket.bucket.prompt, bucket.bucket.response
        if response == 0:
            return bucket.ungrid(sdpa(q, k, v, scale=scale, is_causal=True).transpose(1, 2))
        q_prompt, q_response = q.split((prompt, response), dim=2)
        of_prompt = sdpa(q_prompt, k[:, :, :prompt], v[:, :, :prompt], scale=scale, is_causal=True)
        of_response = sdpa(q_response, k, v, scale=scale, mask=bucket.additive_mask(q.dtype))
        return bucket.ungrid(torch.cat((of_prompt.transpose(1, 2), of_response.transpose(1, 2)), dim=1))


def _attend_group(
    group: GroupParts, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:  # (S, heads, D) -> (P + N, H, D)
    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.narrow(0, group.begin, group.prompt + group.nodes).transpose(0, 1)
        return x.split((group.prompt, group.nodes), dim=1)  # type: ignore[return-value]

    (q_prompt, q), (k_prompt, k), (v_prompt, v) = map(split, (query, key, value))
    of_prompt = sdpa(q_prompt[None], k_prompt[None], v_prompt[None], scale=scale, is_causal=True)[0]
    of_nodes = attend_in_parts(q, k_prompt, v_prompt, k, v, group, scale)
    return torch.cat((of_prompt.transpose(0, 1), of_nodes.transpose(0, 1)))


def sdpa(
    query: Tensor,  # (n, H, Q, D)
    key: Tensor,  # (n, K, L, D), H a multiple of K
    value: Tensor,  # (n, K, L, D)
    *,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,  # (n, 1, Q, L), additive
) -> Tensor:
    """Grouped-query `scaled_dot_product_attention` that stays on a fused kernel: (n, H, Q, D)."""
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1 and query.is_cuda and (mask is not None or refuses_kernels(query.device, query.dtype)):
        # Of CUDA's fused kernels only FlashAttention supports `enable_gqa`; the next one would write out the scores.
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        repeat = 1
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=repeat > 1
    )


class ReferenceContext:
    """One dense mask over the whole row; the softmax is written out in the input's dtype."""

    def __init__(self, row: PackedRow, device: torch.device) -> None:
        self._allowed = torch.from_numpy(row.allowed()).to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * scale
        weights = scores.masked_fill(~self._allowed, float("-inf")).softmax(-1)
        return (weights @ value).transpose(1, 2)


def refuses_flex(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlexAttention cannot train here; None if it can."""
    return None if device.type == "cuda" else "it has no backward pass on the CPU"


def _flex_context(row: PackedRow, device: torch.device) -> AttentionContext:
    from rlaif_fast.policy.flex import FlexContext  # imports the compiler, so only on request

    return FlexContext(row, device)


def _runs_anywhere(device: torch.device, dtype: torch.dtype) -> None:
    return None


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute shared-prefix attention.

    Attributes:
        name: Its name in `attention_backend`.
        priority: "auto" takes the highest that can run; below 0 only on request.
        refuses: Why it cannot run on a device and dtype; None if it can.
        merge: How much of the responses it lets a row share (see `packing.pack`).
        context: Makes the context of one row.
        checked: Whether "auto" takes it only if it equals the reference on that very device (see `selfcheck`).
    """

    name: str
    priority: int
    refuses: Callable[[torch.device, torch.dtype], str | None]
    merge: Merge
    context: Callable[[PackedRow, torch.device], AttentionContext]
    checked: bool = False


ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        AttentionBackend("flash", 20, refuses_flash, "duplicates", FlashContext),
        AttentionBackend(
            "torch_flash",
            15,
            refuses_torch_flash,
            "duplicates",
            partial(FlashContext, kernel=TorchFlash()),
            checked=True,
        ),
        AttentionBackend("sdpa", 10, _runs_anywhere, "prefixes", SdpaContext),
        AttentionBackend("flex", -1, refuses_flex, "prefixes", _flex_context),
        AttentionBackend("reference", -1, _runs_anywhere, "prefixes", ReferenceContext),
    )
}


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_size: int = HEAD_SIZE
) -> AttentionBackend:
    """The backend called `name`, or for "auto" the best one that can run; on a GPU the log says why.

    Raises:
        ValueError: No such backend, or it cannot run here.
    """
    if name == "auto":
        passed_over = []
        for chosen in sorted(ATTENTION_BACKENDS.values(), key=lambda b: -b.priority):
            reason = chosen.refuses(device, dtype)
            if reason is None and chosen.checked:
                reason = check_attention(chosen, device, dtype, head_size)
            if reason is None:
                break
            passed_over.append(f"no {chosen.name}: {reason}")
        if device.type == "cuda":
            checked = [describe_check(chosen, device, dtype, head_size)] if chosen.checked else []
            why = "; ".join(checked + passed_over)
            log.info("attention: %s%s", chosen.name, f" ({why})" if why else "")
        return chosen
    backend = ATTENTION_BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"attention_backend: expected auto, {', '.join(ATTENTION_BACKENDS)}, got {name!r}")
    reason = backend.refuses(device, dtype)
    if reason is not None:
        raise ValueError(f"attention_backend: {name} cannot run here: {reason}")
    return backend
