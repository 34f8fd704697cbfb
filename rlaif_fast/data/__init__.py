"""Datasets: the row, how files are read, and the embedded synthetic one."""

from rlaif_fast.data.reader import ReadReport, read_examples, read_report
from rlaif_fast.data.schema import Example
from rlaif_fast.data.summary import CategorySummary, chance_accuracy, chance_by_category, summarise
from rlaif_fast.data.synthetic.dataset import VOCABULARY, DatasetPaths, SyntheticConfig, make_dataset

__all__ = [
    "VOCABULARY",
    "CategorySummary",
    "DatasetPaths",
    "Example",
    "ReadReport",
    "SyntheticConfig",
    "chance_accuracy",
    "chance_by_category",
    "make_dataset",
    "read_examples",
    "read_report",
    "summarise",
]
