"""An oracle that sees the video and not the answer: what its rankings teach, beside two controls at equal compute.

    python bench/teacher.py --output_dir runs/teacher --seeds 71 72 73

A teacher (the tiny model, trained on clean labels of worlds that no student sees) answers, scores and ranks by what it
sees; nobody shows it a reference answer. From each student's start:

- `ranks_listwise`, `ranks_likelihood`: GRPO_rank from the teacher's rankings;
- `scores`: z-score GRPO from the same teacher's likelihoods as rewards;
- `distill`: supervised fine-tuning on the teacher's own greedy answers to the same unlabelled clips, for about as long
  as the ranking arm takes.

Finished runs are not repeated. The table is printed and written to `teacher.json` after every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlaif_fast.command_parser import CommandParser
from rlaif_fast.report.stats import paired_bootstrap
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir

COMMON = yaml.safe_load((Path(__file__).parents[1] / "configs" / "compare.yaml").read_text())["common"]
TEACHER_SEED = 907
TEACHER = {
    "seed": TEACHER_SEED,
    "synthetic_sft_clips": 2400,
    "synthetic_rl_clips": 8,
    "synthetic_test_clips": 256,
    "sft_steps": 900,
    "eval_steps": 75,
    "max_steps": 0,
}
RL_STEPS, DISTILL_STEPS = 300, 800


def run(module: str, *words: str) -> None:
    """Run a command of ours in a process of its own."""
    subprocess.run([sys.executable, "-m", module, *words], check=True)


def train(folder: Path, values: Mapping[str, Any]) -> Path:
    """Train in `folder` unless a finished run is there."""
    if not RunDir(folder).finished:
        given = {**COMMON, **values, "output_dir": str(folder), "overwrite_output_dir": True}
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(given))
        run("rlaif_fast.train", "--config", str(file))
    return folder


def arms(teacher: Path, start: Path, labels: Path) -> dict[str, dict[str, Any]]:
    """What each arm changes, by name."""
    judge = {"model": str(teacher), "min_pixels": COMMON["min_pixels"], "max_pixels": COMMON["max_pixels"]}
    begin = str(start / "checkpoints" / "sft")

    def ranking(protocol: str, **more: Any) -> dict[str, Any]:
        # Which checkpoint is best is decided on the student's own labelled validation clips, as for every arm.
        options = {**judge, "protocol": protocol, "use_reference": False}
        return {
            "sft": begin,
            "oracle": "local",
            "oracle_options": options,
            "metric_for_best_model": "accuracy",
            "max_steps": RL_STEPS,
            **more,
        }

    return {
        "ranks_likelihood": ranking("likelihood", algorithm="grpo_rank", advantage="oracle"),
        "scores": ranking("likelihood", algorithm="grpo"),
        "distill": {"model": begin, "sft_data": str(labels), "sft_steps": DISTILL_STEPS, "max_steps": 0},
        "ranks_listwise": ranking("listwise", algorithm="grpo_rank", advantage="oracle"),
    }


def label(folder: Path, start: Path, teacher: Path) -> Path:
    """The student's unlabelled clips with the teacher's greedy answers."""
    out = folder / "labels.jsonl"
    if not out.exists():
        data = rows_of(start)
        predictions = folder / "teacher-answers.jsonl"
        frames = [f"--{key}={COMMON[key]}" for key in ("fps", "max_frames", "min_pixels", "max_pixels")]
        run(
            "rlaif_fast.evaluate",
            *("--model", str(teacher), "--data", str(data), "--output", str(predictions)),
            *frames,
            f"--max_completion_length={COMMON['max_completion_length']}",
        )
        run("rlaif_fast.data", "label", str(data), str(out), "--predictions", str(predictions))
    return out


def rows_of(start: Path) -> Path:
    """The file of the clips that a run's RL stage learned from."""
    from rlaif_fast.trainer.datasets import split_files
    from rlaif_fast.trainer.resume import saved_config

    return split_files(saved_config(RunDir.open(start)), workers=1, progress=None)["rl"]


def answers(folder: Path) -> dict[str, tuple[float, str]]:
    """Right or wrong, and the video, by question."""
    rows = read_jsonl(RunDir(folder).predictions("final"))
    return {row["example_id"]: (float(row["correct"]), row["video"]) for row in rows}


def report(out: Path, teacher: Path, seeds: list[int]) -> None:
    """Print and write the results so far."""
    table: dict[str, Any] = {}
    for name in ("ranks_likelihood", "ranks_listwise", "scores", "distill"):
        folders = {
            seed: out / f"seed-{seed}" for seed in seeds if RunDir(out / f"seed-{seed}" / name).finished
        }
        if not folders:
            continue
        before, after, videos = [], [], []
        for seed, folder in folders.items():
            start, end = answers(folder / "start"), answers(folder / name)
            before += [start[key][0] for key in end]
            after += [right for right, _ in end.values()]
            videos += [f"{seed} {video}" for _, video in end.values()]
        gain = paired_bootstrap(before, after, clusters=videos)
        seconds = [RunDir(folder / name).read_summary()["seconds"] for folder in folders.values()]
        table[name] = {
            "seeds": list(folders),
            "before": sum(before) / len(before),
            "after": sum(after) / len(after),
            "gain": [gain.mean, gain.low, gain.high],
            "seconds": sum(seconds) / len(seconds),
        }
    right = json.loads((teacher / "summary.json").read_text())["final_accuracy"]
    (out / "teacher.json").write_text(json.dumps({"teacher": right, "arms": table}, indent=1) + "\n")
    print(f"teacher: {right:.1%}")
    for name, row in table.items():
        mean, low, high = (100 * value for value in row["gain"])
        print(
            f"{name:<18} seeds {row['seeds']}: {row['before']:.1%} -> {row['after']:.1%}, "
            f"gain {mean:+.1f} [{low:+.1f}, {high:+.1f}], {row['seconds']:.0f} s a run",
            flush=True,
        )


def main() -> None:
    """Train the teacher, then every arm of every seed, with a report after each."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/teacher"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[71, 72, 73])
    names = list(arms(Path(), Path(), Path()))
    parser.add_argument("--only", nargs="+", choices=names, help="Names of arms; by default all.")
    options = parser.parse_args()
    out = options.output_dir.resolve()
    teacher = train(out / "teacher", TEACHER)
    checkpoint = teacher / "checkpoints" / "sft"
    for seed in options.seeds:
        folder = out / f"seed-{seed}"
        start = train(folder / "start", {"seed": seed, "max_steps": 0})
        labels = label(folder, start, checkpoint)
        for name, values in arms(checkpoint, start, labels).items():
            if options.only is None or name in options.only:
                train(folder / name, {"seed": seed, **values})
                report(out, teacher, options.seeds)


if __name__ == "__main__":
    main()
