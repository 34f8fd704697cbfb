"""Attention of one decode step of N groups: G queries a group over its shared prompt and their own earlier tokens.

    o[n, h, g] = softmax_j(q[n, h, g] . k[n, h / R, j] * scale) @ v[n, h / R, j],   j visible to g

A group's keys lie in one buffer [prompt | own]: columns 0 .. P_n - 1 are the prompt's, seen by every response; column
P_n + s G + g is the s-th token of response g, seen by it alone. The R query heads of a key head times the G responses
are the rows of one tile, so a key is read once a group. A buffer is split into S parts, so that one group of a long
prompt still fills the GPU: each program keeps a running maximum m, sum l and unnormalised output of its part, and a
second launch merges the parts,

    m = max_s m_s,   o = sum_s exp(m_s - m) acc_s / sum_s exp(m_s - m) l_s.

P_n and the number of own tokens are read on the device, so that one captured graph serves every step. Forward only:
a decode step has no gradient. Scores and sums are float32; products are of the inputs' dtype. Bytes: 2 L D sizeof(k) a
key head and group, once; the parts take 4 S R G (D + 2) bytes, written and read once, which stay in L2.

Letters: N groups, H query heads, K key heads, R = H / K, G responses, Q = R G rows, L columns, D head size, S parts.
Suffixes: _q row, _l column of the buffer, _d element of a head, _s part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlaif_fast_kernels.launch import INTERPRETED, AotConfig, refuse

MAX_HEAD_SIZE = 256
PROGRAMS_PER_SM = 2  # enough loads in flight to reach the memory's bandwidth
FALLBACK_SMS = 132  # of an H100; where no device can be asked


def launch_config(Q: int, D: int) -> dict[str, int]:
    """Rows and columns of a tile: at least 16 for the matrix units, two stages of keys and values in about 48 KB."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    BLOCK_Q = min(64, max(16, triton.next_power_of_2(Q)))
    return {
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_L": min(64, max(16, 64 * 64 * 64 // (BLOCK_Q * max(64, BLOCK_D)))),
        "BLOCK_D": BLOCK_D,
        "num_warps": 4,
        "num_stages": 2,
    }


def merge_config(S: int, D: int) -> dict[str, int]:
    """All parts of a row in one tile, 64 elements of it a thread: many more would spill."""
    BLOCK_S, BLOCK_D = triton.next_power_of_2(S), launch_config(1, D)["BLOCK_D"]
    return {"BLOCK_S": BLOCK_S, "BLOCK_D": BLOCK_D, "num_warps": min(32, max(4, BLOCK_S * BLOCK_D // 2048))}


def split_count(programs: int, L: int, BLOCK_L: int, processors: int) -> int:
    """Parts of the buffer: as many as fill the GPU, no smaller than two tiles."""
    wanted = triton.cdiv(PROGRAMS_PER_SM * processors, max(1, programs))
    return max(1, min(wanted, triton.cdiv(L, 2 * BLOCK_L)))


@triton.jit
def prefix_part_kernel(
    query,  # (N, H, G, D)
    keys,  # (N, K, L, D)
    values,  # (N, K, L, D)
    prompts,  # (N,) int32, P_n
    own,  # (1,) int32, own tokens of every response so far
    parts,  # (N K, S, Q, D) float32 out
    maxima,  # (N K, S, Q) float32 out
    sums,  # (N K, S, Q) float32 out
    scale,
    L,
    part_columns,
    S,  # not a constant: each buffer length would compile a kernel of its own
    query_stride_n,
    query_stride_h,
    query_stride_g,
    key_stride_n,
    key_stride_k,
    key_stride_l,
    value_stride_n,
    value_stride_k,
    value_stride_l,
    K: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,  # products in float32: the interpreter multiplies the bits of bfloat16
):
    nk, s = tl.program_id(0).to(tl.int64), tl.program_id(2)
    n, k = nk // K, nk % K
    offs_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    live_q = offs_q < R * G
    live_d = offs_d < D
    g = offs_q % G

    at_q = n * query_stride_n + (k * R + offs_q // G) * query_stride_h + g * query_stride_g
    q = tl.load(query + at_q[:, None] + offs_d[None, :], mask=live_q[:, None] & live_d[None, :], other=0.0)
    prompt = tl.load(prompts + n)
    used = tl.minimum(prompt + tl.load(own) * G, L)

    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    first = s * part_columns
    last = tl.minimum(first + part_columns, used)
    key_row, value_row = (
        keys + n * key_stride_n + k * key_stride_k,
        values + n * value_stride_n + k * value_stride_k,
    )
    for start in range(first, last, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        live_l = offs_l < last
        at_l = offs_l.to(tl.int64)
        key = tl.load(
            key_row + (at_l * key_stride_l)[None, :] + offs_d[:, None],
            mask=live_d[:, None] & live_l[None, :],
            other=0.0,
        )
        if WIDE:
            q, key = q.to(tl.float32), key.to(tl.float32)
        scores = tl.dot(q, key, input_precision="ieee") * scale
        of_response = (offs_l - prompt) % G
        seen = live_l[None, :] & ((offs_l < prompt)[None, :] | (of_response[None, :] == g[:, None]))
        scores = tl.where(seen, scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # a tile without a visible column
        p = tl.exp(scores - shift[:, None])
        grown = tl.exp(m - shift)
        l = l * grown + tl.sum(p, 1)
        value = tl.load(
            value_row + (at_l * value_stride_l)[:, None] + offs_d[None, :],
            mask=live_l[:, None] & live_d[None, :],
            other=0.0,
        )
        p = p.to(value.dtype)
        if WIDE:
            p, value = p.to(tl.float32), value.to(tl.float32)
        acc = acc * grown[:, None] + tl.dot(p, value, input_precision="ieee")
        m = new_m

    at = (nk * S + s) * (R * G) + offs_q
    tl.store(maxima + at, m, mask=live_q)
    tl.store(sums + at, l, mask=live_q)
    tl.store(parts + at[:, None] * D + offs_d[None, :], acc, mask=live_q[:, None] & live_d[None, :])


@triton.jit
def prefix_merge_kernel(
    parts,  # (N K, S, Q, D) float32
    maxima,  # (N K, S, Q) float32
    sums,  # (N K, S, Q) float32
    out,  # (N, H, G, D), contiguous
    Q: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    nk, q = row // Q, row % Q
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    live_s, live_d = offs_s < S, offs_d < D
    at = (nk * S + offs_s) * Q + q
    m_s = tl.load(maxima + at, mask=live_s, other=float("-inf"))
    l_s = tl.load(sums + at, mask=live_s, other=0.0)
    # the first column of a prompt is seen by all, so the maximum is finite
    weight = tl.exp(m_s - tl.max(m_s, 0))
    total = tl.sum(weight * l_s, 0)
    acc = tl.load(
        parts + at[:, None] * D + offs_d[None, :], mask=live_s[:, None] & live_d[None, :], other=0.0
    )
    o = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out + row * D + offs_d, o.to(out.dtype.element_ty), mask=live_d)


def prefix_decode(
    query: Tensor,  # (N, H, G, D), the last stride 1
    keys: Tensor,  # (N, K, L, D), the last stride 1
    values: Tensor,  # (N, K, L, D), the last stride 1
    prompts: Tensor,  # (N,) int32, at least 1
    own: Tensor,  # (1,) int32, at least 1
    scale: float,
) -> Tensor:
    """Return what `rlaif_fast.policy.prefix_decode.prefix_decode_reference` does, (N, H, G, D) contiguous."""
    N, H, G, D = query.shape
    K, L = keys.shape[1:3]
    Q = H // K * G
    config = launch_config(Q, D)
    S = split_count(N * K * triton.cdiv(Q, config["BLOCK_Q"]), L, config["BLOCK_L"], _processors(query))
    part_columns = triton.cdiv(triton.cdiv(L, S), config["BLOCK_L"]) * config["BLOCK_L"]
    S = triton.cdiv(L, part_columns)
    parts = query.new_empty(N * K, S, Q, D, dtype=torch.float32)
    maxima = query.new_empty(N * K, S, Q, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    out = query.new_empty(N, H, G, D)
    with torch.cuda.device_of(query):
        prefix_part_kernel[(N * K, triton.cdiv(Q, config["BLOCK_Q"]), S)](
            query,
            keys,
            values,
            prompts,
            own,
            parts,
            maxima,
            sums,
            scale,
            L,
            part_columns,
            S,
            *query.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            K=K,
            R=H // K,
            G=G,
            D=D,
            **config,
            WIDE=INTERPRETED,
        )
        prefix_merge_kernel[(N * K * Q,)](
            parts,
            maxima,
            sums,
            out,
            Q=Q,
            D=D,
            S=S,
            **merge_config(S, D),
        )
    return out


def _processors(x: Tensor) -> int:
    if not x.is_cuda:
        return FALLBACK_SMS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def supports(device_type: str, dtype: torch.dtype, head_size: int) -> str | None:
    """Return why the kernel cannot attend there, or None."""
    if head_size > MAX_HEAD_SIZE:
        return f"the head size must be at most {MAX_HEAD_SIZE}; got {head_size}"
    if dtype == torch.float32 and not INTERPRETED:
        return "float32 has no matrix units at full precision, and its products spill; use sdpa"
    return refuse("query", device_type, dtype)


def aot_configs() -> list[AotConfig]:
    """The configurations that the ahead-of-time gate compiles: Qwen3-VL-4B and 8B, Qwen2.5-VL-7B, G = 8; and the
    most parts, those of one group with a single key head.
    """
    configs = []
    for K, R, G, D, S in (
        (8, 4, 8, 128, 33), (4, 7, 8, 128, 33), (8, 4, 1, 128, 33), (4, 2, 16, 256, 33), (1, 8, 8, 128, 264)
    ):  # fmt: skip
        Q = R * G
        config = launch_config(Q, D)
        warps, stages = config["num_warps"], config["num_stages"]
        label = f"K={K}, R={R}, G={G}, D={D}"
        for kind in ("bf16", "fp16"):
            types = dict.fromkeys(("query", "keys", "values"), f"*{kind}:16")
            types |= dict.fromkeys(("prompts", "own"), "*i32:16")
            types |= dict.fromkeys(("parts", "maxima", "sums"), "*fp32:16")
            types |= {"scale": "fp32", "L": "i32:16", "part_columns": "i32:16", "S": "i32"}
            types |= {
                f"{name}_stride_{axis}": "i32:16"
                for name, axes in (("query", "nhg"), ("key", "nkl"), ("value", "nkl"))
                for axis in axes
            }
            blocks = {name: config[name] for name in ("BLOCK_Q", "BLOCK_L", "BLOCK_D")}
            constexprs = {"K": K, "R": R, "G": G, "D": D, "WIDE": False, **blocks}
            configs.append(
                AotConfig(prefix_part_kernel, types, constexprs, warps, stages, f"{label}, {kind}")
            )
            merge_types = dict.fromkeys(("parts", "maxima", "sums"), "*fp32:16") | {"out": f"*{kind}:16"}
            constexprs = {"Q": Q, "D": D, "S": S} | merge_config(S, D)
            warps_of_merge = constexprs.pop("num_warps")
            merge = prefix_merge_kernel, merge_types, constexprs, warps_of_merge, 1, f"{label}, {kind}"
            configs.append(AotConfig(*merge))
    return configs
