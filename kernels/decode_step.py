"""What lies between the matmuls of a decode step: norms, rotary positions and the gate, one launch each.

A decode step feeds S tokens through every layer. Its matmuls read the weights once, which no step can avoid. Between
them a model's own modules run some fifty small kernels a layer; a graph removes their launches but not the kernels, and
each takes 2 to 3 us. Here they are four:

    add_rms_norm     r += d;  y = w r / sqrt(mean(r^2) + eps), twice a layer
    rotate_store     x' = norm(x) cos + rotate_half(norm(x)) sin of each query and key head; keys, values to the cache
    silu_mul         y = silu(g) u

Forward only: a decode step has no gradient. Sums are float32. Values that the modules round to the dtype of the tensors
are rounded here too, so that both give the same hidden states up to the order of sums. Bytes: each tensor once.

Letters: S tokens, C hidden size, H query heads, K key heads, D head size, L columns of a buffer, N groups, M elements.
Suffixes: _c element of a row, _d element of half a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlaif_fast_kernels.launch import AotConfig, refuse

MAX_HIDDEN = 16384  # a row is held in registers
MAX_HEAD_SIZE = 512
BLOCK_M = 1024


@triton.jit
def add_rms_norm_kernel(
    residual,  # (S, C), read and written
    delta,  # (S, C), or None
    weight,  # (C,)
    out,  # (S, C)
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * C
    offs_c = tl.arange(0, BLOCK_C)
    live_c = offs_c < C
    dtype = out.dtype.element_ty
    x = tl.load(residual + at + offs_c, mask=live_c, other=0.0).to(tl.float32)
    if delta is not None:
        added = (x + tl.load(delta + at + offs_c, mask=live_c, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual + at + offs_c, added, mask=live_c)
        x = added.to(tl.float32)
    y = (x * tl.rsqrt(tl.sum(x * x, 0) / C + eps)).to(dtype).to(tl.float32)
    w = tl.load(weight + offs_c, mask=live_c, other=0.0).to(tl.float32)
    tl.store(out + at + offs_c, (w * y).to(dtype), mask=live_c)


@triton.jit
def rotated(
    source,  # (D,) one head
    norm,  # (D,), or None
    cos,  # (D,)
    sin,  # (D,)
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The two halves of a head after its norm and rotation, in float32."""
    half: tl.constexpr = D // 2
    offs_d = tl.arange(0, BLOCK_D)
    live_d = offs_d < half
    dtype = source.dtype.element_ty
    x = tl.load(source + offs_d, mask=live_d, other=0.0).to(tl.float32)
    y = tl.load(source + half + offs_d, mask=live_d, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / D + eps)
        x_weight = tl.load(norm + offs_d, mask=live_d, other=0.0).to(tl.float32)
        y_weight = tl.load(norm + half + offs_d, mask=live_d, other=0.0).to(tl.float32)
        x = (x_weight * (x * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        y = (y_weight * (y * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    x_cos = tl.load(cos + offs_d, mask=live_d, other=0.0).to(tl.float32)
    y_cos = tl.load(cos + half + offs_d, mask=live_d, other=0.0).to(tl.float32)
    x_sin = tl.load(sin + offs_d, mask=live_d, other=0.0).to(tl.float32)
    y_sin = tl.load(sin + half + offs_d, mask=live_d, other=0.0).to(tl.float32)
    first = (x * x_cos).to(dtype).to(tl.float32) - (y * x_sin).to(dtype).to(tl.float32)
    second = (y * y_cos).to(dtype).to(tl.float32) + (x * y_sin).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def rotate_store_kernel(
    query,  # (S, H, D), read and written
    key,  # (S, K, D)
    value,  # (S, K, D)
    cos,  # (S, D)
    sin,  # (S, D)
    query_norm,  # (D,), or None
    key_norm,  # (D,), or None
    keys,  # (N, K, L, D) out
    values,  # (N, K, L, D) out
    groups,  # (S,) int64
    columns,  # (S,) int64
    eps,
    stride_n,
    stride_k,
    stride_l,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    s, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    half: tl.constexpr = D // 2
    offs_d = tl.arange(0, BLOCK_D)
    live_d = offs_d < half
    dtype = query.dtype.element_ty
    if head < H:
        own = query + (s * H + head) * D
        first, second = rotated(own, query_norm, cos + s * D, sin + s * D, eps, D, BLOCK_D)
        tl.store(own + offs_d, first.to(dtype), mask=live_d)
        tl.store(own + half + offs_d, second.to(dtype), mask=live_d)
    else:
        k = head - H
        at = (s * K + k) * D
        cell = tl.load(groups + s) * stride_n + k * stride_k + tl.load(columns + s) * stride_l
        first, second = rotated(key + at, key_norm, cos + s * D, sin + s * D, eps, D, BLOCK_D)
        tl.store(keys + cell + offs_d, first.to(dtype), mask=live_d)
        tl.store(keys + cell + half + offs_d, second.to(dtype), mask=live_d)
        for part in tl.static_range(2):
            place = part * half + offs_d
            tl.store(values + cell + place, tl.load(value + at + place, mask=live_d, other=0.0), mask=live_d)


@triton.jit
def silu_mul_kernel(
    gate,  # (M,), read and written
    up,  # (M,)
    M,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live_m = offs_m < M
    dtype = gate.dtype.element_ty
    g = tl.load(gate + offs_m, mask=live_m, other=0.0).to(tl.float32)
    u = tl.load(up + offs_m, mask=live_m, other=0.0).to(tl.float32)
    activated = (g / (1.0 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(gate + offs_m, (activated * u).to(dtype), mask=live_m)


def row_config(size: int) -> dict[str, int]:
    """A power of two that holds the row, about eight elements a thread, 32 for the longest rows."""
    block = triton.next_power_of_2(size)
    return {"block": block, "num_warps": min(16, max(1, block // 256))}


def add_rms_norm(
    residual: Tensor,  # (S, C) contiguous
    delta: Tensor | None,  # (S, C) contiguous
    weight: Tensor,  # (C,)
    eps: float,
) -> Tensor:
    """Add `delta` to `residual` in place, and return the norm of the sum (S, C)."""
    out = torch.empty_like(residual)
    config = row_config(residual.shape[1])
    with torch.cuda.device_of(residual):
        add_rms_norm_kernel[(len(residual),)](
            residual,
            delta,
            weight,
            out,
            eps,
            C=residual.shape[1],
            BLOCK_C=config["block"],
            num_warps=config["num_warps"],
        )
    return out


def rotate_store(
    query: Tensor,  # (S, H, D) contiguous, changed in place
    key: Tensor,  # (S, K, D) contiguous
    value: Tensor,  # (S, K, D) contiguous
    cos: Tensor,  # (S, D) contiguous
    sin: Tensor,  # (S, D) contiguous
    norms: tuple[Tensor, Tensor] | None,  # of query and key heads, (D,) each
    eps: float,
    keys: Tensor,  # (N, K, L, D), the last stride 1
    values: Tensor,  # strides as `keys`
    groups: Tensor,  # (S,) int64
    columns: Tensor,  # (S,) int64
) -> None:
    """Norm and rotate the queries in place and the keys into their cells of the cache; put the values there too."""
    (S, H, D), K = query.shape, key.shape[1]
    query_norm, key_norm = (None, None) if norms is None else norms
    config = row_config(D // 2)
    with torch.cuda.device_of(query):
        rotate_store_kernel[(S, H + K)](
            query,
            key,
            value,
            cos,
            sin,
            query_norm,
            key_norm,
            keys,
            values,
            groups,
            columns,
            eps,
            *keys.stride()[:3],
            H=H,
            K=K,
            D=D,
            BLOCK_D=config["block"],
            num_warps=config["num_warps"],
        )


def silu_mul(
    gate: Tensor,  # (S, M) contiguous, changed in place
    up: Tensor,  # (S, M) contiguous
) -> Tensor:
    """Return `gate`, now silu(gate) * up."""
    with torch.cuda.device_of(gate):
        silu_mul_kernel[(triton.cdiv(gate.numel(), BLOCK_M),)](
            gate, up, gate.numel(), BLOCK_M=BLOCK_M, num_warps=4
        )
    return gate


def supports(device_type: str, dtype: torch.dtype, hidden_size: int, head_size: int) -> str | None:
    """Return why the kernels cannot run there, or None."""
    if hidden_size > MAX_HIDDEN:
        return f"the hidden size must be at most {MAX_HIDDEN}; got {hidden_size}"
    if head_size % 2 or head_size > MAX_HEAD_SIZE:
        return f"the head size must be even and at most {MAX_HEAD_SIZE}; got {head_size}"
    return refuse("hidden", device_type, dtype)


def aot_configs() -> list[AotConfig]:
    """The configurations that the ahead-of-time gate compiles: Qwen3-VL-4B, Qwen2.5-VL-7B and 72B."""
    configs = []
    for kind in ("bf16", "fp16", "fp32"):
        tensor = f"*{kind}:16"
        for C in (2560, 3584, 8192) if kind == "bf16" else (3584,):
            for has_delta in (True, False):
                types = dict.fromkeys(("residual", "weight", "out"), tensor) | {"eps": "fp32"}
                row = row_config(C)
                types |= {"delta": tensor} if has_delta else {}
                constexprs = {"C": C, "BLOCK_C": row["block"]} | ({} if has_delta else {"delta": None})
                label = f"C={C}, {'delta, ' if has_delta else ''}{kind}"
                configs.append(AotConfig(add_rms_norm_kernel, types, constexprs, row["num_warps"], 1, label))
        for H, K, has_norm in ((32, 8, True), (28, 4, False)):
            names = ("query", "key", "value", "cos", "sin", "keys", "values")
            norms = ("query_norm", "key_norm")
            types = dict.fromkeys((*names, *(norms if has_norm else ())), tensor)
            types |= dict.fromkeys(("groups", "columns"), "*i64:16") | {"eps": "fp32"}
            types |= dict.fromkeys(("stride_n", "stride_k", "stride_l"), "i32:16")
            row = row_config(64)
            constexprs = {"H": H, "K": K, "D": 128, "BLOCK_D": row["block"]}
            constexprs |= {} if has_norm else dict.fromkeys(norms)
            label = f"H={H}, K={K}, {'norms, ' if has_norm else ''}{kind}"
            configs.append(AotConfig(rotate_store_kernel, types, constexprs, row["num_warps"], 1, label))
        types = {"gate": tensor, "up": tensor, "M": "i32:16"}
        configs.append(AotConfig(silu_mul_kernel, types, {"BLOCK_M": BLOCK_M}, 4, 1, kind))
    return configs
