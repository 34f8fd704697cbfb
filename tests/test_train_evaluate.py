"""`python -m rlaif_fast.evaluate` on a finished run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import in_a_file

from rlaif_fast import evaluate as evaluate_module
from rlaif_fast.evaluate import EvaluateConfig, evaluate_command
from rlaif_fast.policy.loading import ModelOptions, load_model
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.trainer.datasets import split_files
from rlaif_fast.trainer.options import TrainConfig

pytest_plugins = ("tiny_runs",)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def test_evaluate_agrees_with_the_run_and_reads_other_data(finished, tmp_path, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    figures = evaluate_command(EvaluateConfig(run=str(finished), output=str(tmp_path / "out.jsonl")))
    assert figures["accuracy"] == pytest.approx(summary["final_accuracy"])
    assert len(list(read_jsonl(tmp_path / "out.jsonl"))) == sum(
        r["n"] for r in figures["by_category"].values()
    )
    blind = evaluate_command(EvaluateConfig(run=str(finished), blank_frames=True))
    assert 0.0 <= blind["accuracy"] <= 1.0
    assert "category" in capsys.readouterr().out


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["by itself", "torchrun"])
def test_several_processes_give_the_answers_of_one(finished, tmp_path, launcher):
    rows = [json.loads(line) for line in rows_asked(finished).read_text().splitlines()]
    videos = sorted({row["video"] for row in rows})
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"no video")
    for row in rows:
        found = rows_asked(finished).parent / row["video"]
        row["video"] = str(damaged if row["video"] == videos[1] else found)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"run": finished, "data": data, "output": tmp_path / "one.jsonl"}
    one = evaluate_command(EvaluateConfig(**{name: str(value) for name, value in words.items()}))
    words |= {"output": tmp_path / "two.jsonl"} | ({} if launcher else {"num_processes": 2})
    command = ["-m", "rlaif_fast.evaluate", *in_a_file(words, tmp_path / "two.yaml")]
    done = subprocess.run([sys.executable, *launcher, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("1 x not a readable video") == 1
    assert done.stdout.count("category") == 1 and json.loads(done.stdout.splitlines()[-1])["n"] < len(rows)
    assert json.loads(done.stdout.splitlines()[-1])["accuracy"] == one["accuracy"]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def rows_asked(folder: Path) -> Path:
    """The file of the questions that a run was tested on."""
    config = TrainConfig(**json.loads((folder / "summary.json").read_text())["config"])
    return split_files(config, workers=1, progress=None)["test"]


def test_evaluate_reads_other_data_as_the_run_did(finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "config.yaml").read_text().replace("on_bad_row: raise", "on_bad_row: skip")
    (folder / "config.yaml").write_text(text)
    CheckpointStore(folder / "checkpoints", {}).note_config(text)
    rows = rows_asked(folder)
    data = rows.with_name("other.jsonl")
    data.write_text(rows.read_text().splitlines()[0] + '\n{"question": 5}\n')
    words = ["--data", str(data), "--output"]
    assert evaluate_module.main(["--run", str(folder), *words, str(tmp_path / "p.jsonl")]) == 0
    assert len(list(read_jsonl(tmp_path / "p.jsonl"))) == 1
    assert evaluate_module.main(["--run", str(finished), *words, str(tmp_path / "q.jsonl")]) == 2
    assert "1 of 2 rows are wrong" in capsys.readouterr().err
    before = data.read_bytes()
    assert evaluate_module.main(["--run", str(folder), *words, str(data)]) == 2
    assert "is read, and would be lost" in capsys.readouterr().err and data.read_bytes() == before
    best = CheckpointStore(folder / "checkpoints", {}, read_only=True).checked("best")
    model = Path(shutil.copytree(best, tmp_path / "model"))
    before = (model / "config.json").read_bytes()
    assert evaluate_module.main(["--model", str(model), *words, str(model / "config.json")]) == 2
    assert "is read, and would be lost" in capsys.readouterr().err
    assert (model / "config.json").read_bytes() == before
    assert evaluate_module.main(["--run", str(folder), "--media_root", str(tmp_path)]) == 2
    assert "media_root: expected null where the run's data are synthetic" in capsys.readouterr().err


def test_evaluate_notices_a_damaged_configuration(finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text[: text.index("oracle")])
    figures = evaluate_command(EvaluateConfig(run=str(folder)))
    assert f"damaged: {folder / 'config.yaml'} is not as it was written" in capsys.readouterr().err
    assert figures["accuracy"] == json.loads((folder / "summary.json").read_text())["final_accuracy"]


def test_evaluate_puts_adapters_on_their_base(run, tmp_path, capsys):
    code, folder, err = run(lora_r=4, sft_steps=2, max_steps=2)
    assert code == 0, err
    summary = json.loads((folder / "summary.json").read_text())
    options = EvaluateConfig(run=str(folder))
    figures = evaluate_command(options)
    assert figures["accuracy"] == pytest.approx(summary["final_accuracy"])
    adapted = evaluate_module.load_checkpoint(evaluate_module.configuration(options)).model
    base = load_model(ModelOptions(model=adapter_base(folder), device="cpu", dtype="float32")).model
    weights = dict(base.named_parameters())
    changed = {name for name, weight in adapted.named_parameters() if not weight.equal(weights[name])}
    assert changed == {name for name in weights if "language_model" in name and "_proj.weight" in name}

    index = json.loads((folder / "checkpoints/index.json").read_text())
    best = folder / "checkpoints" / index["best"]
    data = rows_asked(folder)
    pixels = {"min_pixels": 1024, "max_pixels": 1024, "max_completion_length": 12}
    alone = evaluate_command(EvaluateConfig(model=str(best), data=str(data), **pixels))
    assert alone["accuracy"] == pytest.approx(summary["final_accuracy"])

    shutil.copytree(best, tmp_path / "adapters")
    adapters = tmp_path / "adapters" / "adapter_config.json"
    settings = json.loads((best / adapters.name).read_text())
    adapters.write_text(json.dumps(settings | {"base_model_name_or_path": "/nonexistent/base"}))
    words = ["--model", str(adapters.parent), "--data", str(data), "--debug", "true"]
    assert evaluate_module.main(words) == 2
    err = capsys.readouterr().err
    assert "holds LoRA adapters of the model '/nonexistent/base'" in err and "Traceback" in err


def adapter_base(folder: Path) -> str:
    """The model that the adapters of a run were trained on."""
    best = next(folder.glob("checkpoints/*/adapter_config.json"))
    return json.loads(best.read_text())["base_model_name_or_path"]


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2_5_vl"])
def test_the_tiny_policy_has_no_answers_before_a_run_makes_it(tmp_path, capsys, name):
    """It was looked for on the Hugging Face hub."""
    assert evaluate_module.main(["--model", name, "--data", str(tmp_path / "rows.jsonl")]) == 2
    assert f"model: {name!r} is made by the run that trains it" in capsys.readouterr().err
