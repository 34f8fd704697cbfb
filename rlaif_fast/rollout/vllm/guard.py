"""Checks that an engine and the policy give tokens the same log-probabilities: a mismatch would otherwise be silent."""

from __future__ import annotations

import torch

from rlaif_fast.errors import RlaifFastError

TOKENS = 16
TOLERANCES = {torch.float32: 1e-3}
HALF_PRECISION = 2e-2
AT_START = (
    "frames that are normalised twice (mm_device_do_normalize), log-probabilities at another temperature "
    "(logprobs_mode: processed_logprobs), or weights that the engine did not take over"
)
AFTER_UPDATE = (
    "a prefix or encoder cache that outlived the weights, or a tied head that kept a copy of the old "
    "embedding"
)


def check_agreement(
    ours: torch.Tensor,  # (M,)
    theirs: torch.Tensor,  # (M,)
    dtype: torch.dtype,
    version: int,
) -> None:
    """Stop where log-probabilities of the same tokens differ by more than the precision explains.

    Args:
        ours: Of the policy.
        theirs: Of the engine.
        dtype: The dtype that both compute in.
        version: Of the engine's weights; 1 is the start.

    Raises:
        RlaifFastError: They differ; the message has the difference and the likely causes.
    """
    most = TOLERANCES.get(dtype, HALF_PRECISION)
    worst = float((ours - theirs).abs().max())
    if worst <= most:
        return
    when, causes = ("at the start", AT_START) if version == 1 else ("after an update", AFTER_UPDATE)
    raise RlaifFastError(
        f"sampler: {when} vLLM's log-probabilities differ from the policy's by {worst:.2g} on {len(ours)} tokens, and "
        f"{str(dtype).removeprefix('torch.')} explains {most:g}; likely {causes}"
    )
