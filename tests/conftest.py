"""Set-up that has to come before any test module is imported, and how tests are dealt to processes."""

import os
import shutil
from pathlib import Path

import pytest
import torch

# Where there is no CUDA device, Triton kernels run in Triton's interpreter, chosen when triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Their fixtures are loaded by the files that need them; their asserts show values as those of tests do.
pytest.register_assert_rewrite("benchmark_parts", "tiny_runs")

KERNEL_TESTS = ("test_triton_", "test_decode_step", "test_patchify", "test_prefix_decode")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark compiled Triton tests as GPU tests; RLAIF_FAST_TEST_SHARD=index/count keeps one share of all."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if item.path.name.startswith(KERNEL_TESTS) and item.path.name != "test_triton_aot.py":
                item.add_marker(pytest.mark.gpu)
    if shard := os.environ.get("RLAIF_FAST_TEST_SHARD"):
        index, count = map(int, shard.split("/"))
        items[:] = items[index::count]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache_dir that all tests share, so that each synthetic dataset is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny policy, to read."""
    from rlaif_fast.data import VOCABULARY
    from rlaif_fast.policy.tiny import make_tiny

    return make_tiny(tmp_path_factory.mktemp("models") / "tiny", set(VOCABULARY), seed=1)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to change."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))
