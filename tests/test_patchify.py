"""Patches against Hugging Face's processors: the reference, the CPU path and the Triton kernel."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_fast.video import PatchSpec, patchify
from rlaif_fast.video.patchify import patchify_reference
from rlaif_fast.video.preprocess import PATCHIFIERS
from rlaif_fast_kernels.launch import INTERPRETED

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = [name for name in PATCHIFIERS if HAS_TRITON or name != "triton"]

# The reference multiplies by 1 / (255 std) and adds -mean / std where the processors subtract 255 mean and
# divide by 255 std: the same value, at most 3 roundings apart. bfloat16 keeps 8 bits, float16 11, of values
# up to 2.7.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-6,
}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
ORDER = json.loads((Path(__file__).parent / "data" / "patch_order.json").read_text())


def random_frames(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))


def run(backend, frames, s, dtype=torch.float32):
    device = "cuda" if backend == "triton" and not INTERPRETED else "cpu"
    return patchify(frames.to(device), s, dtype, backend).cpu()


def spec(patch=8, temporal=2, merge=2):
    return PatchSpec(patch, temporal, merge, **CLIP)


def reference(frames, s, dtype=torch.float64):
    return patchify_reference(
        frames,
        patch_size=s.patch_size,
        temporal_patch_size=s.temporal_patch_size,
        merge_size=s.merge_size,
        mean=s.mean,
        std=s.std,
        dtype=dtype,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_and_column_order_is_the_processors(backend):
    """Each value's place is followed through: the two bytes of its number go through separately."""
    shape = ORDER["shape"]
    place = torch.arange(np.prod(shape)).view(shape)
    sizes = (ORDER[name] for name in ("patch_size", "temporal_patch_size", "merge_size"))
    s = PatchSpec(*sizes, (0.0,) * 3, (1 / 255,) * 3)
    low, high = (run(backend, (place // d % 256).to(torch.uint8), s) for d in (1, 256))
    assert torch.equal((low + 256 * high).round().long(), torch.tensor(ORDER["rows"]))


def test_image_equals_hugging_face_pil_processor():
    """A still image through Hugging Face's own processor without torchvision."""
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    image = pytest.importorskip("PIL.Image")
    frame = random_frames(1, 56, 84)
    processor = processors.Qwen2VLImageProcessorPil(do_resize=False)
    theirs = processor(image.fromarray(frame[0].numpy()), return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, 4, 6]]
    torch.testing.assert_close(
        patchify(frame, spec(14)),
        torch.as_tensor(theirs["pixel_values"]),
        atol=TOLERANCE[torch.float32],
        rtol=0,
    )


@settings(deadline=None, max_examples=25)
@given(
    backend=st.sampled_from(BACKENDS),
    frames=st.integers(1, 5),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch=st.sampled_from([1, 2, 8, 14, 16]),
    temporal=st.integers(1, 3),
    merge=st.integers(1, 3),
)
def test_backends_equal_the_reference(backend, frames, rows, columns, patch, temporal, merge):
    s = spec(patch, temporal, merge)
    x = random_frames(frames, rows * s.factor, columns * s.factor)
    got = run(backend, x, s)
    assert got.shape == (-(-frames // temporal) * rows * columns * merge**2, 3 * temporal * patch**2)
    torch.testing.assert_close(got.double(), reference(x, s), atol=TOLERANCE[torch.float32], rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(backend, dtype):
    x = random_frames(4, 32, 32)
    got = run(backend, x, spec(), dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), reference(x, spec()), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [14, 16])
def test_model_sizes(backend, patch):
    """Several programs a token; the last one is not full."""
    x = random_frames(3, 2 * 2 * patch, 3 * 2 * patch)
    torch.testing.assert_close(
        run(backend, x, spec(patch)).double(), reference(x, spec(patch)), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_frames(backend):
    views = (
        random_frames(8, 32, 64)[::2, :, ::2],
        random_frames(4, 33, 49)[:, 1:, 1:],
        random_frames(4, 32, 32).permute(0, 2, 1, 3),
        random_frames(4, 32, 32).flip(3)[..., [2, 1, 0]].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        random_frames(1, 32, 32).expand(4, -1, -1, -1),
    )
    for x in views:
        assert not x.is_contiguous()
        torch.testing.assert_close(run(backend, x, spec()).double(), reference(x, spec()), atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_frames(backend):
    assert run(backend, random_frames(0, 32, 32), spec()).shape == (0, 384)


def test_refusals():
    with pytest.raises(ValueError, match="backend must be"):
        patchify(random_frames(2, 16, 16), spec(), backend="numpy")
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run: patches must be"):
        run("triton", random_frames(2, 16, 16), spec(), torch.float64)
    with pytest.raises(TypeError, match="uint8"):
        run("triton", random_frames(2, 16, 16).float(), spec())
    with pytest.raises(ValueError, match="multiples of 16"):
        run("triton", random_frames(2, 16, 24), spec())


def test_automatic_choice_is_not_the_interpreter(monkeypatch):
    monkeypatch.setitem(PATCHIFIERS, "triton", (lambda *_: None, lambda *_, **__: pytest.fail("interpreted")))
    assert patchify(random_frames(2, 16, 16), spec()).shape == (4, 384)
