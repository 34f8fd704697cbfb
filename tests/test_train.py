"""The main job end to end on a few clips: one run, the same again, one that was killed, and what must be refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlaif_fast import evaluate as evaluate_module
from rlaif_fast import train as train_module
from rlaif_fast.data import SyntheticConfig, make_dataset
from rlaif_fast.evaluate import EvaluateConfig, evaluate_command
from rlaif_fast.policy.loading import ModelOptions, load_model
from rlaif_fast.prompts.batches import EpochOrder
from rlaif_fast.report.outcome import print_accuracies
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir
from rlaif_fast.trainer import rl
from rlaif_fast.video.errors import TooManyBadFiles

SMALL = {
    "seed": 5,
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


def in_a_file(values: dict, path: Path) -> list[str]:
    """The words of a command that reads values from a file: keys of a stage that is left out may stand there."""
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items() if value is not None))
    return ["--config", str(path)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, cache, capsys):
    """Runs the train command and returns (exit code, run folder, what it wrote to stderr)."""

    def start(name: str = "run", **changes) -> tuple[int, Path, str]:
        folder = tmp_path / name
        values = SMALL | {"output_dir": folder, "cache_dir": cache} | changes
        code = train_module.main(in_a_file(values, tmp_path / f"{name}.yaml"))
        return code, folder, capsys.readouterr().err

    return start


def metrics(folder: Path) -> list[dict]:
    """Everything logged but how long it took."""
    return [{k: v for k, v in row.items() if k != "time"} for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = SMALL | {"output_dir": folder, "cache_dir": cache, "report": "true", "tensorboard": "true"}
    assert train_module.main([f"--{key}={value}" for key, value in values.items()]) == 0
    return folder


def test_run_leaves_what_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    promised = {
        "sft_accuracy",
        "final_accuracy",
        "by_category",
        "seconds",
        "peak_rss_bytes",
        "seed",
        "config",
        "git_commit",
    }
    assert promised <= summary.keys()
    assert all(row.keys() == {"sft", "final", "n"} for row in summary["by_category"].values())
    assert len(summary["by_category"]) >= 8
    assert sum(row["n"] for row in summary["by_category"].values()) == len(
        list(read_jsonl(finished / "predictions-final.jsonl"))
    )
    assert summary["config"]["num_generations"] == 4
    rollouts = list(read_jsonl(finished / "rollouts.jsonl"))
    assert {row["step"] for row in rollouts} == {1, 2, 3, 4}
    assert all(
        len(row["responses"]) == len(row["oracle_ranks"]) == len(row["advantages"]) == 4 for row in rollouts
    )
    assert any(abs(a) > 0 for row in rollouts for a in row["advantages"])
    assert (finished / "report.html").stat().st_size > 10_000
    assert list((finished / "tensorboard").iterdir())
    phases = {row["phase"] for row in read_jsonl(finished / "samples.jsonl")}
    assert phases == {"sft", "final"}


def test_checkpoint_is_an_ordinary_model_folder(finished):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    best = finished / "checkpoints" / json.loads((finished / "checkpoints/index.json").read_text())["best"]
    model = AutoModelForImageTextToText.from_pretrained(best)
    assert model.config.model_type == "qwen3_vl"
    assert AutoTokenizer.from_pretrained(best).chat_template
    assert list(best.glob("*.safetensors"))


def test_the_table_of_a_run_says_before_and_after(finished):
    """Not after which stage: there need not have been a supervised one."""
    said: list[str] = []
    summary = json.loads((finished / "summary.json").read_text())
    print_accuracies(summary, SimpleNamespace(message=said.append))
    assert said[0].split() == ["held-out", "accuracy", "before", "RL", "after", "RL", "n"]
    assert f"{summary['sft_accuracy']:.3f}" in said[-1] and f"{summary['final_accuracy']:.3f}" in said[-1]
    assert len({len(line) for line in said}) == 1  # columns under their names


@pytest.mark.parametrize("algorithm", ["online_dpo", "rlrr", "odrpo", "lipo"])
def test_other_algorithms_train(run, algorithm):
    code, folder, err = run(algorithm=algorithm, max_steps=2, sft_steps=2)
    assert code == 0, err
    rows = [row for row in metrics(folder) if row["stage"] == "rl"]
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert ("rewards/margins" in rows[0]) == (algorithm in ("online_dpo", "lipo"))


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


def test_evaluate_reads_other_data_as_the_run_did(finished, cache, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "config.yaml").read_text().replace("on_bad_row: raise", "on_bad_row: skip")
    (folder / "config.yaml").write_text(text)
    CheckpointStore(folder / "checkpoints", {}).note_config(text)
    rows = next(cache.glob("data/*/test.jsonl"))
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
    assert evaluate_module.main(["--run", str(folder), "--media_root", str(tmp_path)]) == 2
    assert "media_root: expected null where the run's data are synthetic" in capsys.readouterr().err


def test_evaluate_notices_a_damaged_configuration(finished, tmp_path, capsys):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text[: text.index("oracle")])
    figures = evaluate_command(EvaluateConfig(run=str(folder)))
    assert f"damaged: {folder / 'config.yaml'} is not as it was written" in capsys.readouterr().err
    assert figures["accuracy"] == json.loads((folder / "summary.json").read_text())["final_accuracy"]


def test_evaluate_puts_adapters_on_their_base(run, cache, tmp_path, capsys):
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
    data = next(cache.glob("data/*/test.jsonl"))
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


def test_same_seed_same_metrics(finished, run):
    code, folder, _ = run()
    assert code == 0
    assert metrics(folder) == metrics(finished)


@pytest.mark.parametrize("calls", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_resumed_run_equals_an_uninterrupted_one(finished, run, monkeypatch, calls):
    original, seen = rl.sample_and_rank, []

    def killed(*args):
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(rl, "sample_and_rank", killed)
    code, folder, err = run()
    assert code == 130 and "interrupted" in err
    assert not (folder / "summary.json").exists()
    monkeypatch.setattr(rl, "sample_and_rank", original)
    assert train_module.main(["--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(finished)
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, finished))
    assert ours["by_category"] == theirs["by_category"]
    assert train_module.main(["--resume", str(folder)]) == 2  # nothing left to do


FAILING_JUDGE = """
import json, os, pathlib

def judge(request):
    metrics = pathlib.Path(os.environ["DOWN_AFTER"])
    lines = map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else ()
    if any(line["stage"] == "rl" and line["step"] == 3 for line in lines):
        raise OSError("the judge is down")
    return [len(response) for response in request.responses]
"""


def test_steps_before_a_judge_went_down_are_not_lost(run, tmp_path, monkeypatch):
    (tmp_path / "judge_that_fails.py").write_text(FAILING_JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DOWN_AFTER", str(tmp_path / "nothing"))
    changes = {"oracle": "callable", "sft_steps": 1, "eval_steps": 4, "max_steps": 4, "blind_control": 0}
    changes["oracle_options"] = '{"function": "judge_that_fails:judge", "window": 3}'
    changes["metric_for_best_model"] = "accuracy"
    code, whole, err = run("whole", **changes)
    assert code == 0, err
    monkeypatch.setenv("DOWN_AFTER", str(tmp_path / "run" / "metrics.jsonl"))
    code, folder, err = run(**changes)
    assert code == 1 and "the judge is down" in err
    assert CheckpointStore(folder / "checkpoints", {}, read_only=True).index.last == "rl-000003"
    monkeypatch.setenv("DOWN_AFTER", str(tmp_path / "nothing"))
    begun = (folder / "config.yaml").read_text()
    assert train_module.main(["--resume", str(folder), "--dtype", "float16"]) == 2
    assert (folder / "config.yaml").read_text() == begun
    assert train_module.main(["--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(whole)


def test_steps_before_too_many_files_were_bad_are_not_lost(run, monkeypatch):
    original = rl.sample_and_rank

    def ended(run, order, step):
        if step == 1:
            raise TooManyBadFiles("9 of 50 files are bad")
        return original(run, order, step)

    monkeypatch.setattr(rl, "sample_and_rank", ended)
    code, folder, err = run(sft_steps=1)
    assert code == 1 and "files are bad" in err
    assert CheckpointStore(folder / "checkpoints", {}, read_only=True).index.last == "rl-000001"


def test_dpo_goes_on_with_the_start_it_began_with(run, monkeypatch):
    changes = {"algorithm": "dpo", "sft_steps": 2, "learning_rate": 0.01}
    code, whole, err = run("whole", **changes)
    assert code == 0, err
    original = rl.sample_and_rank

    def killed(run, order, step):
        if step == 3:
            raise KeyboardInterrupt
        return original(run, order, step)

    monkeypatch.setattr(rl, "sample_and_rank", killed)
    code, folder, err = run(**changes)
    assert code == 130, err
    monkeypatch.setattr(rl, "sample_and_rank", original)
    assert train_module.main(["--resume", str(folder)]) == 0
    assert metrics(folder) == metrics(whole)
    steps = [row for row in metrics(whole) if row["stage"] == "rl"]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the policy is its own reference
    assert abs(steps[-1]["rewards/margins"]) > 1e-3


def test_passes_of_bounded_size_train_alike(finished, run):
    code, folder, err = run(max_packed_tokens=150, sft_steps=2, max_steps=1)
    assert code == 0, err
    steps = [[row for row in metrics(f) if row["stage"] == "sft"][:2] for f in (folder, finished)]
    for ours, theirs in zip(*steps):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_the_schedule_is_of_steps_however_many_groups_there_are_to_cut(run):
    """A rollout of fewer groups than parts has fewer updates; a rate that falls to zero stayed high."""
    code, folder, err = run(
        sft="none",
        videos_per_step=1,
        steps_per_generation=8,
        lr_scheduler_type="linear",
        warmup_steps=1,
        max_steps=3,
    )
    assert code == 0, err
    rates = [row["learning_rate"] for row in metrics(folder) if row["stage"] == "rl"]
    assert rates == pytest.approx([rates[0], rates[0] / 2, 0.0]) and rates[0] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"sft": "none", "advantage": "zscore", "dynamic_sampling": "true"},
        {"num_iterations": 2, "steps_per_generation": 2, "loss_type": "dapo", "epsilon_high": 0.28},
        {"shared_prefix": "false", "entropy_coef": 0.01, "max_steps": 2},
        pytest.param(
            {"model": "tiny-qwen2_5_vl", "max_steps": 2},
            marks=pytest.mark.slow,
        ),
        {"lora_r": 4, "freeze_vision_tower": "true", "weight_by_confidence": "true", "max_steps": 2},
        {"dtype": "bfloat16", "questions_per_video": 2, "max_steps": 2},
        pytest.param(
            {
                "oracle_shuffle": "true",
                "importance_sampling_level": "sequence",
                "num_iterations": 2,
                "max_steps": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_options_of_the_loop(run, changes):
    code, folder, err = run(sft_steps=2, **changes)
    assert code == 0, err
    steps = [row for row in metrics(folder) if row["stage"] == "rl"]
    assert len(steps) == changes.get("max_steps", 4)
    assert all(row.get("loss") is None or abs(row["loss"]) < 100 for row in steps)
    if "lora_r" in changes:
        assert abs(steps[0]["kl"]) < 1e-6  # the reference is where this stage starts, not the untrained model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_generations": 1}, "num_generations: expected 2 to 64"),
        ({"learning_rat": 0.1}, "did you mean 'learning_rate'"),
        ({"num_generations": "many"}, "num_generations"),
        ({"dtype": "float13"}, "dtype"),
        ({"device": "cuda:9"}, "device"),
        ({"data": "/nonexistent/train.jsonl"}, "there is no file or folder"),
        ({"model": "/nonexistent/model", "data": "synthetic"}, "cannot load"),
        ({"oracle": "referense"}, "did you mean 'reference'"),
        ({"sft": "/nonexistent/checkpoint"}, "sft: expected"),
        ({"max_completion_length": 3}, "max_completion_length is 3"),
        (
            {"freeze_vision_tower": "true", "freeze_projector": "true", "freeze_language_model": "true"},
            "nothing is left",
        ),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(run, changes, words):
    code, folder, err = run(**changes)
    assert code == 2
    assert words in err
    said = [line for line in err.strip().splitlines() if not line.startswith("not read, since ")]
    assert len(said) == 1 and said[0].startswith("error: ")
    assert not (folder / "summary.json").exists()


def test_refuses_a_folder_that_is_not_ours(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    code, folder, err = run()
    assert code == 2 and "not made by a run" in err
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "/nonexistent/typo.jsonl"},
        {"sft_data": "/nonexistent/typo.jsonl"},
        {"model": "/nonexistent/model"},
        {"sft": "/nonexistent/checkpoint"},
        {"oracle": "referense"},
        {"oracle": "callable", "oracle_options": '{"function": "no.such:function"}'},
        {"backend": "cuda"},
        {"decoder": "nope"},
        {"sampler": "nope"},
        {"attention_backend": "flash"},
        {"lora_r": 2, "lora_target_modules": "[nope]"},
        {"max_reasoning_tokens": 3},
        {"nframes": 400, "num_processes": 2},
    ],
)
def test_a_run_is_replaced_only_by_one_that_can_begin(run, tmp_path, changes):
    earlier = RunDir.create(tmp_path / "run")
    earlier.write_summary({"final_accuracy": 0.5})
    code, _, err = run(overwrite_output_dir="true", **changes)
    assert code == (1 if "nframes" in changes else 2), err
    assert earlier.read_summary() == {"final_accuracy": 0.5}


def test_resume_refuses_what_cannot_change(finished, run, capsys):
    words = ["--resume", str(finished), "--beta", "0.5", "--learning_rate", "1e-9"]
    assert train_module.main(words) == 2
    err = capsys.readouterr().err
    assert "resume: beta cannot change" in err and "what can change is" in err


def test_own_data_bad_files_and_missing_categories(run, cache, tmp_path):
    small = SyntheticConfig(
        seed=1, sft_clips=12, rl_clips=0, validation_clips=0, test_clips=0, questions_per_clip=2
    )
    made = make_dataset(tmp_path / "made", small)
    rows = [json.loads(line) for line in made.sft.read_text().splitlines()]
    for row in rows:
        row["video"] = str(made.root / row["video"])
        del row["category"]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    rows[0]["video"] = str(broken)
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": data, "holdout_fraction": 0.2, "sft_steps": 2, "max_steps": 2}
    code, folder, err = run(**changes, max_bad_fraction=0.5)
    assert code == 0, err
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["by_category"]) == ["all"]

    for row in rows:
        row["video"] = str(broken)
    for index, row in enumerate(rows):  # many files, all bad
        copy = tmp_path / f"broken-{index}.mp4"
        copy.write_bytes(b"not a video, %d" % index)  # equal contents would be one video
        row["video"] = str(copy)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, folder, err = run("bad", **changes)
    assert code == 1 and "bad" in err
    assert not (folder / "summary.json").exists()


def test_a_supervised_step_without_a_readable_row_is_still_evaluated_and_saved(run, tmp_path, monkeypatch):
    small = SyntheticConfig(seed=1, sft_clips=2, rl_clips=2, validation_clips=2, test_clips=2)
    made = make_dataset(tmp_path / "made", small)
    rows = [json.loads(line) for line in made.sft.read_text().splitlines()]
    clips = sorted({row["video"] for row in rows})
    first = EpochOrder(clips, 1, SMALL["seed"]).step(3)[0]  # what the fourth step shows
    (made.root / first).write_bytes(b"not a video")
    saved = []
    original = CheckpointStore.save
    monkeypatch.setattr(CheckpointStore, "save", lambda *a, **k: saved.append(a[1]) or original(*a, **k))
    changes = {"data": made.root, "sft_videos_per_step": 1, "sft_steps": 5, "eval_steps": 1, "max_steps": 0}
    code, folder, err = run(**changes, max_bad_fraction=0.9)
    assert code == 0, err
    steps = [row["step"] for row in metrics(folder) if row["stage"] == "sft" and "loss" in row]
    assert 4 not in steps and 1 <= len(steps) < 5
    assert "sft-000004" in saved


def test_empty_dataset_is_refused(run, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    code, _, err = run(data=tmp_path / "empty.jsonl")
    assert code == 2 and "empty.jsonl" in err


def test_print_config_shows_the_packaged_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train_module.main(["--print-config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "max_steps: 330" in printed and "max_completion_length: 12" in printed
