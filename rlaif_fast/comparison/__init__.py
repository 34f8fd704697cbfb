"""Arms that start from the same policy, learn from the same feedback and are measured on the same questions."""

from rlaif_fast.comparison.plan import Plan, read_plan
from rlaif_fast.comparison.report import write_report
from rlaif_fast.comparison.runner import run_jobs

__all__ = ["Plan", "read_plan", "run_jobs", "write_report"]
