"""What is particular to the fused linear loss on a GPU: compaction, the weight's gradient, chunk sizes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_cases import DEVICE, GRADIENT, error, uninitialised_memory_is_nan

from rlaif_fast.loss import chunks
from rlaif_fast.loss.inputs import Head
from rlaif_fast_kernels import linear_loss

poison = pytest.fixture(autouse=True)(uninitialised_memory_is_nan)

PATTERNS = {
    "alternate": [1, 0, 1, 0, 1, 0, 1],
    "front kept": [1, 1, 1, 0, 0],
    "front dropped": [0, 0, 0, 1, 1, 1, 1],
    "one kept": [0, 0, 0, 1],
    "none kept": [0, 0],
    "all kept": [1, 1, 1],
    "no rows": [],
}


@pytest.mark.parametrize("V", [1, linear_loss.BLOCK_V - 1, 2 * linear_loss.BLOCK_V + 1])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_compaction_keeps_every_kept_row(pattern: list[int], V: int) -> None:
    keep = torch.tensor(pattern, dtype=torch.bool, device=DEVICE)
    original = torch.arange(len(pattern) * V, device=DEVICE).view(-1, V).to(torch.float32)
    rows = original.clone()
    order = linear_loss.compact_rows(rows, keep)
    assert sorted(order.tolist()) == keep.nonzero().squeeze(1).tolist()
    assert torch.equal(rows[: len(order)], original[order])


def test_compaction_within_a_wider_buffer() -> None:
    buffer = torch.arange(60.0, device=DEVICE).view(6, 10)
    rows, original = buffer[:, :7], buffer.clone()
    order = linear_loss.compact_rows(rows, torch.tensor([0, 1, 0, 0, 1, 1], dtype=torch.bool, device=DEVICE))
    assert torch.equal(rows[:3], original[order, :7])
    assert torch.equal(buffer[:, 7:], original[:, 7:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_gradient_is_summed_in_float32(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    V, H, m, chunks = 70, 24, 48, 6
    total = torch.full((V, H), float("nan"), device=DEVICE)
    exact = torch.zeros(V, H, dtype=torch.float64, device=DEVICE)
    for chunk in range(chunks):
        grad_logits = torch.rand(m, V, generator=random).to(DEVICE, dtype)
        hidden = torch.rand(m, H, generator=random).to(DEVICE, dtype)
        linear_loss.add_product(total, grad_logits, hidden, first=chunk == 0)
        exact += grad_logits.double().t() @ hidden.double()
    in_place = linear_loss.sums_in_float32(total.device, dtype) or dtype == torch.float32
    # Products that are rounded before they are added carry that rounding; their sum must not add to it.
    assert error(total, exact) < (GRADIENT[torch.float32] if in_place else torch.finfo(dtype).eps / 2)


def test_slabs_cover_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "sums_in_float32", lambda device, dtype: False)
    monkeypatch.setattr(linear_loss, "SLAB", 3)
    grad_logits = torch.ones(4, 10, device=DEVICE, dtype=torch.bfloat16)
    hidden = torch.ones(4, 5, device=DEVICE, dtype=torch.bfloat16)
    total = torch.full((10, 5), float("nan"), device=DEVICE)
    for repeat in range(2):
        linear_loss.add_product(total, grad_logits, hidden, first=repeat == 0)
    assert (total == 8).all()


@pytest.mark.parametrize(
    ("V", "dtype", "rows"),
    [(152_064, torch.bfloat16, 5120), (32_000, torch.bfloat16, 8192), (1, torch.float32, 8192)],
)
def test_chunks_fit_their_budget(V: int, dtype: torch.dtype, rows: int) -> None:
    head = Head(torch.empty(V, 1, dtype=dtype, device="meta"), None)
    assert linear_loss.chunk_rows(head, None, 0) == linear_loss.chunk_rows(head, None, 10**9) == rows
    assert rows * V * head.weight.element_size() <= chunks.GPU_BYTES
    assert linear_loss.chunk_rows(head, 7, 5) == 7


def test_one_chunk_takes_no_more_memory_than_several() -> None:
    """Its bytes are those of all logits and a gradient of 16 bits, theirs those of a chunk and a float32 sum."""
    V, H = 152_064, 3584
    weight = torch.empty(V, H, dtype=torch.bfloat16, device="meta")
    head = Head(weight, None)
    most = next(rows for rows in range(16_384, 0, -1) if linear_loss.chunk_rows(head, None, rows) == rows)
    assert most == 8879
    assert most * V * 2 + V * H * 2 <= chunks.GPU_BYTES + V * H * 4 < (most + 1) * V * 2 + V * H * 2
    # Beside a float32 copy the sum is float32 anyway.
    copied = Head(weight, None, float32_weight=weight.float())
    assert linear_loss.chunk_rows(copied, None, 5295) == 5295
    assert linear_loss.chunk_rows(copied, None, 5296) == 5120
