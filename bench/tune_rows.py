"""Search the launch configuration of the row kernels on this GPU; the ones in use are marked.

    python bench/tune_rows.py [--rows 4096] [--vocabulary 152064]

Writes nothing: the constants in kernels/logits_loss.py are changed by hand, for a gain that a second run
confirms.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import torch

from rlaif_fast.loss.inputs import RowInputs, Scaling
from rlaif_fast.loss.options import LossOptions
from rlaif_fast_kernels import logits_loss


def milliseconds(call) -> float:  # type: ignore[no-untyped-def]
    """Return the median of 20 runs after a warm-up, by CUDA events."""
    times = []
    for repeat in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    M, V = arguments.rows, arguments.vocabulary
    source = torch.randn(M, V, device="cuda", dtype=torch.bfloat16) * 3
    logits = source.clone()
    ids = source.argmax(-1)
    ones = torch.ones(M, device="cuda")
    options = LossOptions(beta=0.1, entropy_coef=0.01)
    stats = logits_loss.row_stats(logits, ids, Scaling())
    given = RowInputs(ones, ones / M, stats.logps, stats.logps, None)
    calls = {  # name, bytes a logit at least, constant, call
        "row_stats": (2, "STREAM_BLOCK", lambda: logits_loss.row_stats(logits, ids, Scaling())),
        "row_grad": (
            4,
            "STREAM_BLOCK",
            lambda: logits_loss.row_grad(logits, ids, Scaling(), stats, ones, ones, logits),
        ),
        "row_loss": (
            4,
            "RESIDENT_BLOCK",
            lambda: logits_loss.row_loss(logits, ids, Scaling(), given, options),
        ),
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, M={M}, V={V}, bfloat16")
    print("| kernel | block B | thread B | ms | GB/s of the least bytes | |\n|---|---|---|---|---|---|")
    default_thread = logits_loss.THREAD_BYTES
    for name, (least, constant, call) in calls.items():
        default = getattr(logits_loss, constant)
        for block, thread in itertools.product((8192, 16384, 32768, 65536), (16, 32, 64)):
            if not 32 <= block // thread <= 1024:
                continue
            setattr(logits_loss, constant, block)
            logits_loss.THREAD_BYTES = thread
            logits.copy_(source)
            time = milliseconds(call)
            used = "in use" if (block, thread) == (default, default_thread) else ""
            print(f"| {name} | {block} | {thread} | {time:.3f} | {M * V * least / time / 1e6:.0f} | {used} |")
        setattr(logits_loss, constant, default)
        logits_loss.THREAD_BYTES = default_thread


if __name__ == "__main__":
    main()
