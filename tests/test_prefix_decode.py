"""Attention of a decode step over shared prompts: the kernel against the reference, the reference against a softmax."""

import pytest
import torch

pytest.importorskip("triton")

from triton_cases import DEVICE, error, uninitialised_memory_is_nan

from rlaif_fast.policy.prefix_decode import prefix_decode, prefix_decode_reference, visible_columns
from rlaif_fast_kernels import prefix_decode as kernels

# Products of the inputs' dtype, sums in float32; a 16-bit result carries its rounding, and the weights are rounded to
# 16 bits before the second product.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = [
    dtype for dtype in TOLERANCE if kernels.supports(DEVICE, dtype, 16) is None
]  # a GPU's are of 16 bits
WIDEST = DTYPES[0]


@pytest.fixture(autouse=True)
def poisoned():
    yield from uninitialised_memory_is_nan()


def problem(prompts, own, G, H, K, L, D, dtype=WIDEST, seed=0):
    """A decode step; columns that no response sees hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    N = len(prompts)
    query = torch.randn(N, H, G, D, generator=generator)
    keys, values = (torch.randn(N, K, L, D, generator=generator) for _ in range(2))
    lengths = torch.tensor(prompts, dtype=torch.int32)
    unseen = ~visible_columns(lengths, own, G, L).any(1)  # (N, L)
    for x in (keys, values):
        x.masked_fill_(unseen[:, None, :, None], float("nan"))
    tensors = [x.to(DEVICE, dtype) for x in (query, keys, values)]
    return *tensors, lengths.to(DEVICE), torch.tensor([own], dtype=torch.int32, device=DEVICE)


def expected(query, keys, values, prompts, own, scale):
    keys = keys.double().nan_to_num()
    return prefix_decode_reference(query.double(), keys, values.double(), prompts, own, scale)


CASES = [
    # prompts, own, G, H, K, L, D
    ((5,), 1, 1, 1, 1, 8, 16),
    ((64, 1, 63), 3, 2, 4, 2, 80, 32),
    ((100, 129), 5, 8, 14, 2, 200, 64),
    ((190,), 2, 3, 6, 6, 256, 48),
    ((40, 260, 7), 1, 5, 8, 2, 300, 128),
    ((16,), 4, 64, 2, 1, 272, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_reference(case, dtype):
    step = problem(*case, dtype=dtype)
    scale = case[-1] ** -0.5
    result = prefix_decode(*step, scale)
    assert result.dtype == dtype and result.is_contiguous()
    assert error(result, expected(*step, scale)) < TOLERANCE[dtype]


def test_strided_buffers():
    query, keys, values, prompts, own = problem((33, 70), 2, 4, 8, 2, 96, 32)
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)  # as the model hands it over
    wide = torch.zeros(2, 2, 96, 64, device=DEVICE, dtype=WIDEST)
    wide[..., :32] = keys
    result = prefix_decode(transposed, wide[..., :32], values, prompts, own, 0.2)
    assert error(result, expected(query, keys, values, prompts, own, 0.2)) < TOLERANCE[WIDEST]


@pytest.mark.parametrize("processors", [1, 4, 4000])
def test_the_parts_are_merged_whatever_their_number(processors, monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda x: processors)
    step = problem((300, 2), 3, 4, 8, 2, 400, 32)
    assert error(prefix_decode(*step, 0.3), expected(*step, 0.3)) < TOLERANCE[WIDEST]


def test_parts_are_no_constant_of_the_kernel_that_takes_a_second_to_compile():
    """Buffers of another length have another number of them."""
    configs = [config for config in kernels.aot_configs() if config.kernel is kernels.prefix_part_kernel]
    assert configs and all("S" in config.signature for config in configs)


def test_large_scores_do_not_overflow():
    query, keys, values, prompts, own = problem((150,), 2, 4, 2, 1, 192, 16)
    result = prefix_decode(100 * query, keys, values, prompts, own, 5.0)
    assert error(result, expected(100 * query, keys, values, prompts, own, 5.0)) < max(
        1e-4, TOLERANCE[WIDEST]
    )


def test_the_reference_is_each_response_s_own_softmax():
    query, keys, values, prompts, own = (x.cpu() for x in problem((3, 6), 2, 2, 2, 1, 12, 8, torch.float32))
    result = prefix_decode_reference(query, keys.nan_to_num(), values.nan_to_num(), prompts, own, 0.5)
    for n, prompt in enumerate(prompts.tolist()):
        for g in range(2):
            columns = [*range(prompt), prompt + g, prompt + 2 + g]
            for h in range(2):
                weights = (keys[n, 0, columns] @ query[n, h, g] * 0.5).softmax(0)
                torch.testing.assert_close(result[n, h, g], weights @ values[n, 0, columns])


def test_what_the_kernel_cannot_take_is_refused():
    query, keys, values, prompts, own = problem((3,), 1, 1, 1, 1, 8, 16)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16; got torch\.float64"):
        prefix_decode(query.double(), keys.double(), values.double(), prompts, own, 1.0)
    assert "at most 256; got 512" in kernels.supports(query.device.type, torch.float32, 512)
