"""Every GPU kernel once, at small odd sizes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python bench/sanitize.py
    compute-sanitizer --tool racecheck python bench/sanitize.py

With TRITON_INTERPRET=1 it needs no CUDA device and runs the Triton kernels in the interpreter, to test the script.
The caching allocator is off: with it, an access beyond a tensor could hit memory that is also allocated.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from rlaif_fast.loss import backends
from rlaif_fast.loss.inputs import RankInputs, RowInputs, Scaling, TokenInputs
from rlaif_fast.loss.options import LossOptions, RankOptions
from rlaif_fast_kernels import (
    decode_step,
    linear_loss,
    logits_loss,
    patchify,
    prefix_decode,
    rank_loss,
    rank_penalty,
    scale_gradient,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("needs a CUDA device, or TRITON_INTERPRET=1")
    for G in (1, 7, 33, 64):
        scores, ranks = torch.rand(3, G, device=device), torch.rand(3, G, device=device)
        rank_penalty.rank_penalty(RankInputs(scores, ranks), RankOptions())
        cuda = next(row for row in backends.rows("rank_penalty") if row.name == "cuda")
        if device == "cuda" and cuda.unavailable() is None:
            cuda.load().rank_penalty(RankInputs(scores, ranks), RankOptions())
            print(f"rank_penalty G={G}: Triton and CUDA C++")
        else:
            print(f"rank_penalty G={G}: Triton only ({cuda.unavailable()})")

    options = LossOptions(beta=0.1, entropy_coef=0.1)
    for N, G, T in ((2, 5, 65), (1, 64, 3), (3, 1, 1)):
        rows = [torch.rand(N * G, T, device=device) for _ in range(5)]
        mask, ranks = rows[0] > 0.2, torch.rand(N, G, device=device)
        inputs = TokenInputs(
            oracle_ranks=ranks, old_logps=rows[1], ref_logps=rows[2], mask=mask, sampling_ratio=rows[3]
        )
        closed = rank_loss.rank_loss(rows[0], rows[4], inputs, options)
        assert closed.loss.isfinite(), f"rank_loss N={N} G={G} T={T}"
        print(f"rank_loss N={N} G={G} T={T}: {closed.loss.item():.4f}")

    for V in (1, 257, 20_001):
        for dtype in (torch.float32, torch.bfloat16):
            M = 5
            logits = torch.randn(M, V, device=device).to(dtype)
            ids = torch.randint(V, (M,), device=device)
            stats = logits_loss.row_stats(logits, ids, Scaling(0.7))
            ones, out = torch.ones(M, device=device), torch.empty_like(logits)
            logits_loss.row_grad(logits, ids, Scaling(0.7), stats, ones, ones, out)
            given = RowInputs(ones, ones, stats.logps, stats.logps, None)
            logits_loss.row_loss(logits, ids, Scaling(0.7), given, options)
            keep = torch.tensor([False, True, False, True, True], device=device)
            order = linear_loss.compact_rows(logits, keep)
            assert out.isfinite().all() and logits.isfinite().all() and len(order) == 3, f"V={V} {dtype}"
            print(f"row kernels V={V} {dtype}: {stats.logps.mean().item():.4f}")

    for H, K, D, G in ((4, 2, 48, 3), (7, 1, 128, 1)):
        for dtype in (torch.bfloat16, torch.float16):
            rows = torch.rand(G, H * D, device=device).to(dtype)
            query, key = rows.view(G, H, D).clone(), torch.rand(G, K, D, device=device).to(dtype)
            angles, eps = torch.rand(G, D, device=device).to(dtype), 1e-6
            keys = torch.zeros(1, K, 96, D, device=device, dtype=dtype)
            columns = torch.arange(70, 70 + G, device=device)  # behind a prompt of 70
            cells = keys, keys.clone(), torch.zeros_like(columns), columns
            decode_step.rotate_store(query, key, key, angles, angles, (angles[0], angles[0]), eps, *cells)
            prompts, own = (torch.full((1,), n, dtype=torch.int32, device=device) for n in (70, 1))
            attended = prefix_decode.prefix_decode(query.transpose(0, 1)[None], *cells[:2], prompts, own, 0.1)
            normed = decode_step.add_rms_norm(rows, rows.clone(), rows[0].clone(), eps)
            gated = decode_step.silu_mul(normed.clone(), rows)
            scale_gradient.scale_gradient_(gated, torch.tensor(2.0, device=device))
            assert all(x.isfinite().all() for x in (attended, normed, gated)), f"H={H} K={K} D={D} {dtype}"
            print(f"decode step H={H} K={K} D={D} G={G} {dtype}: {attended.mean().item():.4f}")
    for P in (14, 16):
        frames = torch.randint(0, 256, (3, 4 * P, 2 * P, 3), device=device).to(torch.uint8)
        sizes = {"patch_size": P, "temporal_patch_size": 2, "merge_size": 2}
        patches = patchify.patchify(frames, **sizes, mean=(0.5,) * 3, std=(0.5,) * 3)
        assert patches.isfinite().all() and len(patches) == 16, f"P={P}"
        print(f"patchify P={P}: {tuple(patches.shape)}")
    if device == "cuda":
        torch.cuda.synchronize()
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
