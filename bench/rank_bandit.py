"""What ranks and scores teach when the responses of a group differ: a table of answers in place of a model.

    python bench/rank_bandit.py --output bench/results/cpu/rank_bandit.json

Each prompt has 64 answers with clean scores uniform in [0, 1], and the policy is a softmax over a row of a table. A
step draws G answers a prompt, corrupts their scores as `rlaif_fast.oracle.feedback` does, turns them into advantages
(`rank_shapes.py`) and follows the gradient of the mean of advantage times log-probability. What counts is the expected
clean score of the policy. Every use gets the same search for its rate, on two seeds of its own; the figures are of
fresh seeds, with the 95% interval of the lead over z-scores (over seeds). Long answers of a Video-LLM differ
as these do; those of the embedded run seldom do.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_shapes import USES, Feed, ranks_of
from rank_uses import KINDS, rounded
from torch import Tensor

from rlaif_fast.command_parser import CommandParser
from rlaif_fast.comparison.results import over_seeds
from rlaif_fast.oracle.feedback import CORRUPTIONS

PROMPTS, ANSWERS = 64, 64
SHOWN = ("grpo (z-score)", "rloo", "grpo_rank oracle", "grpo_rank directed", "gopo", "rlrr", "odrpo")
RATES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
TUNING_SEEDS = (0, 100)


def corrupt(clean: Tensor, drawn: Tensor, kind: str, rng: random.Random) -> Tensor:
    """(N, G) corrupted scores of the drawn answers; equal answers of a group stay equal."""
    scores = clean.gather(1, drawn)
    if kind == "exact":
        return scores
    function, strength = CORRUPTIONS[kind]
    rows = []
    for answers, row in zip(drawn.tolist(), scores.tolist()):
        known = dict(zip(answers, row))
        said = dict(zip(known, function(list(known.values()), strength, rng)))
        rows.append([said[answer] for answer in answers])
    return torch.tensor(rows, dtype=torch.float64)


def policy_gradient(table: Tensor, drawn: Tensor, advantages: Tensor) -> Tensor:
    """(N, A) gradient of the mean over a group of advantage times log-probability."""
    gradient = torch.zeros_like(table).scatter_add_(1, drawn, advantages)
    return (gradient - advantages.sum(1, keepdim=True) * table.softmax(1)) / drawn.shape[1]


def learn(use: str, kind: str, size: int, rate: float, seed: int, steps: int = 100) -> list[float]:
    """The policy's expected clean score before every step and at the end."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    clean = torch.rand(PROMPTS, ANSWERS, generator=generator, dtype=torch.float64)
    table = torch.randn(PROMPTS, ANSWERS, generator=generator, dtype=torch.float64)
    curve = []
    for _ in range(steps):
        logps = table.log_softmax(1)
        curve.append(float((logps.exp() * clean).sum(1).mean()))
        drawn = torch.multinomial(logps.exp(), size, replacement=True, generator=generator)
        scores, own = corrupt(clean, drawn, kind, rng), logps.gather(1, drawn)
        texts = (drawn[:, :, None] == drawn[:, None, :]).int().argmax(2)
        advantages = USES[use](Feed(ranks_of(scores), scores, own, own, texts)).double()
        table += rate * policy_gradient(table, drawn, advantages)
    curve.append(float((table.softmax(1) * clean).sum(1).mean()))
    return curve


def compare(kind: str, size: int, seeds: list[int], steps: int) -> dict[str, dict[str, Any]]:
    """Each use at the best of the rates, on fresh seeds, beside z-scores on the same seeds."""
    found: dict[str, dict[str, Any]] = {}
    for use in SHOWN:
        tried = {r: sum(learn(use, kind, size, r, seed, steps)[-1] for seed in TUNING_SEEDS) for r in RATES}
        rate = max(tried, key=lambda r: tried[r])
        curves = [learn(use, kind, size, rate, seed, steps) for seed in seeds]
        found[use] = {"rate": rate, "before": [c[0] for c in curves], "after": [c[-1] for c in curves]}
    for row in found.values():
        pairs = zip(row["after"], found[SHOWN[0]]["after"])
        lead = over_seeds([np.array([[ours - theirs, 1.0]]) for ours, theirs in pairs])
        row["lead"] = [lead.mean, lead.low, lead.high]
    return found


def main() -> None:
    """Print one table per group size."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, nargs="+", default=[8, 16], help="Sizes of a group.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--output", type=Path, help="Where to write the figures as JSON too.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for size in options.responses:
        table = {kind: compare(kind, size, options.seeds, options.steps) for kind in options.kinds}
        figures[str(size)] = table
        print(f"\nG={size}: expected clean score after {options.steps} steps, and the lead over z-scores")
        print(f"{'':<20}" + "".join(f"{kind:>30}" for kind in options.kinds))
        for use in SHOWN:
            cells = []
            for kind in options.kinds:
                row = table[kind][use]
                mean, low, high = row["lead"]
                cells.append(f"{statistics.mean(row['after']):.3f} {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            print(f"{use:<20}" + "".join(f"{cell:>30}" for cell in cells), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rounded(figures), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
