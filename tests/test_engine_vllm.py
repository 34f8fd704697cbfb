"""`sampler: vllm` with vLLM: `pytest -m engine tests/test_engine_vllm.py` in the environment of bench/engine_env.sh."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif_fast.runs.folder import read_jsonl

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; bench/engine_env.sh makes an environment that has it",
    ),
]

HERE = Path(__file__).resolve().parent
LIMIT = 1800  # seconds; the first start compiles
RUN = {
    "seed": 5,
    "sampler": "vllm",
    "sampler_options": '{"max_model_len": 512, "max_num_seqs": 64}',
    "synthetic_sft_clips": 12,
    "synthetic_rl_clips": 8,
    "synthetic_validation_clips": 4,
    "synthetic_test_clips": 5,
    "sft_steps": 4,
    "sft_videos_per_step": 4,
    "max_steps": 4,
    "videos_per_step": 3,
    "num_generations": 4,
    "eval_steps": 2,
    "gallery_clips": 1,
    "report": "false",
    "tensorboard": "false",
    "num_processes": 1,
    "threads": 1,
}


def run(*words: str) -> str:
    """What a Python process of its own prints."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_vl", "tied"), ("qwen3_vl", "untied"), ("qwen3_vl", "lora")],
)
def test_log_probabilities_agree_before_and_after_updates(family, kind):
    found = json.loads(run(str(HERE / "engine_agreement.py"), family, kind).strip().splitlines()[-1])
    assert found["version"] == 1 + found["updates"]
    assert found["tokens"] > 1000
    for name, worst in found["worst"].items():
        assert len(worst) == 1 + found["updates"]
        assert max(worst) < 1e-3, (name, worst)


def test_a_tiny_run_learns_from_what_vllm_draws(tmp_path):
    values = RUN | {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    run("-m", "rlaif_fast.train", *(f"--{name}={value}" for name, value in values.items()))
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["stage"] == "rl"]
    ratios = [row for row in rows if "sampling_ratio" in row]
    assert len(ratios) == 4
    for row in ratios:
        assert row["sampling_ratio"] == pytest.approx(1, abs=1e-3)
        assert row["sampling_ratio_max"] == pytest.approx(1, abs=1e-3)
        assert row["sampling_ratio_capped"] == 0
    assert "final_accuracy" in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_an_adapter_is_loaded_as_it_is_saved(tmp_path):
    """vLLM finds every layer of `adapter_config.json` and gives the policy's log-probabilities with it."""
    found = json.loads(run(str(HERE / "engine_lora.py"), str(tmp_path)).strip().splitlines()[-1])
    assert found["apart"] > 0.1  # the adapter changes them
    assert found["worst"]["base"] < 1e-3
    assert found["worst"]["adapter"] < 1e-3
