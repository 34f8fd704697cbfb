"""Run the compiler's frontend on what the launchers really launch, every argument as it is passed.

The interpreter accepts what the compiler does not (mixed types over a branch, an argument of 1 that becomes
a constant, an absent tensor). Here each launch is caught, its arguments are specialised as at run time, and
the frontend runs on them. Prints one line a specialisation.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from rlaif_fast.loss.inputs import RankInputs, RowInputs, RowStats, Scaling, TokenInputs
from rlaif_fast.loss.options import LossOptions, RankOptions
from rlaif_fast_kernels import (
    decode_step,
    linear_loss,
    logits_loss,
    prefix_decode,
    rank_loss,
    rank_penalty,
    scale_gradient,
)

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
LAUNCH = ("num_warps", "num_stages", "grid", "warmup")
seen: set[str] = set()


def compile_launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Specialise the arguments of a launch as the runtime does and run the frontend."""
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k not in LAUNCH}
    assert list(values) == kernel.arg_names, f"{kernel.__name__}: {set(kernel.arg_names) ^ set(values)}"
    constant = {p.name for p in kernel.params if p.is_constexpr}
    types, constexprs, attrs = {}, {}, {}
    for i, (name, value) in enumerate(values.items()):
        if name in constant or value is None or (isinstance(value, int) and value == 1):
            types[name], constexprs[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
    key = f"{kernel.__name__} {types} {constexprs} {sorted(attrs)}"
    if key in seen:
        return
    seen.add(key)
    backend = make_backend(TARGET)
    options = backend.parse_options({"num_warps": kwargs.get("num_warps", 4)})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=attrs)
    source.make_ir(
        TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    print(f"{triton.__version__} {kernel.__name__} {len(seen)}")


def rank_losses() -> None:
    """Every absent input, both levels, all kinds of advantage, all estimators, sizes of 1."""
    for N, G, T in ((2, 3, 5), (1, 1, 1), (16, 8, 16)):
        B = N * G
        x, mask, ranks = torch.rand(B, T), torch.ones(B, T, dtype=torch.bool), torch.rand(N, G)
        valid = torch.ones(N, dtype=torch.bool)
        full = LossOptions(beta=0.1, entropy_coef=0.1)
        one = torch.tensor(2.0)
        given = TokenInputs(None, ranks, ranks, ranks > 0.5, ranks[:, 0], valid, x, x, mask, x, one, one)
        rank_loss.rank_loss(x, x, given, full)
        rank_loss.rank_loss(x, None, TokenInputs(oracle_ranks=ranks), LossOptions())
    x = x.bfloat16()
    for level, given in itertools.product(("token", "sequence"), (torch.rand(B), torch.rand(B, T))):
        options = LossOptions(importance_sampling_level=level, delta=2.0, loss_type="dapo")
        inputs = TokenInputs(given, old_logps=x, ref_logps=x, mask=mask)
        rank_loss.rank_loss(x, x, inputs, options)
    kinds = (
        ("oracle", "none", "k1"),
        ("paper", "group", "k2"),
        ("paper_swapped", "none", "k3"),
        ("zscore", "group", "k1"),
    )
    for kind, scale, kl in kinds:
        options = LossOptions(
            kind=kind, scale=scale, kl=kl, score="sum", loss_type="dr_grpo", max_completion_length=9, beta=0.1
        )
        inputs = TokenInputs(oracle_ranks=ranks, valid=valid, old_logps=x, ref_logps=x)
        rank_loss.rank_loss(x, None, inputs, options)
    for loss_type in ("bnpo", "luspo", "cispo", "sapo"):
        options = LossOptions(
            loss_type=loss_type, kl_clamp=3.0, unbiased_kl=True, beta=0.1, entropy_aggregate="tokens",
            entropy_coef=0.1, empty_rows="skip", dual_clip=3.0 if loss_type in ("bnpo", "luspo") else None,
        )  # fmt: skip
        rank_loss.rank_loss(x, x, TokenInputs(oracle_ranks=ranks, old_logps=x, ref_logps=x), options)


def rows() -> None:
    """Every dtype, sizes of 1, absent inputs, all estimators."""
    for M, V, dtype in itertools.product(
        (1, 3), (1, 257, 4096), (torch.float32, torch.bfloat16, torch.float16)
    ):
        logits = torch.rand(M, V, dtype=dtype)
        ids, ones = torch.zeros(M, dtype=torch.int64), torch.ones(M)
        logits_loss.row_stats(logits, ids, Scaling())
        stats = RowStats(ones, ones, ones)
        for entropy, scaling in itertools.product((None, ones), (Scaling(0.7), Scaling(1.0, ones, 5.0, 2.0))):
            logits_loss.row_grad(logits, ids, scaling, stats, ones, entropy, logits)
    cube = torch.rand(2, 3, 40)[:, :-1]
    logits_loss.row_stats(cube, torch.zeros(4, dtype=torch.int32), Scaling())
    for kl in ("k1", "k2", "k3"):
        for extra in ((ones, ones, ones), (None, None, None)):
            options = LossOptions(kl=kl, beta=0.1, delta=2.0 if extra[0] is None else None)
            logits_loss.row_loss(logits, ids, Scaling(), RowInputs(ones, ones, *extra), options)


def decode_steps() -> None:
    """Every 16-bit dtype, one group and several, one response and more rows than a tile."""
    for dtype, (N, H, K, G, D) in itertools.product(
        (torch.bfloat16, torch.float16), ((1, 1, 1, 1, 16), (2, 8, 2, 3, 48), (1, 28, 4, 8, 128))
    ):
        query, keys = torch.rand(N, H, G, D, dtype=dtype), torch.rand(N, K, 300, D, dtype=dtype)
        prompts = torch.full((N,), 290, dtype=torch.int32)
        own = torch.ones(1, dtype=torch.int32)
        prefix_decode.prefix_decode(query, keys, keys, prompts, own, 0.1)
        rows, place = torch.rand(N * G, H * D, dtype=dtype), torch.zeros(N * G, dtype=torch.int64)
        for delta in (None, rows):
            decode_step.add_rms_norm(rows, delta, rows[0], 1e-6)
        decode_step.silu_mul(rows, rows)
        heads, few, angles = (
            rows.view(-1, H, D),
            torch.rand(N * G, K, D, dtype=dtype),
            rows[:, :D].contiguous(),
        )
        for norms in (None, (angles[0], angles[0])):
            decode_step.rotate_store(heads, few, few, angles, angles, norms, 1e-6, keys, keys, place, place)


def main() -> None:
    JITFunction.run = compile_launch
    for G in (1, 8, 64):
        for kind in ("directed", "zscore", "paper"):
            scores = torch.rand(2, G)
            rank_penalty.rank_penalty(RankInputs(scores, scores), RankOptions(kind=kind, scale="group"))
            judged = RankInputs(scores, scores, scores > 0.5, scores[:, 0])
            rank_penalty.rank_penalty(judged, RankOptions(kind=kind))
    rank_losses()
    rows()
    for loss_type in ("cispo", "sapo", "dapo"):
        options = LossOptions(
            loss_type=loss_type, kl_clamp=3.0, unbiased_kl=True, beta=0.1, entropy_coef=0.1,
            dual_clip=3.0 if loss_type == "dapo" else None,
        )  # fmt: skip
        logits, ids, ones = torch.rand(3, 40), torch.zeros(3, dtype=torch.int64), torch.ones(3)
        given = RowInputs(ones, ones, ones, ones, None, ones)
        logits_loss.row_loss(logits, ids, Scaling(1.0, ones, 5.0, 2.0), given, options)
    decode_steps()
    scale_gradient.scale_gradient_(torch.rand(9), torch.tensor(2.0))
    linear_loss.compact_rows(torch.rand(4, 9), torch.tensor([False, True, False, True]))


if __name__ == "__main__":
    main()
