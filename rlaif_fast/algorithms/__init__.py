"""Algorithms: what a group's feedback is worth, and which loss learns from it. One file each."""

from rlaif_fast.algorithms.base import Algorithm, GroupAlgorithm
from rlaif_fast.algorithms.options import AlgorithmOptions
from rlaif_fast.algorithms.registry import ALGORITHMS, make_algorithm

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmOptions", "GroupAlgorithm", "make_algorithm"]
