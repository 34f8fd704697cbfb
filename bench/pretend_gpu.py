"""A pytest plugin that pretends there is a GPU, to show what a GPU machine would select: only collect with it.

PYTHONPATH=bench TRITON_INTERPRET=1 pytest -p pretend_gpu --collect-only bench/bench_rank_loss.py -k cuda
"""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run tests."""
    if not config.option.collectonly:
        raise pytest.UsageError("pretend_gpu: expected --collect-only, there is no GPU to run on")


torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *_: (9, 0)
