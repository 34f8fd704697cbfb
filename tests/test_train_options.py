"""Options of a run: what is refused, in one line, before anything is lost."""

import pytest
from tiny_runs import metrics

from rlaif_fast import train as train_module
from rlaif_fast.runs.folder import RunDir

pytest_plugins = ("tiny_runs",)


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


def test_print_config_shows_the_packaged_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train_module.main(["--print-config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "max_steps: 330" in printed and "max_completion_length: 12" in printed
