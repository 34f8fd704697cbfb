"""What all judges share: orders of appearance, fusion, confidence, abstentions.

A judge answers one shown order at a time; `Judge.run_all` decides how. Each group is shown in k orders,
the verdicts on them are fused, and their agreement is the confidence.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from rlaif_fast.errors import UsageError
from rlaif_fast.oracle.base import Ranking, RankRequest, Verdict, gives_scores
from rlaif_fast.oracle.extract import compile_extract
from rlaif_fast.oracle.fusion import agreement, borda, kemeny
from rlaif_fast.oracle.in_flight import InFlight
from rlaif_fast.oracle.option_types import check_least, check_unread
from rlaif_fast.oracle.protocols import PROMPT_VERSION, PROTOCOLS, Ranks
from rlaif_fast.oracle.records import request_text
from rlaif_fast.oracle.untrusted import Shown, draw_orders, show_responses

FUSIONS = {"borda": borda, "kemeny": kemeny}
DEFAULT_ORDERS = {"listwise": 4, "pairwise": 2, "network": 2, "pointwise": 1, "likelihood": 1}
Keep = Callable[[int, Ranking], None]  # called with a request's place and its ranking
_ORDERED = {"listwise", "pairwise", "network"}  # what is shown first may matter


@dataclass(frozen=True)
class Showing:
    """One run of a protocol: a group's distinct texts in one order of appearance."""

    request: RankRequest
    texts: tuple[Shown, ...]
    order: tuple[int, ...]
    salt: str


@dataclass(frozen=True)
class Outcome:
    """Result of a showing: ranks (and scores, if the judge gives them) over the distinct texts, or why it has none."""

    ranks: Ranks
    scores: tuple[float, ...] | None = field(default=None, kw_only=True)
    raw: tuple[str, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class JudgeOptions:
    """How a judge is asked.

    Attributes:
        protocol: "listwise", "pairwise" (all pairs), "network" (a sorting network of pairs) or "pointwise".
        orders: k, the number of orders of appearance each group is shown in, 1 or even (every order is followed by
            its reverse); None is 4 listwise, 2 for pairs and 1 pointwise.
        fusion: "borda" or "kemeny".
        min_confidence: Below this confidence the fused ranking is all tied, so that it teaches nothing; needs several
            orders.
        use_reference: Show the judge the reference answer, if there is one.
        use_clips: Show the judge the frames.
        max_response_chars: Length a response is cut to, in the middle; longer if two would otherwise look the same.
        extract: Regular expression whose first group is the answer inside a longer response; the judge is then
            shown it beside the whole response. None shows only the response.
        seed: Seed of the orders of appearance and the labels.
    """

    protocol: str = "listwise"
    orders: int | None = None
    fusion: str = "borda"
    min_confidence: float = 0.0
    use_reference: bool = True
    use_clips: bool = True
    max_response_chars: int = 2000
    extract: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.protocol not in DEFAULT_ORDERS:
            raise UsageError(
                f"oracle option 'protocol' must be one of {sorted(PROTOCOLS)}, got {self.protocol!r}"
            )
        if self.fusion not in FUSIONS:
            raise UsageError(f"oracle option 'fusion' must be one of {sorted(FUSIONS)}, got {self.fusion!r}")
        check_least(1, orders=self.num_orders, max_response_chars=self.max_response_chars)
        if self.protocol in _ORDERED and self.num_orders > 1 and self.num_orders % 2:
            raise UsageError(
                f"oracle option 'orders' must be 1 or even, got {self.orders}: an order without its reverse "
                "leaves the judge's position bias in"
            )
        if not 0.0 <= self.min_confidence <= 1.0:
            raise UsageError(f"oracle option 'min_confidence' must be in [0, 1], got {self.min_confidence}")
        if self.min_confidence > 0.0 and self.num_orders == 1:
            raise UsageError(
                f"oracle option 'min_confidence' must be 0 with one order, whose confidence is always 1, got "
                f"{self.min_confidence}; set 'orders'"
            )
        if self.num_orders == 1:
            check_unread("with one order", JudgeOptions, fusion=self.fusion)
        compile_extract(self.extract)

    @property
    def num_orders(self) -> int:
        """k."""
        return DEFAULT_ORDERS[self.protocol] if self.orders is None else self.orders


class Judge(ABC):
    """An oracle that asks a judge; subclasses say how (`run_all`) and who (`identity`).

    Args:
        options: How it is asked.
    """

    name = "judge"
    options_class = JudgeOptions  # what a subclass's **judge takes
    more_options = tuple(option.name for option in fields(JudgeOptions))
    reads_metadata = True  # whether `run_all` uses a request's category and metadata

    def __init__(self, options: JudgeOptions) -> None:
        self.options = options
        self._in_flight: InFlight[Ranking] = InFlight()

    @property
    def identity(self) -> str:
        """What a cached verdict depends on besides the request."""
        return f"{self.name}/{PROMPT_VERSION} {self.options}"

    @abstractmethod
    def run_all(self, showings: Sequence[Showing]) -> list[Outcome]:
        """Get the judge's ranks for every showing, in their order; failures are outcomes with an error."""

    def run_each(self, showings: Sequence[Showing], tell: Callable[[int, Outcome], None]) -> None:
        """As `run_all`, but call `tell` with each showing's place and outcome, as soon as it arrives if possible."""
        for told in enumerate(self.run_all(showings)):
            tell(*told)

    def rank(self, requests: Sequence[RankRequest], keep: Keep | None = None) -> list[Ranking]:
        """Rank every request; the result is in the order of the requests.

        A group asked about twice at the same time, in one batch or by several threads, is judged only once.

        Args:
            requests: The groups.
            keep: Called with the place and the ranking of each group judged in this call as soon as the group is
                complete, so that paid-for verdicts survive an interruption.
        """
        asked = [request_text(self.asked(request)) for request in requests]

        def judge(places: list[int]) -> list[Ranking]:
            told = None if keep is None else lambda at, ranking: keep(places[at], ranking)
            return self._rank([requests[place] for place in places], told)

        return self._in_flight.run(asked, judge)

    def _rank(self, requests: Sequence[RankRequest], keep: Keep | None) -> list[Ranking]:
        groups = [self._show(request) for request in requests]
        owners = [(group, place) for group, (own, _) in enumerate(groups) for place in range(len(own))]
        flat = [showing for showings, _ in groups for showing in showings]
        found: list[dict[int, Outcome]] = [{} for _ in groups]
        rankings = {i: self._fuse(places, [], [], 0.0) for i, (own, places) in enumerate(groups) if not own}
        start = time.perf_counter()

        def tell(at: int, outcome: Outcome) -> None:
            group, place = owners[at]
            showings, places = groups[group]
            found[group][place] = outcome
            if len(found[group]) == len(showings):
                share = (time.perf_counter() - start) / len(flat)
                outcomes = [found[group][place] for place in range(len(showings))]
                rankings[group] = self._fuse(places, showings, outcomes, share)
                if keep is not None:
                    keep(group, rankings[group])

        if flat:
            self.run_each(flat, tell)
        return [rankings[group] for group in range(len(groups))]

    def asked(self, request: RankRequest) -> RankRequest:
        """The request without what the judge is not shown; a cached verdict depends on the rest."""
        if not self.options.use_reference:
            request = replace(request, reference=None)
        if not self.options.use_clips:
            request = replace(request, clips=())
        return request if self.reads_metadata else replace(request, category="", metadata={})

    def shown(self, request: RankRequest) -> tuple[list[Shown], list[int]]:
        """The distinct responses of a group as they are shown, and each response's index among them."""
        options = self.options
        return show_responses(request.responses, options.max_response_chars, compile_extract(options.extract))

    def _show(self, request: RankRequest) -> tuple[list[Showing], list[int]]:
        """The showings of a group (none if it has only one distinct text), and which text each response is."""
        texts, places = self.shown(request)
        if len(texts) < 2:
            return [], places
        request = self.asked(request)
        # The request's id is left out: equal content is shown equally, so that verdicts can be cached.
        content = (str(self.options.seed), request.question, *texts)
        orders = draw_orders(len(texts), self.options.num_orders, *content)
        salts = ["\x1f".join((str(number), *content)) for number in range(len(orders))]
        return [Showing(request, tuple(texts), *pair) for pair in zip(orders, salts)], places

    def _fuse(
        self, places: list[int], showings: list[Showing], outcomes: list[Outcome], share: float
    ) -> Ranking:
        even = (0.0,) * len(places) if gives_scores(self) else None  # nobody is ahead
        if not showings:
            return Ranking(ranks=(0,) * len(places), scores=even)
        first_of = [places.index(text) for text in range(len(showings[0].texts))]
        ordered = self.options.protocol in _ORDERED
        verdicts = tuple(
            Verdict(
                order=tuple(first_of[i] for i in showing.order) if ordered else (),
                ranks=_spread(outcome.ranks, first_of, len(places)),
                raw=outcome.raw,
                error=outcome.error,
            )
            for showing, outcome in zip(showings, outcomes)
        )
        tokens = sum(outcome.tokens for outcome in outcomes)
        seconds = sum(outcome.seconds for outcome in outcomes) or share * len(showings)
        usable = self._usable(outcomes)
        if not usable:
            reason = next((outcome.error for outcome in reversed(outcomes) if outcome.error), None)
            error = reason or "the judge could not judge two responses"
            return Ranking((None,) * len(places), 0.0, verdicts, tokens, seconds, error)
        orders = [outcome.ranks for outcome in usable]
        fused = list(FUSIONS[self.options.fusion](orders))
        for i in range(len(fused)):
            if 2 * sum(ranks[i] is not None for ranks in orders) < len(orders):
                fused[i] = None
        scores = _mean_scores(usable, places)
        confidence = agreement(orders)
        if confidence < self.options.min_confidence:
            fused = [None if rank is None else 0 for rank in fused]
            scores = even
        ranks = tuple(fused[text] for text in places)
        return Ranking(ranks, confidence, verdicts, tokens, seconds, scores=scores)

    def _usable(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The orders that can be fused: those that judged something, reduced to what their reverse judged too.

        A response that only one of the two judged, or an order whose reverse is lost, would leave position bias in the
        ranking.
        """
        if self.options.protocol in _ORDERED and len(outcomes) > 1:
            outcomes = [_beside(outcome, outcomes[i ^ 1]) for i, outcome in enumerate(outcomes)]
        return [o for o in outcomes if o.error is None and sum(rank is not None for rank in o.ranks) >= 2]


def _beside(outcome: Outcome, other: Outcome) -> Outcome:
    """An order without the responses that the other did not judge."""
    lost = [other.error is not None or rank is None for rank in other.ranks]
    ranks = tuple(None if gone else rank for rank, gone in zip(outcome.ranks, lost))
    return replace(outcome, ranks=ranks)


def _mean_scores(outcomes: Sequence[Outcome], places: Sequence[int]) -> tuple[float, ...] | None:
    """The score of each response, averaged over the showings; None from a judge without scores."""
    given = [outcome.scores for outcome in outcomes if outcome.scores is not None]
    if not given:
        return None
    means = [sum(values) / len(given) for values in zip(*given)]
    return tuple(means[text] for text in places)


def _spread(ranks: Ranks, first_of: list[int], size: int) -> Ranks:
    spread: list[int | None] = [None] * size
    for place, rank in zip(first_of, ranks):
        spread[place] = rank
    return tuple(spread)
