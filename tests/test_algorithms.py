"""Algorithms: their advantages against the formulas, what they refuse, and how another package adds one."""

import re
from types import SimpleNamespace

import pytest
import torch

from rlaif_fast import rank_advantages
from rlaif_fast.algorithms import ALGORITHMS, AlgorithmOptions, Verdicts, make_algorithm
from rlaif_fast.algorithms.group import Group, for_the_log, verdicts_of
from rlaif_fast.algorithms.registry import find_algorithm
from rlaif_fast.data.schema import Example
from rlaif_fast.errors import RlaifFastError, UsageError
from rlaif_fast.oracle.base import Ranking
from rlaif_fast.prompts.encoder import Prompt
from rlaif_fast.trainer.options import TrainConfig
from rlaif_fast.trainer.rollout_log import rollout_records, rollout_stats

REWARDS = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3]])
RANKS = torch.tensor([[0, 2, 1, 1], [0, 0, 0, 0]])
OWN_LOSS = ("online_dpo", "dpo", "lipo", "ppo_rm")  # their losses do not take the advantages that are logged
POLICY = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -4.0]])


def verdicts(algorithm, judged=None, weights=None):
    return Verdicts(RANKS if algorithm.feedback == "ranks" else REWARDS, judged, weights, POLICY)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_centres_and_learns_nothing_from_ties(name):
    algorithm = make_algorithm(AlgorithmOptions(algorithm=name))
    result = algorithm.advantages(verdicts(algorithm))
    assert result.has_signal.tolist() == [True, False]
    assert result.advantages[1].tolist() == [0.0] * 4
    torch.testing.assert_close(result.advantages.sum(1), torch.zeros(2), atol=1e-6, rtol=0)
    best, worst = result.advantages[0].argmax(), result.advantages[0].argmin()
    assert (best, worst) == (0, 1)
    # The figures of agreement are of the two orders alone.
    expected = rank_advantages(POLICY, RANKS)
    assert torch.equal(result.ndcg, expected.ndcg)
    assert torch.equal(result.kendall_tau, expected.kendall_tau)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_judged_part_of_a_group_is_a_smaller_group_and_weights_multiply(name):
    algorithm = make_algorithm(AlgorithmOptions(algorithm=name))
    judged = torch.tensor([[True, True, False, True], [True, False, False, False]])
    part = algorithm.advantages(verdicts(algorithm, judged, torch.tensor([0.5, 1.0])))
    kept = verdicts(algorithm).feedback[:1, [0, 1, 3]]
    smaller = algorithm.advantages(Verdicts(kept, None, None, POLICY[:1, [0, 1, 3]]))
    torch.testing.assert_close(part.advantages[0, [0, 1, 3]], 0.5 * smaller.advantages[0])
    assert part.advantages[0, 2] == 0 and part.advantages[1].tolist() == [0.0] * 4
    assert part.has_signal.tolist() == [True, False]
    torch.testing.assert_close(part.kendall_tau[0], smaller.kendall_tau[0])


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in OWN_LOSS])
def test_the_loss_gets_the_advantages_that_are_logged(name):
    torch.manual_seed(0)
    algorithm = make_algorithm(AlgorithmOptions(algorithm=name, beta=0.0))
    judged = torch.tensor([[True, True, False, True], [True, True, True, True]])
    given = verdicts(algorithm, judged, torch.tensor([0.5, 1.0]))
    output = algorithm.loss(
        torch.randn(16, 4),
        torch.randn(7, 4),
        torch.arange(16) % 7,
        lengths=torch.full((8,), 2),
        **algorithm.loss_inputs(given),
    )
    assert torch.equal(output.advantages, algorithm.advantages(given).advantages.flatten())


def test_grpo_is_the_z_score_and_its_older_name():
    plain = make_algorithm(AlgorithmOptions(algorithm="grpo", scale="none"))
    first = REWARDS[:1]
    expected = (first - first.mean()) / (first.std() + 1e-4)
    torch.testing.assert_close(plain.advantages(Verdicts(first, None, None, POLICY[:1])).advantages, expected)
    older = make_algorithm(AlgorithmOptions(advantage="zscore", scale="none"))
    assert type(older) is type(plain)
    whole = verdicts(plain)
    assert torch.equal(older.advantages(whole).advantages, plain.advantages(whole).advantages)


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), float("nan"), 1e39, None])
def test_a_score_that_no_float32_holds_is_the_oracle_s_fault_and_not_the_learning_rate_s(score):
    ranking = Ranking((0, 1, 2), scores=(0.5, 0.25, score))
    with pytest.raises(RlaifFastError, match=f"gave it the score {re.escape(str(score))}; expected"):
        verdicts_of([ranking], POLICY[:1, :3], make_algorithm(AlgorithmOptions(algorithm="grpo")))
    unranked = Ranking((0, 1, None), scores=(0.5, 0.25, score))  # what stands there is not read
    found = verdicts_of([unranked], POLICY[:1, :3], make_algorithm(AlgorithmOptions(algorithm="grpo")))
    assert found.judged.tolist() == [[True, True, False]]


def test_rloo_compares_with_the_mean_of_the_others():
    algorithm = make_algorithm(AlgorithmOptions(algorithm="rloo"))
    advantages = algorithm.advantages(verdicts(algorithm)).advantages
    for i in range(4):
        others = [REWARDS[0, j].item() for j in range(4) if j != i]
        assert advantages[0, i].item() == pytest.approx(REWARDS[0, i].item() - sum(others) / 3, abs=1e-6)


def test_gopo_spaces_ranks_evenly_and_ties_share():
    algorithm = make_algorithm(AlgorithmOptions(algorithm="gopo"))
    spaced = algorithm.advantages(Verdicts(torch.tensor([[3, 0, 7, 4]]), None, None, POLICY[:1])).advantages
    torch.testing.assert_close(spaced, torch.tensor([[2 / 3, 2.0, -2.0, -2 / 3]]))
    shared = algorithm.advantages(Verdicts(RANKS[:1], None, None, POLICY[:1])).advantages
    torch.testing.assert_close(shared, torch.tensor([[2.0, -2.0, 0.0, 0.0]]))


@pytest.mark.parametrize("scale", ["none", "group"])
def test_rlrr_is_linear_in_the_level(scale):
    algorithm = make_algorithm(AlgorithmOptions(algorithm="rlrr", scale=scale))
    got = algorithm.advantages(Verdicts(torch.tensor([[4, 0, 4, 1, 9]]), None, None, torch.zeros(1, 5)))
    rewards = torch.tensor([1 / 3, 1.0, 1 / 3, 2 / 3, 0.0])  # of four levels
    expected = rewards - rewards.mean()
    if scale == "group":
        expected = expected / rewards.std(correction=0)
    torch.testing.assert_close(got.advantages[0], expected)


def test_odrpo_adds_up_one_normalised_verdict_a_threshold():
    algorithm = make_algorithm(AlgorithmOptions(algorithm="odrpo"))
    got = algorithm.advantages(Verdicts(torch.tensor([[4, 0, 4, 1, 9]]), None, None, torch.zeros(1, 5)))
    expected = torch.zeros(5)
    for threshold in (0, 1, 4):  # the ranks that a response can reach and another miss
        reached = (torch.tensor([4, 0, 4, 1, 9]) <= threshold).float()
        expected += (reached - reached.mean()) / reached.std(correction=0)
    torch.testing.assert_close(got.advantages[0], expected)


@pytest.mark.parametrize(
    ("ranks", "pair"),
    [
        ((1, 0, 2, 2), (1, 2)),
        ((0, 0, 1, 1), (0, 2)),
        ((None, 3, 0, None), (2, 1)),
        ((0, 0, 0, 0), ()),
        ((None, 1, 1, None), ()),
    ],
)
def test_online_dpo_takes_the_best_and_the_worst(ranks, pair):
    algorithm = make_algorithm(AlgorithmOptions(algorithm="online_dpo"))
    assert tuple(algorithm.learns_from(Ranking(ranks))) == pair
    judged = torch.tensor([[rank is not None for rank in ranks]])
    known = torch.tensor([[rank or 0 for rank in ranks]])
    logged = algorithm.advantages(Verdicts(known, judged, None, POLICY[:1])).advantages[0]
    assert logged.tolist() == [(i in pair[:1]) - float(i in pair[1:]) for i in range(4)]


def test_lipo_labels_are_rates_of_wins():
    algorithm = make_algorithm(AlgorithmOptions(algorithm="lipo"))
    judged = torch.tensor([[True, True, True, True], [True, False, True, True]])
    given = Verdicts(torch.tensor([[3, 0, 3, 1], [2, 0, 1, 0]]), judged, None, POLICY)
    expected = torch.tensor([[1 / 6, 1.0, 1 / 6, 2 / 3], [0.0, 0.0, 0.5, 1.0]])
    torch.testing.assert_close(algorithm.loss_inputs(given)["labels"], expected)


def test_a_bound_on_the_ratio_leaves_room_for_a_policy_that_has_not_moved():
    with pytest.raises(UsageError, match=r"delta: expected 1 or more, got 0\.9"):
        TrainConfig(delta=0.9)


def test_beta_is_the_kl_s_or_dpo_s():
    assert make_algorithm(AlgorithmOptions()).beta == 0.01
    assert make_algorithm(AlgorithmOptions(algorithm="online_dpo")).beta == 0.1
    assert make_algorithm(AlgorithmOptions(algorithm="lipo", beta=0.05)).beta == 0.05
    assert make_algorithm(AlgorithmOptions(algorithm="lipo")).extra_models == ("reference",)
    with pytest.raises(UsageError, match="beta: expected a positive number, got 0"):
        TrainConfig(algorithm="online_dpo", beta=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "grpo", "penalty_weight": 2.0}, "penalty_weight: grpo"),
        ({"algorithm": "grpo", "advantage": "oracle"}, "advantage: grpo"),
        ({"algorithm": "rloo", "scale": "none"}, "scale: rloo"),
        ({"algorithm": "gopo", "advantage": "paper"}, "advantage: gopo"),
        ({"advantage": "oracle", "penalty_weight": 0.5}, "penalty_weight: grpo_rank with advantage oracle"),
        ({"advantage": "zscore", "penalty_weight": 0.5}, "penalty_weight: grpo_rank with advantage zscore"),
        ({"algorithm": "odrpo", "scale": "none"}, "scale: odrpo does not read it, got 'none'"),
        ({"algorithm": "online_dpo", "epsilon": 0.1}, "epsilon: online_dpo does not read it, got 0.1"),
        (
            {"algorithm": "lipo", "sampling_ratio_cap": 3.0},
            "sampling_ratio_cap: lipo does not read it, got 3.0",
        ),
        ({"algorithm": "lipo", "mask_truncated_completions": True}, "mask_truncated_completions: lipo"),
        ({"algorithm": "grpo_rnk"}, "unknown algorithm 'grpo_rnk'; did you mean 'grpo_rank'"),
    ],
)
def test_what_an_algorithm_would_ignore_is_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**options)


def test_the_loss_takes_the_options(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    inputs = {
        "advantages": torch.tensor([1.0, -1.0]),
        "lengths": torch.tensor([2, 3]),
        "num_items_in_batch": 2.0,
        "ref_logps": torch.full((5,), -1.5),
    }
    losses = [
        make_algorithm(AlgorithmOptions(beta=beta, loss_type=kind)).loss(
            hidden, weight, torch.arange(5), **inputs
        )
        for beta, kind in ((0.0, "grpo"), (0.5, "grpo"), (0.0, "dr_grpo"))
    ]
    assert len({round(output.loss.item(), 6) for output in losses}) == 3
    assert make_algorithm(AlgorithmOptions(beta=0.0)).extra_models == ()
    assert make_algorithm(AlgorithmOptions(beta=0.1)).extra_models == ("reference",)


SIGN_ALGORITHM = (
    "from rlaif_fast import rank_advantages\n"
    "from rlaif_fast.algorithms import GroupAlgorithm\n"
    "class Sign(GroupAlgorithm):\n"
    "    feedback = 'scores'\n"
    "    @classmethod\n"
    "    def ignores(cls, options):\n"
    "        return ('scale',)\n"
    "    def advantages(self, verdicts):\n"
    "        found = rank_advantages(verdicts.scores, verdicts.feedback, kind='zscore')\n"
    "        return found._replace(advantages=found.advantages.sign())\n"
)


def test_another_package_adds_one_through_the_entry_point_group(tmp_path, monkeypatch):
    (tmp_path / "sign_algorithm.py").write_text(SIGN_ALGORITHM)
    meta = tmp_path / "sign_algorithm-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: sign-algorithm\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[rlaif_fast.algorithms]\nsign = sign_algorithm:Sign\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = TrainConfig(algorithm="sign")
    assert find_algorithm(config).feedback == "scores"
    assert make_algorithm(config).advantages(Verdicts(REWARDS, None, None, POLICY)).advantages[
        0
    ].tolist() == [1, -1, 0, 0]
    with pytest.raises(UsageError, match="scale: sign"):
        TrainConfig(algorithm="sign", scale="none")


def test_a_file_that_is_no_package_is_named_by_its_place(tmp_path, monkeypatch):
    (tmp_path / "sign_by_place.py").write_text(SIGN_ALGORITHM)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = TrainConfig(algorithm="sign_by_place:Sign")
    found = make_algorithm(config).advantages(Verdicts(REWARDS, None, None, POLICY))
    assert found.advantages[0].tolist() == [1, -1, 0, 0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_file:Sign", "No module named 'no_such_file'"),
        ("rlaif_fast.algorithms.gopo:NoSuch", "has no attribute 'NoSuch'"),
        (":Sign", "got ':Sign'"),
    ],
)
def test_a_place_with_nothing_to_import_is_refused(name, reason):
    with pytest.raises(UsageError, match=f"algorithm: expected 'module:Name'.*{reason}"):
        TrainConfig(algorithm=name)


def test_what_another_process_logs_has_no_pixels_whatever_made_the_prompt():
    ids, inputs = torch.arange(3), {"pixel_values": torch.zeros(1, 3, 8, 8)}
    group = Group(
        prompt=Prompt(ids, inputs=inputs, example=Example(id="a", question="?")),
        texts=("x", "y"),
        token_ids=((1,), (2,)),
        finished=(True, True),
        logps=torch.zeros(2),
        sampling_ratio=None,
        ranking=Ranking((0, 1)),
        has_signal=True,
        scores=torch.tensor([-1.0, -2.0]),
        advantages=torch.tensor([0.5, -0.5]),
        agreement=torch.ones(2),
    )
    (copy,) = for_the_log([group])
    assert copy.prompt.inputs is None and not len(copy.prompt.input_ids)
    assert copy.prompt.example is group.prompt.example
    assert torch.equal(copy.advantages, group.advantages) and torch.equal(copy.scores, group.scores)


def test_a_rollout_is_recorded_with_the_policy_s_own_order():
    example = Example(id="0", question="?", answer=None)
    group = SimpleNamespace(
        prompt=SimpleNamespace(example=example, clips=()),
        texts=("a", "b", "c"),
        token_ids=((1,), (2, 3), (4, 5, 6)),
        finished=(True, True, False),
        ranking=Ranking((1, 0, 2)),
        has_signal=True,
        scores=torch.tensor([-2.0, -1.0, -3.0]),
        advantages=torch.zeros(3),
        agreement=torch.tensor([0.5, float("nan")]),
    )
    (record,) = rollout_records([group], 4)
    assert (record["step"], record["policy_ranks"]) == (4, [1, 0, 2])
    assert rollout_stats([group], None, asked=False)["top1_agreement"] == 1.0


def test_a_group_is_weighed_by_the_oracle_s_confidence():
    algorithm = make_algorithm(AlgorithmOptions(weight_by_confidence=True))
    rankings = [Ranking((0, 1), confidence=0.25), Ranking((1, 0), confidence=0.75)]
    assert verdicts_of(rankings, torch.zeros(2, 2), algorithm).weights.tolist() == [0.25, 0.75]
