"""`sampler: vllm` with vLLM, in process and served; in the environment of bench/engine_env.sh:

pytest -m engine tests/test_engine_vllm.py
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_agreement import write_start
from tiny_runs import SMALL
from vllm_server import VllmServer

from rlaif_fast.rollout.vllm.requests import MediaItem
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.trainer.cached_model import tiny_folder
from rlaif_fast.trainer.datasets import load_data
from rlaif_fast.trainer.options import TrainConfig

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; bench/engine_env.sh makes an environment that has it",
    ),
]

HERE = Path(__file__).resolve().parent
LIMIT = 1800  # seconds; the first start compiles
RUN = SMALL | {"sampler": "vllm", "sampler_options": '{"max_model_len": 512, "max_num_seqs": 64}'}


def run(*words: str) -> str:
    """What a Python process of its own prints."""
    done = ended(*words)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def ended(*words: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own, at its end."""
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LIMIT)


def check_agreement(printed: str) -> None:
    """Whether log-probabilities were those of the policy with each version of its weights."""
    found = json.loads(printed.strip().splitlines()[-1])
    assert found["version"] == 1 + found["updates"]
    assert found["tokens"] > 1000
    for name, worst in found["worst"].items():
        assert len(worst) == 1 + found["updates"]
        assert max(worst) < 1e-3, (name, worst)


def check_ratios(folder: Path, steps: int, lag: int = 0) -> None:
    """Whether each step of RL was learned from once, with tokens drawn by the weights that learned.

    With a lag the first step alone is.
    """
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == "rl"]
    assert [row["step"] for row in rows if "sampling_ratio" in row] == [*range(1, steps + 1)]
    for row in rows[lag:] if lag else ():
        assert abs(row["sampling_ratio_max"] - 1) > 1e-3  # an update was between
    for row in rows[:lag] if lag else rows:
        assert row["sampling_ratio"] == pytest.approx(1, abs=1e-3)
        assert row["sampling_ratio_max"] == pytest.approx(1, abs=1e-3)
        assert row["sampling_ratio_capped"] == 0
    assert "final_accuracy" in json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_vl", "tied"), ("qwen3_vl", "untied"), ("qwen3_vl", "lora")],
)
def test_log_probabilities_agree_before_and_after_updates(family, kind):
    check_agreement(run(str(HERE / "engine_agreement.py"), family, kind))


@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_a_served_engine_agrees_before_and_after_updates(tmp_path, kind):
    write_start("qwen3_vl", kind, tmp_path)
    with VllmServer(tmp_path, tmp_path / "log") as server:
        check_agreement(run(str(HERE / "engine_agreement.py"), "qwen3_vl", kind, server.url))


def tiny_model(values: dict) -> Path:
    """The model that a run with these values will begin with."""
    config = TrainConfig(**{name: values[name] for name in values if name.startswith(("synthetic", "seed"))})
    config.model, config.cache_dir = "tiny", str(values["cache_dir"])
    return tiny_folder(config, load_data(config))


def test_a_tiny_run_learns_from_what_vllm_draws(tmp_path):
    values = RUN | {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    run("-m", "rlaif_fast.train", *(f"--{name}={value}" for name, value in values.items()))
    check_ratios(tmp_path / "run", RUN["max_steps"])


def test_a_server_draws_one_step_ahead(tmp_path):
    values = RUN | {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    with VllmServer(tiny_model(values), tmp_path / "log") as server:
        values |= {"rollout_lag": 1, "learning_rate": 1e-3, "warmup_steps": 0}
        values["sampler_options"] = json.dumps({"urls": [server.url]})
        run("-m", "rlaif_fast.train", *(f"--{name}={value}" for name, value in values.items()))
    check_ratios(tmp_path / "run", RUN["max_steps"], lag=1)


def test_sharded_weights_are_handed_to_servers(tmp_path):
    values = RUN | {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    model = tiny_model(values)
    with VllmServer(model, tmp_path / "log 0") as first, VllmServer(model, tmp_path / "log 1") as second:
        values |= {"num_processes": 2, "sharding": "fsdp2"}
        values["sampler_options"] = json.dumps({"urls": [first.url, second.url]})
        run("-m", "rlaif_fast.train", *(f"--{name}={value}" for name, value in values.items()))
    check_ratios(tmp_path / "run", RUN["max_steps"])


# The command, with a server that is killed while the third step of RL draws.
KILLED = """
import os, signal, sys
from rlaif_fast.rollout.vllm.served import Server
from rlaif_fast.train import main
from rlaif_fast.trainer import rl
sample, calls, post = rl.sample_and_rank, [], Server.post
def counted(*arguments):
    calls.append(1)
    return sample(*arguments)
def killed(server, path, body=b"{}"):
    if len(calls) == 3 and path == "/inference/v1/generate":
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
    return post(server, path, body)
rl.sample_and_rank, Server.post = counted, killed
sys.exit(main(sys.argv[2:]))
"""


def test_a_killed_server_is_told_in_one_line_and_the_run_goes_on(tmp_path):
    values = RUN | {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    model = tiny_model(values)
    with VllmServer(model, tmp_path / "log") as server:
        values["sampler_options"] = json.dumps({"urls": [server.url]})
        words = [f"--{name}={value}" for name, value in values.items()]
        first = ended("-c", KILLED, str(server.group), *words)
    assert first.returncode == 1, first.stderr[-4000:]
    told = [line for line in first.stderr.splitlines() if server.url in line]
    assert len(told) == 1 and told[0] == first.stderr.strip().splitlines()[-1]
    assert json.loads((tmp_path / "run/checkpoints/index.json").read_text())["last"] == "rl-000002"
    with VllmServer(model, tmp_path / "log") as server:  # at another address
        options = json.dumps({"urls": [server.url]})
        run("-m", "rlaif_fast.train", f"--resume={tmp_path / 'run'}", f"--sampler_options={options}")
    check_ratios(tmp_path / "run", RUN["max_steps"])


@pytest.mark.parametrize(("rows", "seconds"), [(1, None), (8, 1.5), (300, None), (70000, 0.7)])
def test_vllm_reads_the_tensors_that_we_pack(rows, seconds):
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import decode_mm_kwargs_item

    from rlaif_fast.rollout.vllm.engine import kwargs_item
    from rlaif_fast.rollout.vllm.wire import packed_item

    for dtype in (torch.float32, torch.bfloat16):
        item = MediaItem(
            "image" if seconds is None else "video", "k", 0, 1, (1, 1, rows), torch.randn(rows, 1), seconds
        )
        item = dataclasses.replace(item, patches=item.patches.to(dtype))
        found = decode_mm_kwargs_item(base64.b64encode(packed_item(item)).decode())
        wanted = kwargs_item(item)
        assert found.keys() == wanted.keys()
        for name, element in wanted.items():
            assert found[name].data.dtype == element.data.dtype and torch.equal(
                found[name].data, element.data
            )
            assert type(found[name].field) is type(element.field)
            assert found[name].field.keep_on_cpu == element.field.keep_on_cpu


def test_an_adapter_is_loaded_as_it_is_saved(tmp_path):
    """vLLM finds every layer of `adapter_config.json` and gives the policy's log-probabilities with it."""
    found = json.loads(run(str(HERE / "engine_lora.py"), str(tmp_path)).strip().splitlines()[-1])
    assert found["apart"] > 0.1  # the adapter changes them
    assert found["worst"]["base"] < 1e-3
    assert found["worst"]["adapter"] < 1e-3
