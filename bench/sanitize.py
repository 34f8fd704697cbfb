"""Every GPU kernel once, at small odd sizes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python bench/sanitize.py
    compute-sanitizer --tool racecheck python bench/sanitize.py

Without a CUDA device it runs the Triton kernels in the interpreter (TRITON_INTERPRET=1), to test the script.
The caching allocator is off: with it, an access beyond a tensor would lie in memory that is allocated too.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from rlaif_fast.loss import backends
from rlaif_fast.loss.inputs import RankInputs, RowInputs, Scaling, TokenInputs
from rlaif_fast.loss.options import LossOptions, RankOptions
from rlaif_fast_kernels import linear_loss, logits_loss, rank_loss, rank_penalty


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
    if device == "cuda":
        torch.cuda.synchronize()
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
