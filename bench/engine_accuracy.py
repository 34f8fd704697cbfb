"""The tiny run's RL stage with responses drawn by vLLM, beside the default sampler's: is the accuracy the same?

    python bench/engine_accuracy.py OUT [--max_steps N] [--seed S] [--sft FOLDER] [--urls URL ...]

Run it in the environment of bench/engine_env.sh. Both stages start from one supervised checkpoint (that of `--sft`,
else one is made), on one seed and in one process; only the sampler differs. With `--urls` servers draw (docs/engines.md
says how to start them), else vLLM in the process. Existing runs are read, not repeated. Exits with 1 if the two are
more than 3 points apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rlaif_fast.command_parser import CommandParser
from rlaif_fast.train import main as train

BAR = 0.03
OPTIONS = {"max_model_len": 512, "max_num_seqs": 384}


def accuracy(folder: Path, **values: Any) -> tuple[float, float]:
    """Test accuracy where RL began and at the end of a run, which is made if it does not exist."""
    if not (folder / "summary.json").exists():
        words = {"output_dir": folder, "num_processes": 1, "report": "false", **values}
        code = train([f"--{name}={value}" for name, value in words.items()])
        if code != 0:
            sys.exit(code)
    summary = json.loads((folder / "summary.json").read_text())
    return summary["sft_accuracy"], summary["final_accuracy"]


def main() -> int:
    """Train twice, or read what was trained, and print a table."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max_steps", type=int, default=330)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", default="auto")
    parser.add_argument("--urls", nargs="*", default=[])
    given = parser.parse_args()
    same = {"max_steps": given.max_steps, "seed": given.seed, "cache_dir": given.out / "cache"}
    options = {"urls": given.urls} if given.urls else OPTIONS
    start, ours = accuracy(given.out / "default", **same, sft=given.sft)
    _, theirs = accuracy(
        given.out / ("served" if given.urls else "vllm"),
        **same,
        sft=given.out / "default/checkpoints/sft" if given.sft == "auto" else given.sft,
        sampler="vllm",
        sampler_options=json.dumps(options),
    )
    print(f"{given.max_steps} steps of RL, seed {given.seed}, test accuracy in %")
    print(f"where RL began {100 * start:6.1f}")
    print(f"default sampler {100 * ours:5.1f}")
    print(f"vllm {100 * theirs:16.1f}")
    return int(abs(ours - theirs) > BAR)


if __name__ == "__main__":
    sys.exit(main())
