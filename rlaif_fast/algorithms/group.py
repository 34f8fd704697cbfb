"""Groups: what a rollout becomes once an oracle has ranked it and an algorithm has weighed that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlaif_fast.algorithms.base import Algorithm
from rlaif_fast.errors import RlaifFastError
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout.base import Rollout


@dataclass(frozen=True)
class Group:
    """One prompt, the G responses sampled for it, the oracle's verdict on them and what that is worth.

    Attributes:
        prompt: The prompt.
        texts: The G responses as text.
        token_ids: The G responses as tokens, without padding; M tokens in all.
        finished: G entries, whether the response drew its end-of-sequence token within the budget.
        logps: (M,) float32 log-probability of each token when it was drawn, response after response.
        sampling_ratio: (M,) float32, see `Rollout`; None where the sampler is the policy.
        ranking: The oracle's verdict.
        scores: G entries, the policy's own score of each response; higher is more likely.
        advantages: G entries; 0 on responses that were not judged.
        ndcg: Agreement of the policy's order with the oracle's; NaN where the group was not ranked.
        kendall_tau: Likewise.
        has_signal: Whether the group can teach anything (ranked, and not all tied).
    """

    prompt: Prompt
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]
    logps: Tensor  # (M,)
    sampling_ratio: Tensor | None  # (M,)
    ranking: Ranking
    scores: tuple[float, ...]
    advantages: tuple[float, ...]
    ndcg: float
    kendall_tau: float
    has_signal: bool

    @property
    def tokens(self) -> int:
        """M."""
        return sum(map(len, self.token_ids))

    def without_media(self) -> Group:
        """A copy for another process, which logs it and does not learn from it: no frames, pixels or tensors."""
        bare = replace(self.prompt, input_ids=torch.empty(0, dtype=torch.int64), media=(), clips=())
        return replace(self, prompt=bare, logps=torch.empty(0), sampling_ratio=None)


def rank_request(prompt: Prompt, responses: Sequence[str], place: int) -> RankRequest:
    """What an oracle is asked about some responses; `place` is the prompt's in its batch."""
    example = prompt.example
    return RankRequest(
        id=f"{place}:{example.id}",
        question=example.question,
        responses=tuple(responses),
        clips=prompt.clips,
        reference=example.answer,
        options=example.options,
        category=example.category,
        metadata=example.metadata,
    )


def requests_of(groups: Sequence[Group]) -> list[RankRequest]:
    """What an oracle is asked about each group."""
    return [rank_request(group.prompt, group.texts, place) for place, group in enumerate(groups)]


def rank_rollout(
    prompts: Sequence[Prompt], rollout: Rollout, oracle: Oracle, algorithm: Algorithm
) -> list[Group]:
    """Ask the oracle for the order of every group and turn it into advantages."""
    g = rollout.num_generations
    spans = [slice(start, start + g) for start in range(0, len(prompts) * g, g)]
    requests = [
        rank_request(prompt, rollout.texts[span], place)
        for place, (prompt, span) in enumerate(zip(prompts, spans))
    ]
    rankings = oracle.rank(requests)
    scores = policy_scores(rollout, algorithm.options.score)
    advantages, ndcg, tau, has_signal = weigh(rankings, scores, algorithm)

    lengths = rollout.mask.sum(1)
    sizes = lengths.view(-1, g).sum(1).tolist()
    rows = [tuple(ids[:n]) for ids, n in zip(rollout.token_ids.tolist(), lengths.tolist())]
    finished = rollout.finished.tolist()
    logps = rollout.logps[rollout.mask].split(sizes)
    ratios: Sequence[Tensor | None] = [None] * len(prompts)
    if rollout.sampling_ratio is not None:
        ratios = rollout.sampling_ratio[rollout.mask].split(sizes)
    return [
        Group(
            prompt=prompt,
            texts=rollout.texts[span],
            token_ids=tuple(rows[span]),
            finished=tuple(finished[span]),
            logps=logps[i],
            sampling_ratio=ratios[i],
            ranking=rankings[i],
            scores=tuple(scores[i].tolist()),
            advantages=tuple(advantages[i].tolist()),
            ndcg=ndcg[i].item(),
            kendall_tau=tau[i].item(),
            has_signal=bool(has_signal[i]),
        )
        for i, (prompt, span) in enumerate(zip(prompts, spans))
    ]


def policy_scores(rollout: Rollout, score: str) -> Tensor:
    """(N, G) log-probability of each response, per token ("mean") or in all ("sum")."""
    mask = rollout.mask.to(torch.float32)
    total = (rollout.logps * mask).sum(1)
    if score == "mean":
        total = total / mask.sum(1).clamp(min=1.0)
    return total.view(-1, rollout.num_generations).cpu()


def weigh(
    rankings: Sequence[Ranking],
    scores: Tensor,  # (N, G)
    algorithm: Algorithm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Turn rankings into advantages (N, G), nDCG (N,), Kendall tau (N,) and whether there is signal (N,).

    A group that the oracle could not rank has advantages 0; in a group that it ranked in part, the judged responses are
    a smaller group of their own and the others have advantage 0.
    """
    n = len(rankings)
    advantages = torch.zeros(scores.shape)
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
    return advantages, ndcg, tau, has_signal


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
