"""GRPO: scores, centred and divided by their standard deviation in the group (arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rlaif_fast.algorithms.base import Feedback, KernelAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions


class Grpo(KernelAlgorithm):
    """A = (R - mean R) / (std R + 1e-4) over each group."""

    feedback: Feedback = "scores"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """It uses no ranks; `advantage: zscore` is another name for it."""
        return ("penalty_weight",) if options.advantage == "zscore" else ("advantage", "penalty_weight")

    @property
    def rank_options(self) -> dict[str, Any]:
        """See `KernelAlgorithm`."""
        return {"kind": "zscore", "scale": self.options.scale}
