"""Datasets: the row, how files are read, and the embedded synthetic one."""

from rlaif_fast.data.schema import Example
from rlaif_fast.data.synthetic import VOCABULARY, DatasetPaths, SyntheticConfig, make_dataset

__all__ = [
    "VOCABULARY",
    "DatasetPaths",
    "Example",
    "SyntheticConfig",
    "make_dataset",
]
