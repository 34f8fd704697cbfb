"""Ranked groups: what a rollout becomes once an oracle has ordered it, and how advantages are put on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlaif_fast.algorithms import Algorithm
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import RlaifFastError
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest
from rlaif_fast.policy.features import MediaFeatures
from rlaif_fast.policy.forward_rows import ForwardRows, lay_out
from rlaif_fast.prompts.batches import PromptBatch
from rlaif_fast.rollout.base import Rollout, concat_rollouts


@dataclass(frozen=True)
class RankedRollout:
    """N groups of G responses with the oracle's verdict and the advantages made from it; B = N * G.

    Attributes:
        batch: The N prompts.
        rollout: Their responses.
        rankings: The oracle's N verdicts.
        scores: (N, G) the policy's own score of each response, higher is more likely.
        advantages: (N, G) float32; 0 on responses that were not judged.
        ndcg: (N,) agreement of the policy's order with the oracle's; NaN on groups that were not ranked.
        kendall_tau: (N,) likewise.
        has_signal: (N,) bool, whether the group can teach anything (ranked, and not all tied).
        features: What the vision tower gave for the prompts before the rollout, with its graph; None where it was
            not kept.
    """

    batch: PromptBatch
    rollout: Rollout
    rankings: tuple[Ranking, ...]
    scores: Tensor  # (N, G)
    advantages: Tensor  # (N, G)
    ndcg: Tensor  # (N,)
    kendall_tau: Tensor  # (N,)
    has_signal: Tensor  # (N,) bool
    features: MediaFeatures | None = None

    @property
    def valid(self) -> Tensor:
        """(N,) bool, whether the oracle ranked the group."""
        return torch.tensor([ranking.valid for ranking in self.rankings], dtype=torch.bool)

    def select(self, groups: Sequence[int]) -> RankedRollout:
        """The groups at the given positions, in that order."""
        g = self.rollout.num_generations
        index = torch.tensor(list(groups), dtype=torch.int64)
        rows = (index[:, None] * g + torch.arange(g)).flatten()
        return RankedRollout(
            batch=self.batch.select(groups),
            rollout=select_rows(self.rollout, index.tolist(), rows),
            rankings=tuple(self.rankings[i] for i in groups),
            scores=self.scores[index],
            advantages=self.advantages[index],
            ndcg=self.ndcg[index],
            kendall_tau=self.kendall_tau[index],
            has_signal=self.has_signal[index],
            features=self.features,
        )

    def without_media(self) -> RankedRollout:
        """A copy in main memory without frames and pixels, to send to another process."""
        rollout = self.rollout
        return replace(
            self,
            batch=PromptBatch(self.batch.examples, ((),) * len(self.batch), ()),
            rollout=replace(
                rollout,
                prompts=(),
                token_ids=rollout.token_ids.cpu(),
                mask=rollout.mask.cpu(),
                logps=rollout.logps.cpu(),
                finished=rollout.finished.cpu(),
            ),
            features=None,
        )


def select_rows(rollout: Rollout, groups: Sequence[int], rows: Tensor) -> Rollout:
    """The part of a rollout that belongs to `groups`, whose responses are `rows`."""
    at = rows.to(rollout.token_ids.device)
    return replace(
        rollout,
        prompts=tuple(rollout.prompts[i] for i in groups),
        token_ids=rollout.token_ids[at],
        mask=rollout.mask[at],
        logps=rollout.logps[at],
        texts=tuple(rollout.texts[i] for i in rows.tolist()),
        finished=rollout.finished[at],
        sampling_ratio=None if rollout.sampling_ratio is None else rollout.sampling_ratio[at],
    )


def concat(parts: Sequence[RankedRollout]) -> RankedRollout:
    """Several ranked rollouts as one; responses are padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    return RankedRollout(
        batch=PromptBatch(
            tuple(row for part in parts for row in part.batch.examples),
            tuple(row for part in parts for row in part.batch.clips),
            tuple(row for part in parts for row in part.batch.prompts),
        ),
        rollout=concat_rollouts([part.rollout for part in parts]),
        rankings=tuple(ranking for part in parts for ranking in part.rankings),
        scores=torch.cat([part.scores for part in parts]),
        advantages=torch.cat([part.advantages for part in parts]),
        ndcg=torch.cat([part.ndcg for part in parts]),
        kendall_tau=torch.cat([part.kendall_tau for part in parts]),
        has_signal=torch.cat([part.has_signal for part in parts]),
        features=MediaFeatures.concat([part.features for part in parts if part.features is not None])
        if any(part.features is not None for part in parts)
        else None,
    )


def rank_requests(batch: PromptBatch, texts: Sequence[str], num_generations: int) -> list[RankRequest]:
    """One request per prompt, its G texts taken in order from `texts`."""
    requests = []
    for index, (example, clips) in enumerate(zip(batch.examples, batch.clips)):
        start = index * num_generations
        requests.append(
            RankRequest(
                id=f"{index}:{example.id}",
                question=example.question,
                responses=tuple(texts[start : start + num_generations]),
                clips=clips,
                reference=example.answer,
                options=example.options,
                category=example.category,
                metadata=example.metadata,
            )
        )
    return requests


def policy_scores(rollout: Rollout, score: str) -> Tensor:
    """(N, G) log-probability of each response, per token ("mean") or in all ("sum")."""
    mask = rollout.mask.to(torch.float32)
    total = (rollout.logps * mask).sum(1)
    if score == "mean":
        total = total / mask.sum(1).clamp(min=1.0)
    return total.view(-1, rollout.num_generations).cpu()


def rank_rollout(batch: PromptBatch, rollout: Rollout, oracle: Oracle, algorithm: Algorithm) -> RankedRollout:
    """Ask the oracle for the order of every group and turn it into advantages.

    A group the oracle could not rank has advantages 0; in a group it ranked in part, the judged responses are a
    smaller group of their own and the others have advantage 0.
    """
    g = rollout.num_generations
    requests = rank_requests(batch, rollout.texts, g)
    rankings = oracle.rank(requests)
    scores = policy_scores(rollout, algorithm.options.score)

    n = len(rankings)
    advantages = torch.zeros(n, g)
    ndcg, tau = torch.full((n,), float("nan")), torch.full((n,), float("nan"))
    has_signal = torch.zeros(n, dtype=torch.bool)
    by_judged: dict[tuple[int, ...], list[int]] = {}
    for index, ranking in enumerate(rankings):
        if ranking.valid:
            judged = tuple(j for j, rank in enumerate(ranking.ranks) if rank is not None)
            by_judged.setdefault(judged, []).append(index)
    for judged, members in by_judged.items():
        rows, columns = torch.tensor(members), torch.tensor(judged)
        verdicts = [feedback_of(rankings[i], algorithm) for i in members]
        feedback = torch.tensor([[verdict[j] for j in judged] for verdict in verdicts])
        result = algorithm.advantages(scores[rows[:, None], columns], feedback)
        group_advantages = result.advantages.float()
        if algorithm.options.weight_by_confidence:
            confidence = torch.tensor([rankings[i].confidence for i in members])
            group_advantages = group_advantages * confidence[:, None]
        advantages[rows[:, None], columns] = group_advantages
        ndcg[rows], tau[rows] = result.ndcg.float(), result.kendall_tau.float()
        has_signal[rows] = result.has_signal
    return RankedRollout(batch, rollout, tuple(rankings), scores, advantages, ndcg, tau, has_signal)


def feedback_of(ranking: Ranking, algorithm: Algorithm) -> Sequence[float | None]:
    """What the algorithm makes advantages of: the ranking's scores or its ranks.

    Raises:
        RlaifFastError: The oracle promised scores and gave none.
    """
    if algorithm.feedback == "ranks":
        return ranking.ranks
    if ranking.scores is None:
        raise RlaifFastError("the oracle says gives_scores and returned a ranking without scores")
    return ranking.scores


def rollout_records(ranked: RankedRollout, step: int) -> list[dict]:
    """One JSON-ready record a group for rollouts.jsonl."""
    g = ranked.rollout.num_generations
    records = []
    for index, example in enumerate(ranked.batch.examples):
        ranking, scores = ranked.rankings[index], ranked.scores[index].tolist()
        order = sorted(scores, reverse=True)
        records.append(
            {
                "step": step,
                **example_record(example),
                "responses": list(ranked.rollout.texts[index * g : (index + 1) * g]),
                "oracle_ranks": list(ranking.ranks),
                "policy_ranks": [order.index(score) for score in scores],
                "advantages": [round(value, 4) for value in ranked.advantages[index].tolist()],
                "valid": ranking.valid,
                "confidence": ranking.confidence,
            }
        )
    return records


def example_record(example: Example) -> dict:
    """The keys that identify a row in rollouts.jsonl and samples.jsonl."""
    return {
        "example_id": example.id,
        "category": example.category,
        "video": example.videos[0] if example.videos else (example.images[0] if example.images else None),
        "question": example.question,
        "options": list(example.options),
        "answer": example.answer,
        "metadata": dict(example.metadata),
    }


def rollout_rows(rollout: Rollout) -> ForwardRows:
    """The distinct responses of each group; late in training most of a group are repeats."""
    g = rollout.num_generations
    row_lengths = rollout.mask.sum(1).tolist()
    ids = rollout.token_ids.tolist()
    rows: list[list[int]] = []
    row_of: list[int] = []
    sizes: list[int] = []
    for start in range(0, len(ids), g):
        seen: dict[tuple[int, ...], int] = {}
        for row in range(start, start + g):
            tokens = tuple(ids[row][: row_lengths[row]])
            if tokens not in seen:
                seen[tokens] = len(rows)
                rows.append(list(tokens))
            row_of.append(seen[tokens])
        sizes.append(len(seen))
    distinct = lay_out(rollout.prompts, rows, sizes)
    tokens_of = distinct.token_index.split(distinct.lengths.tolist())
    return replace(
        distinct,
        token_index=torch.cat([tokens_of[row] for row in row_of]),
        target_ids=rollout.token_ids[rollout.mask].cpu(),
    )
