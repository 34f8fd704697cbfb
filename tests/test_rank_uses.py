"""The simulation of uses of ranks: gains, advantages and figures worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from rank_candidates import Levels, TrustedLevels
from rank_shapes import (
    USES,
    Feed,
    by_levels,
    centred,
    certain,
    leave_one_out,
    normal,
    of_levels,
    of_texts,
    paper,
    plackett_luce,
    ranks_of,
    shared,
    soft,
    unit,
)
from rank_uses import Groups, corrupted, distinct, made_up, main, measure, of_runs, ranked_alike

from rlaif_fast.algorithms import AlgorithmOptions, Verdicts

SECOND = 1 / (2 * math.log2(3))  # the paper's gain of the second place
THIRD = 1 / (3 * 2)


def tensor(*values: float) -> torch.Tensor:  # (1, G)
    return torch.tensor([values], dtype=torch.float64)


def feed(scores: list[float], texts: list[int], logps: list[float] | None = None) -> Feed:
    rows = tensor(*scores)
    policy = tensor(*(logps or [0.0] * len(scores)))
    return Feed(ranks_of(rows), rows, policy, policy, torch.tensor([texts]))


def assert_near(found: torch.Tensor, *expected: float) -> None:
    # 1e-6 is added to what is divided by.
    torch.testing.assert_close(found.double(), tensor(*expected), rtol=0, atol=1e-5)


# Two texts: three responses of the better one, one of the other.
LOPSIDED = feed([0.9, 0.9, 0.1, 0.9], [0, 0, 2, 0])
# Three texts, of which the last two tie.
TIED = feed([0.2, 1.0, 0.2, 0.2], [0, 1, 2, 2])


def test_ties_share_the_gains_of_their_places():
    assert_near(
        shared(paper, LOPSIDED.ranks), *[(1 + SECOND + THIRD) / 3] * 2, paper(3), (1 + SECOND + THIRD) / 3
    )


def test_a_level_takes_one_place_however_many_stand_on_it():
    gap = 1 - SECOND
    assert_near(of_levels(paper, LOPSIDED), gap / 4, gap / 4, -3 * gap / 4, gap / 4)


def test_equal_texts_take_one_place_and_other_texts_one_each():
    tied = (SECOND + THIRD) / 2
    assert_near(
        of_texts(paper, TIED, once=False), *[(tied - 1) / 4, 3 * (1 - tied) / 4], *[(tied - 1) / 4] * 2
    )
    gap = 2 / 3 * (1 - tied)
    assert_near(of_texts(paper, TIED, once=True), -gap / 2, gap, -gap / 4, -gap / 4)


def test_plackett_luce_is_the_gradient_of_the_rankings_likelihood():
    logps = [math.log(0.5), math.log(0.3), math.log(0.2)]
    # the second is drawn first, then the third, then the first
    ranked = feed([0.1, 0.9, 0.5], [0, 1, 2], logps)
    assert_near(plackett_luce(ranked), -0.5 - 5 / 7, 1 - 0.3, 1 - 2 / 7 - 0.2)
    scores = tensor(*logps).requires_grad_()
    order = scores[0, [1, 2, 0]]
    (order - order.flip(0).logcumsumexp(0).flip(0)).sum().backward()
    torch.testing.assert_close(plackett_luce(ranked), scores.grad)


def test_plackett_luce_does_not_draw_ties_against_each_other():
    assert_near(plackett_luce(feed([1.0, 1.0, 0.0], [0, 1, 2])), 0.5, 0.5, -1.0)
    assert_near(plackett_luce(feed([1.0, 1.0, 1.0], [0, 1, 2])), 0.0, 0.0, 0.0)


def test_a_baseline_without_oneself_changes_nothing_but_the_size():
    values = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(values), centred(values) * 8 / 7)
    assert_near(leave_one_out(tensor(1.0, 0.0, 0.5)), 0.75, -0.75, 0.0)


def test_gopo_is_the_win_rate():
    scores = torch.tensor([[3, 1, 2, 2, 7, 5, 5, 5], [1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.float64)
    ranked = Feed(ranks_of(scores), scores, scores, scores, torch.arange(8).expand(2, 8))
    wins = torch.tensor([[3, 0, 1, 1, 7, 4, 4, 4], range(8)])
    losses = torch.tensor([[4, 7, 5, 5, 0, 1, 1, 1], range(7, -1, -1)])
    torch.testing.assert_close(USES["gopo"](ranked).double(), 2 / 7 * (wins - losses).double())
    torch.testing.assert_close(USES["win rate"](ranked), unit((wins - losses).double()), rtol=0, atol=1e-5)


def test_with_two_levels_all_that_is_divided_is_the_z_score():
    scores = tensor(0.9, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9, 0.9)
    ranked = Feed(ranks_of(scores), scores, scores, scores, torch.tensor([[0, 0, 2, 0, 0, 2, 0, 0]]))
    z = unit(centred(scores))
    same = ("grpo (z-score)", "grpo_rank oracle", "rlrr", "win rate", "normal scores", "levels, divided")
    for name in (*same, "discount 2^-k", "texts share a place"):
        torch.testing.assert_close(USES[name](ranked).double(), z, rtol=0, atol=1e-4, msg=name)
    for name in ("levels", "gopo", "oracle, undivided"):
        assert not torch.allclose(USES[name](ranked).double(), z, atol=1e-2), name


def test_normal_scores_are_quantiles():
    assert normal(0) == pytest.approx(1.2206403)  # of 8 / 9
    assert normal(7) == pytest.approx(-normal(0))
    assert normal(0, count=1) == 0.0


def test_by_levels_divides_by_the_spread_of_the_levels():
    # Around the mean of the samples the levels stand at 1/4 and -3/4 of the gap; the mean of the squares is 5/16 of it.
    near, far = math.sqrt(1 / 5), math.sqrt(9 / 5)
    assert_near(by_levels(LOPSIDED), near, near, -far, near)


def test_soft_comparisons_measure_in_the_median_difference():
    # Differences 1, 2 and 3, each twice: the median is 2.
    one, two, three = (math.tanh(x / 2) for x in (1.0, 2.0, 3.0))
    assert_near(
        soft(feed([0.0, 1.0, 3.0], [0, 1, 2])), -(one + three) / 3, (one - two) / 3, (two + three) / 3
    )


def test_a_rank_error_counts_where_the_oracle_is_sure_alone():
    # The policy takes the best for the last and the last for the best; the middle is right either way.
    ranked = feed([1.0, 0.5, 0.0], [0, 1, 2], [-3.0, -2.0, -1.0])
    gains, mean = tensor(1.0, SECOND, THIRD), (1 + SECOND + THIRD) / 3
    error = 1 - THIRD
    expected = (gains - mean) * tensor(1 + error, 1.0, 1 + error)
    assert_near(certain(ranked), *(expected - expected.mean())[0].tolist())
    swapped = feed([1.0, 0.5, 0.4, 0.0], [0, 1, 2, 3], [-1.0, -3.0, -2.0, -4.0])
    assert_near(certain(swapped), *centred(shared(paper, swapped.ranks))[0].tolist())


def verdicts(ranks: list[int], judged: list[bool] | None = None) -> Verdicts:
    members = None if judged is None else torch.tensor([judged])
    return Verdicts(torch.tensor([ranks]), members, None, torch.zeros(1, len(ranks)))


def test_levels_by_hand():
    gap = 4 * (1 - SECOND)
    found = Levels(AlgorithmOptions()).advantages(verdicts([3, 3, 7, 3])).advantages
    assert_near(found, gap / 4, gap / 4, -3 * gap / 4, gap / 4)
    mean = (1 + 2 * SECOND + THIRD) / 4
    found = Levels(AlgorithmOptions()).advantages(verdicts([1, 0, 2, 1])).advantages
    assert_near(found, *(4 * (gain - mean) for gain in (SECOND, 1.0, THIRD, SECOND)))


def test_trusted_levels_weigh_a_group_by_the_responses_on_top():
    gap = 5 * (1 - SECOND)
    algorithm = TrustedLevels(AlgorithmOptions())
    assert_near(
        algorithm.advantages(verdicts([0, 0, 0, 1])).advantages, *[gap / 4 * 3 / 4] * 3, -3 * gap / 4 * 3 / 4
    )
    assert_near(algorithm.advantages(verdicts([0, 1, 1, 1])).advantages, 3 * gap / 4 / 2, *[-gap / 4 / 2] * 3)


@pytest.mark.parametrize("algorithm", [Levels, TrustedLevels])
def test_levels_leave_out_what_was_not_judged_and_groups_that_tie(algorithm):
    judge = algorithm(AlgorithmOptions())
    whole = judge.advantages(verdicts([0, 5, 5])).advantages[0].tolist()
    part = judge.advantages(verdicts([0, 0, 5, 5], [False, True, True, True])).advantages[0].tolist()
    assert part == pytest.approx([0.0, *whole])
    assert judge.advantages(verdicts([4, 4, 4])).advantages.tolist() == [[0.0, 0.0, 0.0]]


def known(clean: list[float], texts: list[int]) -> Groups:
    rows = tensor(*clean)
    return Groups([], rows, rows, rows, torch.tensor([texts]))


def test_figures_of_an_advantage_by_hand():
    groups = known([1.0, 1.0, 0.2, 0.2], [0, 0, 2, 3])
    right_way = measure(tensor(0.1, 0.1, -0.1, -0.1)[None], groups)
    assert right_way["cos"] == pytest.approx(1.0) and right_way["right"] == pytest.approx(1.0)
    assert right_way["waste"] == 0.0 and right_way["snr"] == math.inf
    # Added up by text: a = 2, -2, 0 and c = 0.8, -0.4, -0.4; of the squares of a, 2 of 4 part the two that tie.
    found = measure(tensor(1.0, 1.0, -2.0, 0.0)[None], groups)
    assert found["cos"] == pytest.approx(2.4 / math.sqrt(8 * 0.96))
    assert found["waste"] == pytest.approx(2 / 6)
    # <a, c> is 1.6 and then 0.8 over two draws of one group: mean 1.2, deviation 0.8 / sqrt(2).
    draws = torch.stack([tensor(1.0, 1.0, 0.0, 0.0), tensor(0.5, 0.5, 0.0, 0.0)])
    assert measure(draws, groups)["snr"] == pytest.approx(math.sqrt(48) * 1.2 / (0.8 / math.sqrt(2)))


def test_groups_ranked_alike_share_their_mean():
    clean = torch.tensor([[1.0, 0.0, 0.0], [0.4, 1.0, 0.4]], dtype=torch.float64)
    texts = torch.tensor([[0, 1, 1], [0, 1, 0]])
    groups = Groups([], clean, clean, clean, texts)
    found = ranked_alike([Feed(ranks_of(clean), clean, clean, clean, texts)], groups)
    # The best is 2/3 and 0.4 above the mean: 8/15; the others are -1/3 and -0.2: -4/15.
    expected = torch.tensor([[[8, -4, -4], [-4, 8, -4]]]).double() / 15
    torch.testing.assert_close(found, expected)


def test_made_up_groups_and_their_corruption_depend_on_the_seed_alone():
    one, again, other = made_up(20, 8, 1), made_up(20, 8, 1), made_up(20, 8, 2)
    assert torch.equal(one.clean, again.clean) and not torch.equal(one.clean, other.clean)
    assert all(len(set(row)) > 1 for row in one.texts.tolist())
    first, second = corrupted(one, "heavy_tails", 2)
    assert not torch.equal(first.scores, second.scores)
    assert torch.equal(first.scores, next(corrupted(again, "heavy_tails", 1)).scores)
    for feed in (first, second):  # equal texts stay equal
        assert torch.equal(feed.scores.gather(1, feed.texts), feed.scores)
    (exact,) = corrupted(one, "exact", 5)
    assert torch.equal(exact.scores, one.clean)


def test_evenly_spaced_ranks_survive_outliers_where_all_responses_differ():
    """A z-score hands an outlier sqrt(G - 1) and leaves next to nothing for the rest; a rank gives it one place."""
    groups = distinct(200, 16, 0)
    assert all(len(set(row)) == 16 for row in groups.texts.tolist())
    feeds = list(corrupted(groups, "outliers", 2))
    cosines = {
        name: measure(torch.stack([USES[name](feed) for feed in feeds]), groups)["cos"]
        for name in ("grpo (z-score)", "gopo", "normal scores")
    }
    assert cosines["gopo"] > cosines["grpo (z-score)"] + 0.2
    assert cosines["normal scores"] > cosines["grpo (z-score)"] + 0.2


def test_groups_of_a_run_are_scored_again(tmp_path):
    line = {
        "step": 1,
        "example_id": "a",
        "question": "what color is it?",
        "answer": "it is red.",
        "options": [],
        "metadata": {"form": "it is (red|blue)\\."},
        "responses": ["it is blue.", "it is red.", "it is blue.", "it is blue."],
        "policy_ranks": [0, 3, 0, 0],
    }
    unanimous = line | {"responses": ["it is red."] * 4}
    file = tmp_path / "rollouts.jsonl"
    file.write_text(json.dumps(line) + "\n" + json.dumps(unanimous) + "\n")
    groups = of_runs([file], 10, seed=0)
    assert groups.texts.tolist() == [[0, 1, 0, 0]]
    assert groups.clean[0, 1] == 1.0 and groups.clean[0, 0] == groups.clean[0, 2] < 0.9
    assert groups.order.tolist() == [[0, -3, 0, 0]]
    assert_near(groups.logps, *[math.log(0.75)], math.log(0.25), *[math.log(0.75)] * 2)


@pytest.mark.parametrize("given", [["--distinct"], ["--responses", "8"]])
def test_what_makes_up_groups_is_refused_beside_those_of_runs(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rank_uses", "--rollouts", str(tmp_path / "rollouts.jsonl"), *given])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert f"{given[0]}: not read with --rollouts; leave it out" in capsys.readouterr().err
