"""Captions: long answers, rarely two alike, scored by how much of them is right.

    PYTHONPATH=bench python bench/captions.py data runs/captions/data       # once
    PYTHONPATH=bench python -m rlaif_fast.compare --config bench/captions.yaml
    PYTHONPATH=bench python bench/captions.py report runs/captions          # mean scores with intervals

A caption says what is where at the start of a clip: "a red circle in the top left and a blue star in the bottom
right". Its score is the share of colours and shapes that are right, over all quadrants that the caption or the truth
names; the oracle gives that score, exact or corrupted by `feedback`. A group of eight then has many levels; the
questions of the embedded run have one or two.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlaif_fast.command_parser import CommandParser
from rlaif_fast.comparison import read_plan
from rlaif_fast.comparison.results import over_seeds
from rlaif_fast.data.synthetic.dataset import SPLITS, SyntheticConfig, make_dataset
from rlaif_fast.data.synthetic.worlds import COLORS, QUADRANTS, SHAPES, World, sample_world
from rlaif_fast.machine import cores
from rlaif_fast.oracle.base import RankRequest
from rlaif_fast.runs.files import read_jsonl
from rlaif_fast.runs.folder import RunDir

QUESTION = "what objects are there and where?"
_PART = re.compile(rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) in the ({'|'.join(QUADRANTS)})")

Facts = dict[str, tuple[str, str]]  # quadrant -> colour and shape


def caption(world: World) -> str:
    """What is where at the start, quadrant by quadrant."""
    things = sorted(world.things, key=lambda thing: QUADRANTS.index(thing.quadrant))
    return " and ".join(f"a {thing.color} {thing.shape} in the {thing.quadrant}" for thing in things)


def facts(text: str) -> Facts:
    """What a caption claims; the first claim about a quadrant counts, and text that is no claim is ignored."""
    found: Facts = {}
    for color, shape, quadrant in _PART.findall(text):
        found.setdefault(quadrant, (color, shape))
    return found


def score(text: str, truth: str) -> float:
    """Share of colours and shapes that are right, over the quadrants that either names."""
    said, right = facts(text), facts(truth)
    named = said.keys() | right.keys()
    hits = sum(a == b for place in said.keys() & right.keys() for a, b in zip(said[place], right[place]))
    return hits / (2 * len(named)) if named else 0.0


def scores(request: RankRequest) -> list[float]:
    """The oracle: the score of each response (`oracle: callable`)."""
    return [score(response, request.reference or "") for response in request.responses]


def rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """One row per clip, from the world that the clip's own rows name."""
    seen = set()
    for row in read_jsonl(folder / f"{split}.jsonl"):
        meta = row["metadata"]
        if row["video"] in seen:
            continue
        seen.add(row["video"])
        world = sample_world(meta["world"], meta["difficulty"], SPLITS[split])
        yield {
            "id": f"{split}-{len(seen)}",
            "video": row["video"],
            "question": QUESTION,
            "answer": caption(world),
            "category": f"{len(world.things)} objects",
        }


def make_data(folder: Path, seed: int) -> None:
    """Make the clips, and a file of captions for each split."""
    config = SyntheticConfig(
        seed=seed,
        sft_clips=160,
        rl_clips=1600,
        validation_clips=96,
        test_clips=512,
        difficulty=(0.0, 1.0, 0.0),
        questions_per_clip=1,
    )
    make_dataset(folder, config, workers=cores())
    for split in SPLITS:
        lines = "".join(json.dumps(row) + "\n" for row in rows(folder, split))
        (folder / f"captions-{split}.jsonl").write_text(lines)


def mean_scores(run: Path) -> dict[str, float]:
    """The score of each test caption at the end of a run."""
    return {
        row["example_id"]: score(row["prediction"], row["answer"])
        for row in read_jsonl(RunDir(run).predictions("final"))
    }


def report(config: Path, output_dir: Path | None) -> dict[str, Any]:
    """Print the mean score of every arm under every kind of feedback, with its lead over the baseline."""
    plan = read_plan(config, output_dir)
    found: dict[str, Any] = {}
    for table in plan.tables:
        for feedback in table.feedback:
            starts = {seed: plan.start_folder(seed) for seed in table.seeds}
            base: dict[int, dict[str, float]] = {}
            for arm in (table.baseline, *(arm for arm in table.arms if arm != table.baseline)):
                folders = {seed: plan.arm_folder(seed, feedback, arm) for seed in table.seeds}
                by_seed = {s: mean_scores(f) for s, f in folders.items() if RunDir(f).finished}
                if not by_seed:
                    continue
                base = by_seed if arm == table.baseline else base
                both = [seed for seed in by_seed if seed in base]
                lead = None
                if arm != table.baseline and both:
                    pairs = [
                        np.array([[by_seed[s][name] - base[s][name], 1.0] for name in base[s]]) for s in both
                    ]
                    lead = over_seeds(pairs)
                entry = {
                    "start": {s: float(np.mean(list(mean_scores(starts[s]).values()))) for s in by_seed},
                    "score": {s: float(np.mean(list(values.values()))) for s, values in by_seed.items()},
                    "lead": None if lead is None else [lead.mean, lead.low, lead.high],
                }
                found[f"{feedback}/{arm}"] = entry
                mean = float(np.mean(list(entry["score"].values())))
                said = "" if lead is None else f"  {lead.mean:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]"
                seeds = ", ".join(
                    f"{s}: {entry['start'][s]:.3f} -> {v:.3f}" for s, v in entry["score"].items()
                )
                print(f"{feedback:<12} {arm:<22} {mean:.3f}{said}   ({seeds})")
    return found


def main() -> None:
    """Make the data, or report."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("folder", type=Path)
    data.add_argument("--seed", type=int, default=500)
    said = commands.add_parser("report")
    said.add_argument("output_dir", nargs="?", type=Path)
    said.add_argument("--config", type=Path, default=Path(__file__).with_name("captions.yaml"))
    said.add_argument("--output", type=Path, help="Where to write the figures as JSON too.")
    options = parser.parse_args()
    if options.command == "data":
        make_data(options.folder, options.seed)
        return
    figures = report(options.config, options.output_dir)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
