"""A comparison from its file to its report: what is planned, run, refused."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml
from comparison_parts import write_config

from rlaif_fast.compare import main
from rlaif_fast.comparison.plan import read_plan
from rlaif_fast.comparison.runner import refuse_changed
from rlaif_fast.errors import UsageError
from rlaif_fast.runs.folder import RunDir

MAIN = {"seeds": [1], "arms": ["grpo"], "feedback": ["exact"], "baseline": "grpo"}


def test_each_run_is_planned_once_and_starts_come_first(tmp_path):
    plan = read_plan(write_config(tmp_path))
    jobs = plan.jobs()
    assert len(jobs) == len({job.folder for job in jobs}) == 2 * (1 + 2 * 2)
    seen = set()
    for job in jobs:
        assert job.after is None or job.after in seen
        seen.add(job.folder)
    noisy = next(job for job in jobs if job.folder.match("seed-2/noise/oracle"))
    assert noisy.values["oracle_noise"] == 0.3 and noisy.values["advantage"] == "oracle"
    assert noisy.values["seed"] == 2 and noisy.values["sft"].endswith("seed-2/start/checkpoints/sft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"grpo": {"learning_rat": 1}}}, "arms.grpo.learning_rat is no key"),
        ({"arms": {"grpo": {"seed": 1}}}, "arms.grpo.seed is set by the comparison"),
        ({"feedback": {"exact": {"max_steps": 3}}}, "feedback.exact.max_steps is set by the comparison"),
        ({"start": {"max_steps": 3}}, "start.max_steps is set by the comparison"),
        ({"tabels": {}}, "unknown sections tabels"),
        ({"tables": {"main": {"seeds": [1]}}}, "tables.main needs exactly"),
        (
            {"tables": {"main": {"seeds": [1], "arms": ["ppo"], "feedback": ["exact"], "baseline": "ppo"}}},
            "names the arm 'ppo'",
        ),
        (
            {
                "tables": {
                    "main": {"seeds": [1], "arms": ["grpo"], "feedback": ["exact"], "baseline": "oracle"}
                }
            },
            "is not among its arms",
        ),
        (
            {"tables": {"main": {"seeds": [], "arms": ["grpo"], "feedback": ["exact"], "baseline": "grpo"}}},
            r"tables.main.seeds must be a list of at least one entry, got \[\]",
        ),
        ({"tables": {"main": MAIN | {"seeds": [1, 2, 1]}}}, "tables.main.seeds names 1 twice"),
        ({"tables": {"main": MAIN | {"seeds": "12"}}}, "tables.main.seeds must be a list of .*, got '12'"),
        ({"tables": {"main": MAIN | {"seeds": [1.5]}}}, "tables.main.seeds must list integers, got 1.5"),
        ({"tables": {"main": MAIN | {"arms": ["grpo", "oracle", "grpo"]}}}, "arms names 'grpo' twice"),
        ({"tables": {"main": MAIN | {"feedback": ["exact"] * 2}}}, "feedback names 'exact' twice"),
        ({"arms": ["grpo"]}, r"arms must give each entry a name, got \['grpo'\]"),
        ({"arms": None}, "arms must give each entry a name, got None"),
        ({"feedback": ["exact"]}, r"feedback must give each entry a name, got \['exact'\]"),
        ({"common": {"overwrite_output_dir": True}}, "common.overwrite_output_dir is set by the comparison"),
        ({"arms": {"grpo": {"resume": "runs/old"}}}, "arms.grpo.resume is set by the comparison"),
        (
            {"arms": {"grpo": {"oracle_noise": 0.0}, "oracle": {}}},
            "arms.grpo and feedback.noise, which tables.main puts together, both set oracle_noise",
        ),
        (
            {"arms": {"grpo": {"algorithm": "grpo"}, "oracle": {"algorithm": "grpo", "sft_steps": 5000}}},
            r"arms.oracle.sft_steps: not read where sft is .*; leave it out",
        ),
        ({"feedback": {"exact": {}, "noise": {"label_noise": 0.1}}}, "feedback.noise.label_noise: not read"),
        (
            {"start": {"learning_rate": 0.5}},
            "start.learning_rate: not read where max_steps is 0; leave it out",
        ),
        (
            {"arms": {"grpo": {}, "oracle": {"num_generations": 1}}},
            "config: arms.oracle, feedback.exact: num_generations: expected 2 to 64",
        ),
        (
            {"arms": {"grpo": {}, "oracle": {"beta": "high"}}},
            "config: arms.oracle: beta: expected a number or null, got high",
        ),
        (
            {"start": {"oracle_options": "none"}},
            "config: start: oracle_options: expected keys with values, {KEY: value}, got none",
        ),
        ({"arms": {"grpo": {}, "../oracle": {}}}, "config: arms: expected names .*, got '../oracle'"),
        ({"feedback": {"exact": {}, 0.3: {}}}, "config: feedback: expected names .*, got 0.3"),
        ({"feedback": {"start": {}}}, "config: feedback: expected names .*, got 'start'"),
        ({"tables": {"main/first": MAIN}}, "config: tables: expected names .*, got 'main/first'"),
        ({"tables": {"main": MAIN | {"arms": [{"grpo": 1}]}}}, "tables.main.arms must list names, got {"),
        ({"output_dir": 7}, "names no output_dir"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        read_plan(write_config(tmp_path, **changes))


def test_values_are_read_as_those_of_a_run(tmp_path):
    """YAML takes 1e-5 for a text, and `train --config` for a number."""
    file = write_config(tmp_path)
    file.write_text(file.read_text().replace("max_steps: 2", "max_steps: 2\n  learning_rate: 1e-5"))
    assert {job.values["learning_rate"] for job in read_plan(file).jobs()} == {1e-5}


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "compare.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"cannot read .*compare\.yaml"):
        read_plan(file)


def test_a_report_before_any_run_says_that_there_is_none(tmp_path, capsys):
    assert main(["--config", str(write_config(tmp_path)), "--report_only"]) == 0
    assert "0 of 8 runs have finished" in (tmp_path / "compare/comparison.md").read_text()
    assert "comparison.md" in capsys.readouterr().out


def test_an_arm_that_stands_twice_in_the_file_is_named(tmp_path):
    file = write_config(tmp_path)
    file.write_text(file.read_text().replace("arms:\n", "arms:\n  oracle: {advantage: directed}\n", 1))
    with pytest.raises(UsageError, match=r"compare.yaml:\d+: the key 'oracle' stands twice"):
        read_plan(file)


def test_a_comparison_runs_reports_and_is_not_run_twice(tmp_path, capsys):
    tables = {"main": {"seeds": [1], "arms": ["grpo", "oracle"], "feedback": ["exact"], "baseline": "grpo"}}
    file = write_config(tmp_path, tables=tables, feedback={"exact": {}})
    assert main(["--config", str(file), "--workers", "1"]) == 0
    folder = tmp_path / "compare"
    text = (folder / "comparison.md").read_text()
    assert "2 of 2 runs have finished" in text and "| oracle |" in text
    assert (folder / "main.png").stat().st_size > 10_000
    cells = json.loads((folder / "comparison.json").read_text())["main"]
    assert cells["exact/grpo"]["ahead_of_baseline"] is None
    assert cells["exact/oracle"]["start_accuracy"] == cells["exact/grpo"]["start_accuracy"]
    assert cells["exact/oracle"]["sampled_tokens"]["1"] > 0
    summary = folder / "seed-1/exact/oracle/summary.json"
    written = summary.stat().st_mtime_ns
    assert main(["--config", str(file), "--workers", "1"]) == 0
    assert summary.stat().st_mtime_ns == written
    assert "without a scored answer" not in text
    assert "The runs were made with:" in text and f"torch {version('torch')}," in text
    assert f"torch {version('torch')}," in cells["exact/oracle"]["made_with"]["1"]
    # A file that one run could not read costs that run its questions, and the comparison nothing else.
    final = summary.with_name("predictions-final.jsonl")
    rows = final.read_text().splitlines()
    final.write_text("\n".join(rows[2:]) + "\n")
    assert main(["--config", str(file), "--report_only"]) == 2
    assert "predictions-final.jsonl is not as the run wrote it" in capsys.readouterr().err
    run = RunDir(summary.parent)
    run.write_summary(run.read_summary())
    assert main(["--config", str(file), "--report_only"]) == 0
    text = (folder / "comparison.md").read_text()
    assert f"{len(rows) - 2} or {len(rows)} test questions" in text
    assert "Questions without a scored answer: 2 of seed 1, exact/oracle." in text
    final.write_text("")
    run.write_summary(run.read_summary())
    assert main(["--config", str(file), "--report_only"]) == 2
    assert "oracle: no test answer was scored" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--report_only"]])
@pytest.mark.parametrize("left", ["summary.json", "checkpoints/index.json"])
def test_a_run_that_was_made_otherwise_is_refused_by_name(tmp_path, capsys, left, words):
    file = write_config(tmp_path)
    job = read_plan(file).jobs()[-1]
    (job.folder / left).parent.mkdir(parents=True)
    (job.folder / left).write_text("{}")
    assert main(["--config", str(file), *words]) == 2
    assert "oracle.yaml, which says how" in capsys.readouterr().err
    for damage in (b"", b"\xff\xfe", b"a: [1"):
        job.folder.with_name("oracle.yaml").write_bytes(damage)
        assert main(["--config", str(file), *words]) == 2
        assert (
            "oracle.yaml, which says how" in (message := capsys.readouterr().err) and "is damaged" in message
        )
    made = dict(job.values) | {"learning_rate": 0.5, "output_dir": "moved", "sft": "moved/start"}
    job.folder.with_name("oracle.yaml").write_text(yaml.safe_dump(made))
    assert main(["--config", str(file), *words]) == 2
    message = capsys.readouterr().err
    assert "learning_rate 0.5 (now 'unset')" in message and "moved" not in message
    assert str(job.folder) in message and "choose another output_dir" in message


@pytest.mark.parametrize("words", [[], ["--report_only"]])
def test_a_run_that_was_extended_by_itself_is_refused_by_name(tmp_path, capsys, words):
    """An arm of more steps stood beside the others as if it had learned as long."""
    file = write_config(tmp_path)
    job = read_plan(file).jobs()[-1]
    run = RunDir.create(job.folder)
    run.write_summary({})
    job.folder.with_name("oracle.yaml").write_text(yaml.safe_dump(dict(job.values)))
    for steps in (2, 4):
        changed = {"max_steps": steps, "threads": 3, "learning_rate": 4e-4}  # the last by configs/tiny.yaml
        run.config.write_text(yaml.safe_dump({**job.values, **changed}))
        if steps == 2:
            refuse_changed([job])
    assert main(["--config", str(file), *words]) == 2
    assert f"{job.folder} was made with max_steps 4 (now 2); choose" in capsys.readouterr().err


def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    tables = {"main": {"seeds": [1], "arms": ["grpo"], "feedback": ["exact"], "baseline": "grpo"}}
    file = write_config(tmp_path, tables=tables, feedback={"exact": {}}, start={"sft_data": "/none.jsonl"})
    done = subprocess.run(
        [sys.executable, "-m", "rlaif_fast.compare", "--config", str(file), "--workers", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "in no table, so not run: arms.oracle\n" in done.stderr
    assert "2 of 2 runs failed" in done.stderr and "/none.jsonl" in done.stderr
