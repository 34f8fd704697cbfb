"""Several oracles as one: their rankings fused, their agreement as the confidence."""

from __future__ import annotations

from collections.abc import Sequence

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Oracle, Ranking, RankRequest, counters, rank_all
from rlaif_fast.oracle.fusion import agreement
from rlaif_fast.oracle.judge import FUSIONS
from rlaif_fast.oracle.wrappers import identity_of


class EnsembleOracle:
    """Fuses the rankings of its members.

    A member that could not rank a group has no vote on it. A group is ranked if at least `min_members`
    members could rank it.

    Args:
        members: The oracles.
        fusion: "borda" or "kemeny".
        min_members: Members that must rank a group; None is all of them.
    """

    name = "ensemble"

    def __init__(
        self, members: Sequence[Oracle], *, fusion: str = "borda", min_members: int | None = None
    ) -> None:
        if len(members) < 2:
            raise UsageError(f"oracle 'ensemble' needs at least two members, got {len(members)}")
        if fusion not in FUSIONS:
            raise UsageError(f"oracle option 'fusion' must be one of {sorted(FUSIONS)}, got {fusion!r}")
        if min_members is not None and not 1 <= min_members <= len(members):
            raise UsageError(f"oracle option 'min_members' must be in 1..{len(members)}, got {min_members}")
        self.members = tuple(members)
        self.fusion = fusion
        self.min_members = len(self.members) if min_members is None else min_members

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request."""
        members = ", ".join(identity_of(member) for member in self.members)
        return f"ensemble/1 {self.fusion} {self.min_members} ({members})"

    def stats(self) -> dict[str, float]:
        """The members' figures; those of the same name are summed."""
        total: dict[str, float] = {}
        for member in self.members:
            for key, value in counters(member).items():
                total[key] = total.get(key, 0.0) + value
        return total

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests."""
        by_member = [rank_all(member, requests) for member in self.members]
        return [self._fuse(rankings) for rankings in zip(*by_member)]

    def _fuse(self, rankings: Sequence[Ranking]) -> Ranking:
        valid = [ranking for ranking in rankings if ranking.valid]
        size = len(rankings[0].ranks)
        verdicts = tuple(verdict for ranking in rankings for verdict in ranking.verdicts)
        tokens = sum(ranking.tokens for ranking in rankings)
        seconds = sum(ranking.seconds for ranking in rankings)
        if len(valid) < self.min_members:
            reason = next(ranking.failure for ranking in rankings if not ranking.valid)
            error = f"{len(rankings) - len(valid)} of {len(rankings)} members could not rank it: {reason}"
            return Ranking((None,) * size, 0.0, verdicts, tokens, seconds, error)
        orders = [ranking.ranks for ranking in valid]
        confidence = agreement(orders) * min(ranking.confidence for ranking in valid)
        return Ranking(FUSIONS[self.fusion](orders), confidence, verdicts, tokens, seconds)
