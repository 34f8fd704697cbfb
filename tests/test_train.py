"""The main job end to end on a few clips: one run, the same again, one that was killed, and what must be refused."""

import json
from types import SimpleNamespace

import pytest
from tiny_runs import SMALL, metrics

from rlaif_fast import train as train_module
from rlaif_fast.data import SyntheticConfig, make_dataset
from rlaif_fast.prompts.batches import EpochOrder
from rlaif_fast.report.outcome import print_accuracies
from rlaif_fast.runs.checkpoint import CheckpointStore
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.trainer import rl
from rlaif_fast.video.errors import TooManyBadFiles

pytest_plugins = ("tiny_runs",)


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


def test_a_run_records_why_a_group_could_not_be_ranked(run, tmp_path, monkeypatch):
    judge = "def judge(request):\n    return [None if 'count' in request.id else len(t) for t in request.responses]\n"
    (tmp_path / "judge_that_abstains.py").write_text(judge)
    monkeypatch.syspath_prepend(tmp_path)
    options = '{"function": "judge_that_abstains:judge"}'
    code, folder, err = run(oracle="callable", oracle_options=options, sft_steps=1, max_steps=1)
    assert code == 0, err
    rows = list(read_jsonl(folder / "rollouts.jsonl"))
    told = {row["valid"]: row.get("error") for row in rows}
    assert told == {True: None, False: "fewer than two responses could be judged"}
    assert all(("count" in row["example_id"]) != row["valid"] for row in rows)


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
