"""A kernel that cannot keep its values in registers, and the verdict of the ahead-of-time gate on it."""

import triton
import triton.language as tl

from rlaif_fast_kernels.aot_report import compile_config
from rlaif_fast_kernels.launch import AotConfig


@triton.jit
def spilling_kernel(x, out, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(x + offs)
    for _ in range(3):  # needs all of value at once, twice over
        value = value * tl.sum(value, axis=0) + tl.exp(value)
    tl.store(out + offs, value)


if __name__ == "__main__":
    for block in (128, 8192):
        config = AotConfig(
            spilling_kernel, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": block}, 1, 1, f"{block}"
        )
        compiled = compile_config(config, 90)
        print(block, compiled.spills, compiled.registers, compiled.local_stores)
