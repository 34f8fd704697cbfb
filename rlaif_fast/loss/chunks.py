"""How many rows of logits the fused linear losses hold at once.

Letters: M rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch

from rlaif_fast.loss.inputs import Head

# Large enough that the matmuls run at full speed and the weight's gradient is read and written few times, small beside
# that gradient itself.
CPU_BYTES, CPU_LEAST_ROWS = 64 << 20, 64

# On a GPU the matmuls run at full speed from about 4096 rows; more saves passes over the weight's gradient. 1.5 GiB
# hold 5120 rows of 152064 logits in 16 bits.
GPU_BYTES, GPU_MOST_ROWS = 3 << 29, 8192
ROW_TILE = 256  # chunks on a GPU are whole tiles of the matmuls


def cpu_chunk_rows(head: Head, chunk_size: int | None, rows: int) -> int:
    """Return the rows of a chunk on a CPU; how many `rows` there are makes no difference."""
    if chunk_size is not None:
        return chunk_size
    return max(CPU_LEAST_ROWS, CPU_BYTES // (head.weight.shape[0] * head.weight.element_size()))


def gpu_chunk_rows(head: Head, chunk_size: int | None, rows: int) -> int:
    """Return the rows of a chunk on a GPU.

    Several chunks sum the weight's gradient in float32; a single one writes it in its own dtype. Where that has 16
    bits, the bytes of the sum may go to logits instead: all rows are one chunk where that takes no more memory, and no
    sum is written, read again or cast.

    Args:
        head: The head; its weight (V, H).
        chunk_size: Rows as the caller wants them; None to choose.
        rows: M, how many there are whose gradients are wanted; 0 where none are.
    """
    if chunk_size is not None:
        return chunk_size
    of_row = head.weight.shape[0] * head.weight.element_size()
    of_sum = head.weight.numel() * max(0, torch.float32.itemsize - head.leaf.element_size())
    if 0 < rows * of_row <= GPU_BYTES + of_sum:
        return rows
    return min(GPU_MOST_ROWS, max(1, GPU_BYTES // of_row // ROW_TILE) * ROW_TILE)
