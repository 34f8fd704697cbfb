"""Algorithms: what a group's feedback is worth, and which loss learns from it. One per file."""

from rlaif_fast.algorithms.base import Algorithm, Critic, GroupAlgorithm, KernelAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.registry import ALGORITHMS, make_algorithm
from rlaif_fast.algorithms.verdicts import Verdicts

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "AlgorithmOptions",
    "Critic",
    "GroupAlgorithm",
    "KernelAlgorithm",
    "Verdicts",
    "make_algorithm",
]
