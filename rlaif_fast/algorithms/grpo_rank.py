"""GRPO_rank: the oracle's order, weighted by how far the policy's own order is from it (arXiv 2510.02561)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rlaif_fast.algorithms.base import Feedback, KernelAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions


class GrpoRank(KernelAlgorithm):
    """Advantages of one of the kinds "directed", "oracle", "paper" and "paper_swapped"; see `rank_advantages`."""

    feedback: Feedback = "ranks"

    @classmethod
    def ignores(cls, options: AlgorithmOptions) -> Collection[str]:
        """Only a directed advantage uses the penalty weight."""
        return () if options.advantage == "directed" else ("penalty_weight",)

    @property
    def rank_options(self) -> dict[str, Any]:
        """See `KernelAlgorithm`."""
        options = self.options
        return {
            "kind": options.advantage,
            "penalty_weight": options.penalty_weight,
            "scale": options.scale,
        }
