"""Groups: a rollout once an oracle has ranked it and an algorithm has computed advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from rlaif_fast.algorithms.base import Algorithm
from rlaif_fast.algorithms.verdicts import Verdicts
from rlaif_fast.errors import RlaifFastError
from rlaif_fast.loss import reference
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest, rank_all
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.rollout.base import Rollout

T = TypeVar("T")


@dataclass(frozen=True)
class Appraisal:
    """A critic's estimates for the M tokens of a group, each (M,) float32.

    Attributes:
        advantages: What the policy learns from.
        values: The value of the state that each token was drawn in, before the update.
        returns: What the value model should predict.
    """

    advantages: Tensor
    values: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Group:
    """One prompt, the G responses sampled for it, the oracle's verdict on them and the resulting advantages.

    The loss's inputs are on the policy's device; none of them is read on the host before the update.

    Attributes:
        prompt: The prompt.
        texts: The G responses as text.
        token_ids: The G responses as tokens, without padding; M tokens in all.
        finished: G entries, whether the response drew its end-of-sequence token within the budget.
        logps: (M,) float32 log-probability of each token when it was drawn, response after response.
        sampling_ratio: (M,) float32, see `Rollout`; None if the policy itself samples.
        forced: (M,) bool, see `Rollout`; None if every token was drawn.
        ranking: The oracle's verdict.
        has_signal: Whether the group can teach anything (ranked, and not all tied).
        scores: (G,) float32, the policy's own score of each response; higher is more likely.
        advantages: (G,) float32; 0 on responses that were not judged.
        agreement: (2,) float32, nDCG and Kendall's tau of the policy's order with the oracle's; NaN if the group was
            not ranked.
        appraisal: From a critic, made last; None without one.
    """

    prompt: Prompt
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]
    logps: Tensor  # (M,)
    sampling_ratio: Tensor | None  # (M,)
    ranking: Ranking
    has_signal: bool
    scores: Tensor  # (G,)
    advantages: Tensor  # (G,)
    agreement: Tensor  # (2,)
    appraisal: Appraisal | None = None
    forced: Tensor | None = None  # (M,)

    @property
    def tokens(self) -> int:
        """M."""
        return sum(map(len, self.token_ids))


def to_learn_from(groups: Sequence[Group], algorithm: Algorithm) -> list[Group]:
    """The groups with only the responses that the algorithm's loss takes; groups without any are left out."""
    chosen = [(group, algorithm.learns_from(group.ranking)) for group in groups]
    return [part_of(group, places) for group, places in chosen if len(places)]


def part_of(group: Group, places: Sequence[int]) -> Group:
    """The group with only the responses at these places, in their order."""
    if list(places) == list(range(len(group.texts))):
        return group
    index = torch.tensor(places, device=group.scores.device)
    lengths = [len(tokens) for tokens in group.token_ids]

    def tokens_of(x: Tensor) -> Tensor:  # (M,)
        pieces = x.split(lengths)
        return torch.cat([pieces[i] for i in places])

    ranking, ratio, forced = group.ranking, group.sampling_ratio, group.forced
    scores = None if ranking.scores is None else tuple(ranking.scores[i] for i in places)
    return replace(
        group,
        texts=tuple(group.texts[i] for i in places),
        token_ids=tuple(group.token_ids[i] for i in places),
        finished=tuple(group.finished[i] for i in places),
        logps=tokens_of(group.logps),
        sampling_ratio=None if ratio is None else tokens_of(ratio),
        forced=None if forced is None else tokens_of(forced),
        ranking=replace(ranking, ranks=tuple(ranking.ranks[i] for i in places), scores=scores),
        scores=group.scores[index],
        advantages=group.advantages[index],
    )


def for_the_log(groups: Sequence[Group]) -> list[Group]:
    """Copies for another process, which logs them without learning: in main memory, without frames or pixels."""
    if not groups:
        return []
    # One copy to the host for all groups.
    figures = torch.stack([torch.cat((g.scores, g.advantages, g.agreement)) for g in groups]).cpu()
    copies = []
    for group, row in zip(groups, figures):
        g = len(group.texts)
        no_ids = torch.empty(0, dtype=torch.int64)
        bare = replace(group.prompt, input_ids=no_ids, media=(), clips=(), inputs=None)
        copies.append(
            replace(
                group,
                prompt=bare,
                logps=torch.empty(0),
                sampling_ratio=None if group.sampling_ratio is None else group.sampling_ratio.cpu(),
                forced=None,
                scores=row[:g],
                advantages=row[g : 2 * g],
                agreement=row[2 * g :],
            )
        )
    return copies


def rank_request(prompt: Prompt, responses: Sequence[str], place: int) -> RankRequest:
    """The request to an oracle about some responses; `place` is the prompt's place in its batch."""
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
    """The request to an oracle about each group."""
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
    rankings = rank_all(oracle, requests)
    verdicts = verdicts_of(rankings, policy_scores(rollout, algorithm.options.score), algorithm)
    worth = algorithm.advantages(verdicts)
    agreement = torch.stack((worth.ndcg, worth.kendall_tau), dim=1).float()
    ranked = torch.tensor([ranking.valid for ranking in rankings]).to(agreement.device)
    agreement = agreement.where(ranked[:, None], float("nan"))

    lengths = rollout.mask.sum(1)
    sizes = lengths.view(-1, g).sum(1).tolist()
    rows = [tuple(ids[:n]) for ids, n in zip(rollout.token_ids.tolist(), lengths.tolist())]
    finished = rollout.finished.tolist()
    logps = rollout.logps[rollout.mask].split(sizes)
    ratios: Sequence[Tensor | None] = [None] * len(prompts)
    if rollout.sampling_ratio is not None:
        ratios = rollout.sampling_ratio[rollout.mask].split(sizes)
    forced: Sequence[Tensor | None] = [None] * len(prompts)
    if rollout.forced is not None:
        forced = rollout.forced[rollout.mask].split(sizes)
    return [
        Group(
            prompt=prompt,
            texts=rollout.texts[span],
            token_ids=tuple(rows[span]),
            finished=tuple(finished[span]),
            logps=logps[i],
            sampling_ratio=ratios[i],
            ranking=rankings[i],
            has_signal=has_signal(rankings[i], algorithm),
            scores=verdicts.scores[i],
            advantages=worth.advantages[i].float(),
            agreement=agreement[i],
            forced=forced[i],
        )
        for i, (prompt, span) in enumerate(zip(prompts, spans))
    ]


def policy_scores(rollout: Rollout, score: str) -> Tensor:
    """(N, G) log-probability of each response's drawn tokens, per token ("mean") or in total ("sum")."""
    chosen = rollout.mask if rollout.forced is None else rollout.mask & ~rollout.forced
    return reference.policy_scores(rollout.logps, chosen, rollout.num_generations, score)


def verdicts_of(
    rankings: Sequence[Ranking],
    scores: Tensor,  # (N, G)
    algorithm: Algorithm,
) -> Verdicts:
    """The verdicts on some groups, on the device of `scores`; an unranked group has no judged response."""
    g = scores.shape[1]
    ranks = algorithm.feedback == "ranks"
    feedback = [list(feedback_of(r, algorithm)) if r.valid else [None] * g for r in rankings]
    judged = [[rank is not None and r.valid for rank in r.ranks] for r in rankings]
    values = [[value if ok else 0 for value, ok in zip(*pair)] for pair in zip(feedback, judged)]
    weights: Tensor | None = None
    if algorithm.options.weight_by_confidence:
        weights = torch.tensor([ranking.confidence for ranking in rankings]).to(scores.device)
    everything = all(all(row) for row in judged)
    return Verdicts(
        feedback=torch.tensor(values, dtype=torch.int64 if ranks else torch.float32).to(scores.device),
        judged=None if everything else torch.tensor(judged).to(scores.device),
        weights=weights,
        scores=scores,
    )


def verdicts_on(groups: Sequence[Group], algorithm: Algorithm) -> Verdicts:
    """The verdicts on groups that were ranked before."""
    return verdicts_of([g.ranking for g in groups], torch.stack([g.scores for g in groups]), algorithm)


def has_signal(ranking: Ranking, algorithm: Algorithm) -> bool:
    """Whether a group was ranked and not all tied, in the precision of the kernels."""
    if not ranking.valid:
        return False
    values = [v for v, rank in zip(feedback_of(ranking, algorithm), ranking.ranks) if rank is not None]
    return len(set(torch.tensor(values, dtype=torch.float32).tolist())) > 1


def feedback_of(ranking: Ranking, algorithm: Algorithm) -> Sequence[float | None]:
    """The feedback the algorithm uses: the ranking's scores or its ranks.

    Raises:
        RlaifFastError: The oracle promised scores but gave none, or one that does not fit float32.
    """
    if algorithm.feedback == "ranks":
        return ranking.ranks
    if ranking.scores is None:
        raise RlaifFastError("the oracle says gives_scores and returned a ranking without scores")
    for rank, score in zip(ranking.ranks, ranking.scores):
        if rank is not None and not (score is not None and abs(score) <= torch.finfo(torch.float32).max):
            raise RlaifFastError(
                f"the oracle ranked a response and gave it the score {score}; expected a number that float32 holds"
            )
    return ranking.scores


def minibatches(groups: Sequence[T], parts: int) -> list[Sequence[T]]:
    """The groups cut into `parts` as evenly as possible; some may be empty."""
    bounds = [len(groups) * i // parts for i in range(parts + 1)]
    return [groups[low:high] for low, high in pairwise(bounds)]
