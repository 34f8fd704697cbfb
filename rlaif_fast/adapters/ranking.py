"""The common part of the advantage hooks of other trainers: rows of a batch, in any order, ranked by group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss.api import rank_advantages
from rlaif_fast.loss.inputs import RankAdvantages
from rlaif_fast.loss.options import KINDS, RankOptions, check_choice
from rlaif_fast.oracle.as_reward import gains, prompt_media, rank_groups, requests_of
from rlaif_fast.oracle.base import Oracle
from rlaif_fast.video import ClipStore

RANK_KINDS = tuple(kind for kind in KINDS if kind != "zscore")  # which needs rewards


@dataclass(frozen=True)
class RankedRows:
    """The result of ranking B responses.

    Attributes:
        gains: B gains of the ranks, the raw reward; 0 if the oracle gave no rank.
        advantages: (B,) float32 advantages; 0 if a response was not judged or has no token.
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
        media: Show the oracle the prompts' pictures and videos, decoded by this store if one is given.

    Raises:
        ValueError: See `rank_options`.
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
        self.options = rank_options(kind, penalty_weight, scale)
        self.media = prompt_media(media)

    def scores(self, logps: Sequence[Sequence[float] | None], missing: str) -> Tensor:  # (B,)
        """Return the `scores` for `__call__`; zeros if `kind` needs no order and a score is unknown.

        Args:
            logps: The log-probabilities of each response's tokens; None if the trainer computed none.
            missing: What the trainer did not compute and how to get it, for the error.

        Raises:
            ValueError: The kind compares with the policy's order, and a response's place in it is unknown.
        """
        known = [row for row in logps if row is not None]
        if len(known) == len(logps):
            rows = [torch.tensor(row, dtype=torch.float32)[None] for row in known]
            return torch.cat([mean_logps(row, torch.ones_like(row)) for row in rows] or [torch.zeros(0)])
        if self.options.orders_policy:
            raise ValueError(
                f"kind=\"{self.options.kind}\" compares the oracle's order with the policy's, and {missing}, "
                'or kind="oracle"'
            )
        return torch.zeros(len(logps))

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
            references: Reference answers, or None.
            scores: The policy's own score of each response; higher is more likely, NaN is a response without a token.
            columns: Further values that the oracle gets for each row.

        Raises:
            ValueError: An argument does not have one value per row.
            UsageError: The rows of a group ask different things, or the oracle does not rank all of them.
        """
        told = {**(columns or {}), "reference": references}
        count = len(group_ids)
        sizes = {name: len(column) for name, column in told.items()}
        sizes |= {"prompts": len(prompts), "responses": len(responses), "scores": len(scores)}
        for name, size in sizes.items():
            if size != count:
                raise ValueError(f"{name} must have {count} values, one a row; got {size}")
        numbers = {name: number for number, name in enumerate(dict.fromkeys(group_ids))}
        groups: list[list[int]] = [[] for _ in numbers]
        for row, name in enumerate(group_ids):
            groups[numbers[name]].append(row)
        raw, ranks = [0.0] * count, [float("nan")] * count
        requests = requests_of(groups, prompts, responses, told, media=self.media)
        rankings = rank_groups(self.oracle, requests, told)
        for rows, ranking in zip(groups, rankings):
            for row, rank, gain in zip(rows, ranking.ranks, gains(ranking)):
                if rank is not None and gain is not None:
                    raw[row], ranks[row] = gain, float(rank)
        index = torch.tensor([numbers[name] for name in group_ids], dtype=torch.int64)
        scores = scores.detach().float().cpu()
        return RankedRows(raw, advantages(scores, torch.tensor(ranks), self.options, index)[0].advantages)


def rank_options(kind: str, penalty_weight: float, scale: str) -> RankOptions:
    """Return how ranks become advantages.

    Raises:
        ValueError: A kind that takes no ranks or does not exist, a weight below 0 or one that the kind does not use,
            or an unknown scale.
    """
    check_choice("kind", kind, RANK_KINDS)
    if kind != "directed" and penalty_weight != RankOptions.penalty_weight:
        raise ValueError(
            f"penalty_weight must be left out with kind={kind!r}, which does not read it; got {penalty_weight}"
        )
    return RankOptions(kind, penalty_weight, scale)


def advantages(
    scores: Tensor,  # (N, G), or (B,) with group_index
    ranks: Tensor,  # like scores
    options: RankOptions,
    group_index: Tensor | None = None,  # (B,)
) -> tuple[RankAdvantages, Tensor]:
    """Return the result of `rank_advantages` for the ranks, and which responses were judged.

    A NaN rank means that the oracle did not judge the response, a NaN score that the response has no token and so no
    place in the policy's order.
    """
    judged = ~(ranks.isnan() | scores.isnan())
    scores, ranks = scores.masked_fill(~judged, 0.0), ranks.masked_fill(~judged, 0.0)
    return rank_advantages(scores, ranks, judged=judged, group_index=group_index, **asdict(options)), judged


def mean_logps(logps: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean log-probability of each response, from (B, T) tokens; NaN for a response without a token.

    Raises:
        ValueError: A token that counts has a NaN log-probability.
    """
    mask = mask.bool()
    kept = logps.masked_fill(~mask, 0.0)
    if kept.isnan().any():
        row, token = kept.isnan().nonzero()[0].tolist()
        raise ValueError(f"log-probabilities must not be NaN; got NaN in response {row} at token {token}")
    return kept.sum(1) / mask.sum(1)  # 0 / 0 is NaN


def put_at_last_token(rows: Iterable[Tensor], masks: Iterable[Tensor], values: Tensor) -> None:
    """Write the value (B,) of each response into its row, at the last token that its mask keeps, if there is one."""
    for row, mask, value in zip(rows, masks, values, strict=True):
        row[mask.nonzero()[-1:]] = value.to(row)


def check_scale_rewards(value: str | None, scale: str) -> None:
    """Refuse a scaling of rewards that would be dropped: ranks are scaled by `scale`.

    Raises:
        ValueError: It is neither the trainer's default nor equal to `scale`.
    """
    if value not in (None, "group", scale):
        raise ValueError(
            f"scale_rewards must be left out, ranks are scaled by scale={scale!r}; got {value!r}"
        )
