"""lmms-eval's own evaluator with our model: one process, and two that share the questions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif_fast.policy.tiny import TinySize, make_tiny
from rlaif_fast.video.testing import counter_frames, write_video

TASK = """
task: told
dataset_path: json
dataset_kwargs: {{data_files: {folder}/told.jsonl}}
test_split: train
output_type: generate_until
doc_to_visual: !function told.visual
doc_to_text: !function told.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, do_sample: false}}
process_results: !function told.results
metric_list: [{{metric: length, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0.0}}
"""
FUNCTIONS = """
def visual(doc):
    return [doc["video"]]
def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
def results(doc, result):
    return {"length": float(len(result[0]))}
"""
RUN = """
import argparse, sys
import lmms_eval.models
from lmms_eval import evaluator
from lmms_eval.models.registry_v2 import ModelRegistryV2
from lmms_eval.tasks import TaskManager
from rlaif_fast.evals.lmms_eval import manifest

for registry in vars(lmms_eval.models).values():
    if isinstance(registry, ModelRegistryV2):
        registry.register_manifest(manifest())
found = evaluator.simple_evaluate(
    model="rlaif_fast",
    model_args="pretrained={model},fps=4",
    tasks=["told"],
    batch_size=2,
    device="cpu",
    task_manager=TaskManager(include_path="{folder}"),
    distributed_executor_backend=sys.argv[1],
    cli_args=argparse.Namespace(process_with_media=False),
)
if found:
    print("FOUND", found["results"]["told"]["length,none"], len(found["samples"]["told"]))
"""


def evaluated(script: Path, backend: str, *launcher: str) -> tuple[str, str]:
    """Mean length of the answers, and their number."""
    environment = {**os.environ, "HF_HOME": str(script.parent / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(script), backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [found] = re.findall(r"FOUND (\S+) (\d+)", done.stdout)
    return found


@pytest.mark.parametrize("backend", ["accelerate", "torchrun"])
def test_two_processes_answer_what_one_does(backend, tmp_path):
    pytest.importorskip("lmms_eval.evaluator", exc_type=ImportError)
    words = [
        "what",
        "happens",
        "now",
        "?",
        "a",
        "b",
        "c",
        "d",
        "e",
        "f",
        "g",
        "h",
        "red",
        "square",
        "blue",
        "circle",
    ]
    model = make_tiny(tmp_path / "model", words, size=TinySize(layers=2, vision_layers=1))
    rows = []
    for number in range(5):
        video = write_video(tmp_path / f"{number}.webm", counter_frames(4 + number, 64, 64), fps=4)
        rows.append({"video": str(video), "question": f"what {words[number]} ?", "answer": "a"})
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "told.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "told.py").write_text(FUNCTIONS)
    script = tmp_path / "run.py"
    script.write_text(RUN.format(model=model, folder=tmp_path))
    one = evaluated(script, "accelerate")
    two = evaluated(
        script, backend, *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    )
    assert one == two and one[1] == "5" and float(one[0]) > 0
