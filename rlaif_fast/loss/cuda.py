"""The CUDA C++ kernel of the rank penalty, as the backend table takes it."""

from __future__ import annotations

import re

import torch

from rlaif_fast.loss import extension
from rlaif_fast.loss.cpu import rank_penalty, refuses

__all__ = ["rank_penalty", "supports", "unavailable"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable() -> str | None:
    """Return why the kernel cannot run on this machine, or None."""
    reason = extension.unavailable()
    if reason is None and extension.load().build_info()["cuda"] is None:
        reason = "the extension rlaif_fast._C was built without CUDA (it needs torch with CUDA, and nvcc)"
    if reason is None and not torch.cuda.is_available():
        reason = "torch finds no CUDA device"
    return reason or _refuses_device(*torch.cuda.get_device_capability())


def _refuses_device(major: int, minor: int) -> str | None:
    """Why a device of this compute capability runs none of the extension's code, or None."""
    architectures = extension.load().build_info()["cuda_architectures"]
    found = re.findall(r"(\d+)\.(\d+)(a?)\S*?(\+PTX)?(?:\s|$)", architectures)
    if not found:  # architectures by name: "Hopper"
        return None
    for of, least, exact, ptx in found:
        of, least = int(of), int(least)
        # Machine code runs on later devices of its generation, PTX on those of later generations too.
        later = not exact and ((of == major and least <= minor) or (ptx and (of, least) <= (major, minor)))
        if later or (of, least) == (major, minor):
            return None
    return (
        f"the extension rlaif_fast._C was built for compute capability {architectures}, and the device has "
        f"{major}.{minor}; build it again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def supports(op: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> str | None:
    """Return why a call cannot run, or None."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}, not on a CUDA device"
    return refuses(dtype, group_size, DTYPES)
