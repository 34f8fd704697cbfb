"""Orders of a group: from scores, fused from others (Borda, Kemeny), and how far they agree (tau-b, Kendall's
W).

An order is a tuple of G entries, 0 best, equal numbers tied, None not judged. Everything here is a pure
function of orders; relabelling the responses relabels the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Order = Sequence[int | None]

_EXACT_KEMENY = 8  # dynamic programme over 2^G subsets; above it local search


def ranks_from_scores(scores: Sequence[float | None], tolerance: float = 1e-9) -> tuple[int | None, ...]:
    """Dense ranks, 0 for the highest score; scores closer than `tolerance` tie, None stays None.

    Raises:
        ValueError: If a score is NaN.
    """
    present = sorted({score for score in scores if score is not None}, reverse=True)
    if any(math.isnan(score) for score in present):
        raise ValueError(f"scores must not hold NaN, got {list(scores)}")
    rank_of: dict[float, int] = {}
    rank, previous = -1, math.inf
    for score in present:
        if rank < 0 or previous - score > tolerance:
            rank += 1
        rank_of[score] = rank
        previous = score
    return tuple(None if score is None else rank_of[score] for score in scores)


def kendall_tau(first: Order, second: Order) -> float | None:
    """Kendall's tau-b over the responses that both orders judged; None if either leaves no pair untied."""
    pairs = [(a, b) for a, b in zip(first, second) if a is not None and b is not None]
    concordance = untied_first = untied_second = 0
    for i, (a, b) in enumerate(pairs):
        for c, d in pairs[:i]:
            sign_first, sign_second = (a > c) - (a < c), (b > d) - (b < d)
            concordance += sign_first * sign_second
            untied_first += sign_first != 0
            untied_second += sign_second != 0
    if untied_first == 0 or untied_second == 0:
        return None
    return concordance / math.sqrt(untied_first * untied_second)


def top1_agreement(first: Order, second: Order) -> float | None:
    """Chance that a best response of one order is also a best one of the other, ties drawn at random.

    The overlap of the two sets of best responses over the larger set; None if an order judged nothing.
    """
    best = []
    for order in (first, second):
        judged = [rank for rank in order if rank is not None]
        if not judged:
            return None
        best.append({i for i, rank in enumerate(order) if rank == min(judged)})
    return len(best[0] & best[1]) / max(len(best[0]), len(best[1]))


def preferences(orders: Sequence[Order]) -> tuple[list[list[float]], list[list[int]]]:
    """Pairwise votes over several orders.

    Returns:
        wins: (G, G); wins[i][j] orders place i before j, a tie counts one half.
        votes: (G, G); votes[i][j] orders judged both.
    """
    size = _group_size(orders)
    wins = [[0.0] * size for _ in range(size)]
    votes = [[0] * size for _ in range(size)]
    for order in orders:
        for i, a in enumerate(order):
            for j, b in enumerate(order):
                if i == j or a is None or b is None:
                    continue
                votes[i][j] += 1
                wins[i][j] += 1.0 if a < b else 0.5 if a == b else 0.0
    return wins, votes


def borda(orders: Sequence[Order]) -> tuple[int | None, ...]:
    """Fuse orders by their mean share of pairwise wins; with complete orders this is the mean rank."""
    wins, votes = preferences(orders)
    return ranks_from_scores(_borda_scores(wins, votes))


def _borda_scores(wins: list[list[float]], votes: list[list[int]]) -> list[float | None]:
    scores: list[float | None] = []
    for own_wins, own_votes in zip(wins, votes):
        shares = [win / vote for win, vote in zip(own_wins, own_votes) if vote]
        scores.append(sum(shares) / len(shares) if shares else None)
    return scores


def kemeny(orders: Sequence[Order]) -> tuple[int | None, ...]:
    """Fuse orders into one that contradicts the fewest pairwise votes.

    Exact up to 8 judged responses; if several orders are optimal, each response gets its mean position over
    all of them, so that a tie of the judges stays a tie. Above 8, insertion moves lead from the Borda order
    to a local optimum.
    """
    wins, votes = preferences(orders)
    judged = [i for i, own in enumerate(votes) if any(own)]
    # margin[a][b] > 0: more votes place a before b; placing b before a then costs the margin.
    margin = [[wins[i][j] - wins[j][i] for j in judged] for i in judged]
    if len(judged) <= _EXACT_KEMENY:
        positions = _kemeny_exact(margin)
    else:
        start = _borda_scores(wins, votes)
        positions = _kemeny_local(margin, [start[i] or 0.0 for i in judged])
    scores: list[float | None] = [None] * len(votes)
    for i, position in zip(judged, positions):
        scores[i] = -position
    return ranks_from_scores(scores)


def _kemeny_exact(margin: list[list[float]]) -> list[float]:
    """Mean position of each of m responses over all optimal orders, by a dynamic programme over subsets.

    best[S] is the least cost of placing the set S first; ways[S] is the number of orders that reach it.
    """
    m = len(margin)
    full = (1 << m) - 1

    # cost[i][S]: votes contradicted by placing i before every response of the set S.
    cost = [[0.0] * (full + 1) for _ in range(m)]
    for i in range(m):
        for rest in range(1, full + 1):
            last = rest.bit_length() - 1
            cost[i][rest] = cost[i][rest ^ 1 << last] + max(0.0, margin[last][i])

    best = [math.inf] * (full + 1)
    ways = [0] * (full + 1)
    best[0], ways[0] = 0.0, 1
    steps: list[tuple[int, int, int, float]] = []  # subset, next response, subset with it, cost; in order
    for subset in range(full + 1):
        for i in range(m):
            if subset >> i & 1:
                continue
            grown = subset | 1 << i
            total = best[subset] + cost[i][full ^ grown]
            steps.append((subset, i, grown, total))
            if total < best[grown] - 1e-9:
                best[grown], ways[grown] = total, ways[subset]
            elif total < best[grown] + 1e-9:
                ways[grown] += ways[subset]
    completions = [0] * (full + 1)
    completions[full] = 1
    mean = [0.0] * m
    for subset, i, grown, total in reversed(steps):
        if total > best[grown] + 1e-9:
            continue
        completions[subset] += completions[grown]
        mean[i] += ways[subset] * completions[grown] * subset.bit_count()
    return [value / ways[full] for value in mean]


def _kemeny_local(margin: list[list[float]], start: list[float]) -> list[float]:
    """Positions of a local optimum under insertion moves; neighbours that no vote separates tie."""
    # If starts are equal the votes decide, never how the responses are numbered.
    votes = [sorted(row) for row in margin]
    told = [sorted(zip(row, votes)) for row in margin]
    line = sorted(range(len(margin)), key=lambda i: (-round(start[i], 9), votes[i], told[i]))
    improved = True
    while improved:
        improved = False
        for item in list(line):
            at = line.index(item)
            gain, best_gain, target = 0.0, 1e-9, at
            for to in range(at - 1, -1, -1):
                gain += margin[item][line[to]]
                if gain > best_gain:
                    best_gain, target = gain, to
            gain = 0.0
            for to in range(at + 1, len(line)):
                gain += margin[line[to]][item]
                if gain > best_gain:
                    best_gain, target = gain, to
            if target != at:
                line.insert(target, line.pop(at))
                improved = True
    positions = [0.0] * len(line)
    for place in range(1, len(line)):
        above, here = line[place - 1], line[place]
        tied = margin[above][here] == 0.0 and abs(start[above] - start[here]) < 1e-9
        positions[here] = positions[above] + (0.0 if tied else 1.0)
    return positions


def kendall_w(orders: Sequence[Order]) -> float | None:
    """Kendall's coefficient of concordance W of k orders, corrected for ties, over what all of them judged.

    Returns:
        W in [0, 1]; 1 if all orders are equal. None if it is undefined: fewer than 2 orders, fewer than
        2 responses judged by all, or no order that separates any two of them.
    """
    size, k = _group_size(orders), len(orders)
    common = [i for i in range(size) if all(order[i] is not None for order in orders)]
    n = len(common)
    if k < 2 or n < 2:
        return None
    sums = [0.0] * n
    tie_correction = 0.0
    for order in orders:
        values = [order[i] for i in common]
        for at, value in enumerate(values):
            below = sum(other < value for other in values)  # type: ignore[operator]
            equal = values.count(value)
            sums[at] += below + (equal + 1) / 2
        for value in set(values):
            equal = values.count(value)
            tie_correction += equal**3 - equal
    mean = sum(sums) / n
    spread = sum((total - mean) ** 2 for total in sums)
    denominator = k * k * (n**3 - n) - k * tie_correction
    if denominator <= 0.0:
        return None
    return min(1.0, 12.0 * spread / denominator)


def agreement(orders: Sequence[Order]) -> float:
    """Confidence in a fused ranking: Kendall's W corrected for chance, in [0, 1].

    W of k unrelated orders is 1/k on average, so W itself would call noise half certain at k = 2. This is
    max(0, (k W - 1) / (k - 1)), the mean Spearman correlation of two orders: 0 for chance, 1 for equal
    orders. A single order cannot disagree and gets 1; orders that all tie everything agree (and teach
    nothing).
    """
    k = len(orders)
    if k < 2:
        return 1.0
    w = kendall_w(orders)
    if w is None:
        all_tied = all(len({rank for rank in order if rank is not None}) == 1 for order in orders)
        return 1.0 if all_tied else 0.0
    return max(0.0, (k * w - 1.0) / (k - 1.0))


def _group_size(orders: Sequence[Order]) -> int:
    sizes = {len(order) for order in orders}
    if len(sizes) != 1:
        raise ValueError(f"orders must be of one length and at least one, got lengths {sorted(sizes)}")
    return sizes.pop()
