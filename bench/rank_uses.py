"""What a use of an oracle's ranks promises before a training run tries it: its advantages beside those of clean scores.

    python bench/rank_uses.py                                     # groups that are made up
    python bench/rank_uses.py --distinct --responses 16           # made up, no two responses of a group alike
    python bench/rank_uses.py --rollouts RUN/rollouts.jsonl ...   # groups of runs, scored again by the reference oracle

Every group is corrupted several times as in `rlaif_fast.oracle.feedback`; each use (`rank_shapes.py`) turns ranks or
scores into advantages. Equal texts have equal gradients, so the advantages of equal texts are added up first. With a
for the advantages and c for the clean scores minus their mean, both added up this way, four tables show:

- cos: <a, c> / (|a| |c|), sums over all groups and draws: how much of an update goes where clean scores would send it;
- right: the same with 1 for a right response and 0 for another in place of its clean score;
- snr: mean of <a, c> over draws by its deviation over draws, for a step of 48 groups;
- waste: share of the advantages' squares that sets responses apart whose clean scores are equal.

The last row, "ranked alike", gives each response the mean clean score of its level over all groups with as many
responses on each level: about the highest cos that ranks alone can have, made with scores that no use of ranks may see.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rank_shapes import USES, Feed, centred, ranks_of, same
from torch import Tensor

from rlaif_fast.command_parser import CommandParser
from rlaif_fast.oracle.base import Ranking, RankRequest
from rlaif_fast.oracle.feedback import CorruptedOracle
from rlaif_fast.oracle.fusion import ranks_from_scores
from rlaif_fast.oracle.reference import ReferenceOracle
from rlaif_fast.runs.files import read_jsonl

STEP = 48  # groups a step: 12 videos with 4 questions
RIGHT = 0.9  # the least score of a right response
KINDS = ("exact", "heavy_tails", "gaussian", "flips", "grades", "warp", "outliers")
MEASURES = ("cos", "right", "snr", "waste")
# Scores that the reference oracle gives to wrong answers, and how often, in the runs of docs/comparison.md.
WRONG, OFTEN = (0.75, 0.6, 0.3, 0.2, 0.15, 0.1), (0.08, 0.17, 0.55, 0.12, 0.05, 0.03)


@dataclass(frozen=True)
class Groups:
    """N groups of G responses with their clean scores; `order`, `logps` and `texts` are those of `Feed`."""

    requests: list[RankRequest]
    clean: Tensor
    order: Tensor
    logps: Tensor
    texts: Tensor


class Known:
    """An oracle that gives the clean scores of the groups."""

    name = "known"
    gives_scores = True

    def __init__(self, groups: Groups) -> None:
        self._rankings = [Ranking(ranks_from_scores(row), scores=tuple(row)) for row in groups.clean.tolist()]

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """In the order of the groups."""
        return self._rankings


def distinct(count: int, size: int, seed: int) -> Groups:
    """Groups in which every response is a different text, like long answers; clean scores are uniform in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    clean, chances = (torch.rand(count, size, generator=generator, dtype=torch.float64) for _ in range(2))
    texts = torch.arange(size).expand(count, -1)
    requests = [RankRequest(f"distinct {n}", "", tuple(map(str, range(size)))) for n in range(count)]
    return Groups(requests, clean, chances, chances.log(), texts)


def made_up(count: int, size: int, seed: int) -> Groups:
    """Groups of a policy that has six answers to each question and is often sure of one."""
    rng = random.Random(seed)
    requests, clean, logps, texts = [], [], [], []
    while len(requests) < count:
        chances = torch.tensor([rng.gauss(0.0, 2.5) for _ in range(6)], dtype=torch.float64).log_softmax(0)
        scores = [1.0, *rng.choices(WRONG, OFTEN, k=5)]
        drawn = rng.choices(range(6), chances.exp().tolist(), k=size)
        if len(set(drawn)) > 1:
            requests.append(RankRequest(f"made up {len(requests)}", "", tuple(map(str, drawn))))
            clean.append([scores[i] for i in drawn])
            logps.append(chances[drawn])
            texts.append([drawn.index(i) for i in drawn])
    chance = torch.stack(logps)
    return Groups(requests, torch.tensor(clean, dtype=torch.float64), chance, chance, torch.tensor(texts))


def of_runs(files: Sequence[Path], count: int, seed: int) -> Groups:
    """Groups with at least two texts, drawn evenly from runs; log-probabilities are those of a text's share."""
    lines = [line for file in files for line in read_jsonl(file) if len(set(line["responses"])) > 1]
    lines = random.Random(seed).sample(lines, min(count, len(lines)))
    texts = [line["responses"] for line in lines]
    requests = [
        RankRequest(
            id=f"{line['step']} {line['example_id']}",
            question=line["question"],
            responses=tuple(line["responses"]),
            reference=line["answer"],
            options=tuple(line["options"]),
            metadata=line["metadata"],
        )
        for line in lines
    ]
    scores = [ranking.scores for ranking in ReferenceOracle().rank(requests)]
    return Groups(
        requests,
        clean=torch.tensor(scores, dtype=torch.float64),
        order=-torch.tensor([line["policy_ranks"] for line in lines], dtype=torch.float64),
        logps=torch.tensor([[math.log(row.count(x) / len(row)) for x in row] for row in texts]).double(),
        texts=torch.tensor([[row.index(x) for x in row] for row in texts]),
    )


def corrupted(groups: Groups, kind: str, draws: int) -> Iterator[Feed]:
    """What an oracle says of the groups, once per draw."""
    for seed in range(1 if kind == "exact" else draws):
        scores = groups.clean
        if kind != "exact":
            rankings = CorruptedOracle(Known(groups), kind=kind, seed=seed).rank(groups.requests)
            scores = torch.tensor([ranking.scores for ranking in rankings], dtype=torch.float64)
        yield Feed(ranks_of(scores), scores, groups.order, groups.logps, groups.texts)


def by_text(values: Tensor, texts: Tensor) -> Tensor:
    """(N, G) values of equal texts, added up at the place of the first."""
    return torch.zeros_like(values).scatter_add(1, texts, values)


def measure(advantages: Tensor, groups: Groups) -> dict[str, float]:
    """The four figures of one use.

    Args:
        advantages: (draws, N, G).
        groups: The groups, with their clean scores.
    """
    a = torch.stack([by_text(draw, groups.texts) for draw in advantages.double()])
    c = by_text(centred(groups.clean), groups.texts)
    right = by_text(centred((groups.clean >= RIGHT).double()), groups.texts)
    inner = (a * c).sum(2)  # (draws, N)
    deviation = inner.std(0, correction=1) if len(a) > 1 else torch.zeros(a.shape[1])
    noise = deviation.square().mean().sqrt()
    alike = same(groups.clean).double()
    mean = torch.einsum("dnj,nij->dni", advantages.double(), alike) / alike.sum(2)
    apart = (advantages - mean).square().sum() / advantages.double().square().sum()
    power = a.square().sum()
    return {
        "cos": float(inner.sum() / (power * c.square().sum() * len(a)).sqrt()),
        "right": float((a * right).sum() / (power * right.square().sum() * len(a)).sqrt()),
        "snr": float(math.sqrt(STEP) * inner.mean() / noise) if noise > 0 else math.inf,
        "waste": float(apart),
    }


def ranked_alike(feeds: Sequence[Feed], groups: Groups) -> Tensor:
    """(draws, N, G) mean clean advantage of a place, over all groups and draws with as many responses on each level."""
    clean = centred(groups.clean)
    found = defaultdict(list)
    for feed in feeds:
        for row, worth in zip(feed.ranks.tolist(), clean.tolist()):
            levels = [[w for rank, w in zip(row, worth) if rank == level] for level in range(max(row) + 1)]
            found[tuple(sorted(row))].append([sum(level) / len(level) for level in levels])
    means = {key: [sum(column) / len(rows) for column in zip(*rows)] for key, rows in found.items()}
    return torch.tensor(
        [
            [[means[tuple(sorted(row))][rank] for rank in row] for row in feed.ranks.tolist()]
            for feed in feeds
        ],
        dtype=torch.float64,
    )


def rounded(figures: Any) -> Any:
    """Figures as JSON: four digits, null where there is no noise to divide by."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [rounded(value) for value in figures]
    return round(figures, 4) if math.isfinite(figures) else None


def main() -> None:
    """Print the four tables."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=Path, nargs="+", help="Files of runs in place of made-up groups.")
    parser.add_argument("--groups", type=int, default=1500, help="Groups with at least two texts.")
    parser.add_argument(
        "--distinct", action="store_true", default=None, help="Make up groups whose texts all differ."
    )
    parser.add_argument("--responses", type=int, help="Of a group that is made up; 8 without it.")
    parser.add_argument("--draws", type=int, default=8, help="Corruptions of each group.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Where to write the figures as JSON too.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rollouts:
        given = [f"--{name}" for name in ("distinct", "responses") if getattr(options, name) is not None]
        if given:
            parser.error(f"{', '.join(given)}: not read with --rollouts; leave it out")
        groups = of_runs(options.rollouts, options.groups, options.seed)
    else:
        make = distinct if options.distinct else made_up
        groups = make(options.groups, 8 if options.responses is None else options.responses, options.seed)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for kind in KINDS:
        feeds = list(corrupted(groups, kind, options.draws))
        for name, use in USES.items():
            found = measure(torch.stack([use(feed) for feed in feeds]), groups)
            figures.setdefault(name, {})[kind] = found
        figures.setdefault("ranked alike", {})[kind] = measure(ranked_alike(feeds, groups), groups)
    sizes = torch.tensor([len(set(row)) for row in groups.texts.tolist()]).bincount().tolist()
    print(f"{len(groups.requests)} groups; with 2, 3, ... texts: {sizes[2:]}")
    for name in MEASURES:
        print(f"\n{name:<24}" + "".join(f"{kind:>13}" for kind in KINDS))
        for use, row in figures.items():
            print(f"{use:<24}" + "".join(f"{row[kind][name]:>13.3f}" for kind in KINDS))
    if options.output:
        options.output.write_text(json.dumps(rounded(figures), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
