"""What the advantage hooks of other trainers share: rows of a batch, in any order, ranked group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss.api import rank_advantages
from rlaif_fast.oracle.as_reward import gains, prompt_media, requests_of
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.video import ClipStore


@dataclass(frozen=True)
class RankedRows:
    """What an oracle made of B responses.

    Attributes:
        gains: B gains of the ranks, the raw reward; 0 where a response was not judged.
        advantages: (B,) float32 advantages; 0 where a response was not judged.
    """

    gains: list[float]
    advantages: Tensor


class RowRanker:
    """Ranks the responses of a batch and turns the ranks into advantages.

    Args:
        oracle: Ranks the groups.
        kind: "directed", "oracle", "paper" or "paper_swapped", as in `rank_advantages`.
        penalty_weight: w of the directed advantage.
        scale: "none" or "group".
        media: Show the oracle the pictures and videos of the prompts, decoded by a given store where there is one.
    """

    def __init__(
        self,
        oracle: Oracle,
        *,
        kind: str = "directed",
        penalty_weight: float = 1.0,
        scale: str = "none",
        media: bool | ClipStore = True,
    ) -> None:
        self.oracle = oracle
        self.options: dict[str, Any] = {"kind": kind, "penalty_weight": penalty_weight, "scale": scale}
        self.media = prompt_media(media)

    def __call__(
        self,
        group_ids: Sequence[Any],
        prompts: Sequence[Any],
        responses: Sequence[Any],
        references: Sequence[Any],
        scores: Tensor,  # (B,)
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> RankedRows:
        """Rank B rows.

        Args:
            group_ids: Rows with equal ids are a group; they need not be adjacent.
            prompts: Texts or chats.
            responses: Texts.
            references: Reference answers, None where there is none.
            scores: The policy's own score of each response; higher is more likely.
            columns: What else the oracle is told of each row.
        """
        numbers = {name: number for number, name in enumerate(dict.fromkeys(group_ids))}
        groups: list[list[int]] = [[] for _ in numbers]
        for row, name in enumerate(group_ids):
            groups[numbers[name]].append(row)
        told = {**(columns or {}), "reference": references}
        rankings = self.oracle.rank(requests_of(groups, prompts, responses, told, media=self.media))
        count = len(group_ids)
        raw, ranks, judged = [0.0] * count, [0.0] * count, [False] * count
        for rows, ranking in zip(groups, rankings):
            for row, rank, gain in zip(rows, ranking.ranks, gains(ranking)):
                if rank is not None and gain is not None:
                    raw[row], ranks[row], judged[row] = gain, float(rank), True
        ranked = rank_advantages(
            scores.detach().float().cpu(),
            torch.tensor(ranks),
            judged=torch.tensor(judged),
            group_index=torch.tensor([numbers[name] for name in group_ids]),
            **self.options,
        )
        return RankedRows(raw, ranked.advantages)


def mean_logps(logps: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean log-probability of each response, from (B, T) tokens; 0 for a response without a token."""
    mask = mask.to(logps.dtype)
    return (logps.masked_fill(mask == 0, 0.0) * mask).sum(1) / mask.sum(1).clamp(min=1)
