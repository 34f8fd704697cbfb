"""Rows and what trainers say of them: each is ranked, left out for a reason, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlaif_fast import rank_advantages
from rlaif_fast.adapters import ms_swift, openrlhf, prime_rl, rllm, skyrl, slime
from rlaif_fast.adapters.ranking import RowRanker, mean_logps
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import Ranking, as_reward

NAN = float("nan")
TEXTS = ["a", "b", "c"]


class InOrder:
    """Ranks as sampled; `cut` changes what it returns."""

    name = "in order"

    def __init__(self, cut=lambda rankings: rankings):
        self.cut = cut

    def rank(self, requests):
        return self.cut([Ranking(tuple(range(len(request.responses)))) for request in requests])


MAKERS = {
    "rows": RowRanker,
    "ms-swift": lambda oracle, **options: ms_swift.ranked_trainer(object, oracle, **options),
    "openrlhf": lambda oracle, **options: openrlhf.experience_maker(object, oracle, **options),
    "rllm": rllm.estimator,
    "skyrl": lambda oracle, **options: skyrl.ranked_trainer(object, oracle, **options),
    "slime": slime.ranked_advantages,
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "zscore"}, r"kind must be one of 'directed', .*; got 'zscore'"),
        ({"kind": "bogus"}, "kind must be one of .*; got 'bogus'"),
        ({"scale": "batch"}, "scale must be one of 'none', 'group'; got 'batch'"),
        ({"penalty_weight": -1.0}, "penalty_weight must be finite and at least 0.0; got -1.0"),
        ({"kind": "oracle", "penalty_weight": 2.0}, "penalty_weight must be left out with kind='oracle'"),
    ],
)
def test_options_are_checked_where_a_ranker_is_made(maker, options, message):
    with pytest.raises(ValueError, match=message):
        MAKERS[maker](InOrder(), **options)


def rows(oracle, scores=None, **options):
    """The advantages of two groups of three."""
    scores = torch.tensor([-1.0, -2.0, -3.0] * 2) if scores is None else scores
    arguments = [0, 0, 0, 1, 1, 1], ["q"] * 6, TEXTS * 2, [None] * 6, scores
    return RowRanker(oracle, **options)(*arguments).advantages


CUTS = {
    "expected 2 rankings, got 1": lambda rankings: rankings[:1],
    "request 0: expected 3 ranks, got 2": lambda rankings: [Ranking((0, 1)), *rankings[1:]],
    "request 1: expected 3 ranks, got 4": lambda rankings: [rankings[0], Ranking((0, 1, 2, 3))],
    "request 1: expected ranks that are numbers or None": lambda rankings: [
        rankings[0],
        Ranking((0, NAN, 1)),
    ],
}


@pytest.mark.parametrize("message", CUTS)
def test_an_oracle_that_ranks_not_all_is_refused(message):
    oracle = InOrder(CUTS[message])
    with pytest.raises(UsageError, match=f"^oracle in order.*{message}"):
        rows(oracle)
    with pytest.raises(UsageError, match=f"^oracle in order.*{message}"):
        as_reward(oracle)(prompts=["p"] * 3 + ["q"] * 3, completions=TEXTS * 2)


@pytest.mark.parametrize("name", ["prompts", "responses", "reference", "scores", "images"])
def test_every_argument_has_one_value_a_row(name):
    columns = {"prompts": ["q"] * 3, "responses": TEXTS, "reference": [None] * 3, "scores": torch.zeros(3)}
    columns["images"] = [None] * 3
    columns[name] = columns[name][:2]
    *first, images = columns.values()
    with pytest.raises(ValueError, match=f"^{name} must have 3 values, one a row; got 2"):
        RowRanker(InOrder())([0] * 3, *first, {"images": images})


@pytest.mark.parametrize("kind", ["directed", "oracle", "paper"])
def test_a_response_without_a_token_is_not_judged(kind):
    scores = mean_logps(
        torch.tensor([[-3.0, -1], [-5, NAN], [NAN, NAN]]), torch.tensor([[1, 1], [1, 0], [0, 0]])
    )
    assert scores[:2].tolist() == [-2.0, -5.0] and scores[2].isnan()
    found = rows(InOrder(), torch.cat([scores, scores]), kind=kind)
    expected = rank_advantages(scores[None, :2], torch.tensor([[0, 1]]), kind=kind).advantages[0]
    torch.testing.assert_close(found, torch.cat([expected, torch.zeros(1)] * 2))


def test_a_log_probability_that_counts_is_a_number():
    with pytest.raises(ValueError, match="must not be NaN; got NaN in response 1 at token 0"):
        mean_logps(torch.tensor([[-1.0, NAN], [NAN, -1.0]]), torch.tensor([[1, 0], [1, 1]]))
    with pytest.raises(ValueError, match="must not be NaN"):
        RowRanker(InOrder()).scores([[-1.0], [NAN]], "")


def test_no_rows_are_no_advantages():
    assert RowRanker(InOrder())([], [], [], [], torch.zeros(0)).advantages.tolist() == []
    assert prime_rl.advantages(RowRanker(InOrder()), []) == []


def expected(*scores, kind="directed"):
    return (
        rank_advantages(torch.tensor([scores]), torch.tensor([[0, 1, 2]]), kind=kind).advantages[0].tolist()
    )


def samples(*logps, **changes):
    """slime's samples of one group."""
    return [
        SimpleNamespace(
            **{"group_index": 0, "prompt": "q", "response": text, "label": "a", "loss_mask": None, **changes},
            rollout_log_probs=row,
        )
        for text, row in zip(TEXTS, logps)
    ]


def test_slime_counts_the_tokens_that_are_trained():
    rollout = samples([-1.0, -1.0], [-3.0, -3.0, 0.0, 0.0, 0.0], [-2.0])
    rollout[1].loss_mask = [1, 1, 0, 0, 0]
    found = slime.ranked_advantages(InOrder())(None, rollout)[1]
    assert found == pytest.approx(expected(-1.0, -3.0, -2.0))
    rollout[1].loss_mask = [1, 1, 0]
    with pytest.raises(ValueError, match=r"Sample.loss_mask must have 5 values .* got 3"):
        slime.ranked_advantages(InOrder())(None, rollout)


def test_slime_without_log_probabilities():
    rollout = samples(None, [-1.0], [-2.0])
    with pytest.raises(ValueError, match=r'kind="directed" compares .* a sample has no rollout_log_probs'):
        slime.ranked_advantages(InOrder())(None, rollout)
    found = slime.ranked_advantages(InOrder(), kind="oracle")(None, rollout)[1]
    assert found == pytest.approx(expected(0.0, 0.0, 0.0, kind="oracle"))
    raw, found = slime.ranked_advantages(InOrder())(None, samples([], [-1.0], [-2.0]))
    assert found[0] == 0.0 and found[1] > 0 > found[2] and raw[0] == 1.0
    with pytest.raises(
        ValueError, match=r"Sample.group_index must say what is a group; got None in sample 0"
    ):
        slime.ranked_advantages(InOrder())(None, samples([-1.0], [-1.0], [-2.0], group_index=None))


def trace(text, *logps):
    """A trace of prime-rl's; each of `logps` is those of a sampled message."""
    asked = SimpleNamespace(sampled=False, logprobs=[], message=SimpleNamespace(role="user", content="q"))
    said = SimpleNamespace(role="assistant", content=text)
    nodes = [asked, *(SimpleNamespace(sampled=True, logprobs=row, message=said) for row in logps)]
    return SimpleNamespace(
        nodes=nodes, branches=[SimpleNamespace(nodes=nodes)], info={}, task=SimpleNamespace(data=None)
    )


def test_prime_rl_without_log_probabilities():
    traces = [trace("a", [-1.0]), trace("b", [-2.0], []), trace("c", [-0.5])]
    with pytest.raises(ValueError, match=r'kind="directed" compares .* a sampled message has no logprobs'):
        prime_rl.advantages(RowRanker(InOrder()), traces)
    found = prime_rl.advantages(RowRanker(InOrder(), kind="oracle"), traces)
    assert found == pytest.approx(expected(0.0, 0.0, 0.0, kind="oracle"))
    found = prime_rl.advantages(RowRanker(InOrder()), [trace("a"), trace("b", [-2.0]), trace("c", [-0.5])])
    assert found[0] == 0.0 and found[1] > 0 > found[2]


def test_rllm_without_a_token_or_a_step():
    trajectories = [
        SimpleNamespace(
            task={},
            steps=[SimpleNamespace(chat_completions=[], model_response=text, logprobs=row, response_ids=row)],
        )
        for text, row in zip(TEXTS, [[], [-2.0], [-0.5]])
    ]
    trajectories.append(SimpleNamespace(task={}, steps=[]))
    groups = [SimpleNamespace(trajectories=trajectories), SimpleNamespace(trajectories=trajectories[3:])]
    (found, empty), _ = rllm.estimator(InOrder())([], None, traj_groups=groups)
    assert found[0] == found[3] == 0.0 and found[1] > 0 > found[2]
    assert empty.tolist() == [0.0]


def test_a_batch_of_which_nothing_could_be_ranked_is_told_in_the_log(caplog):
    failing = InOrder(lambda rankings: [Ranking((None,) * 3, error="no judge")] * len(rankings))
    assert rows(failing).tolist() == [0.0] * 6
    assert caplog.messages == [
        "the oracle in order ranked none of the 2 groups of a batch; the last: no judge"
    ]
    caplog.clear()
    rows(InOrder(lambda rankings: [*rankings[:1], Ranking((None,) * 3, error="no judge")]))
    assert not caplog.messages
