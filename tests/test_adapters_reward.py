"""An oracle as a reward function, and what importing the adapters loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rlaif_fast import rank_advantages
from rlaif_fast.errors import UsageError
from rlaif_fast.oracle import Ranking, ReferenceOracle, as_reward
from rlaif_fast.oracle.as_reward import gains

ANSWERS = ["7", "9", "no number", "7"]
CHAT = [[{"role": "user", "content": "How many?"}]] * 4


def expected(*ranks: int) -> list[float]:
    """What `kind="oracle"` says of the same ranks."""
    ranked = torch.tensor([ranks])
    return rank_advantages(torch.zeros(1, len(ranks), dtype=torch.float64), ranked, kind="oracle").advantages[
        0
    ]


def test_rewards_less_their_mean_are_the_advantages_of_the_ranks():
    rewards = as_reward(ReferenceOracle())(prompts=["q"] * 4, completions=ANSWERS, reference=["7"] * 4)
    rewards = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(rewards - rewards.mean(), expected(0, 1, 2, 0), rtol=1e-12, atol=1e-12)


def test_every_trainers_way_to_call_gives_the_same():
    oracle = ReferenceOracle()
    trl = as_reward(oracle)(
        prompts=CHAT, completions=[[{"role": "assistant", "content": x}] for x in ANSWERS],
        completion_ids=[[1]] * 4, trainer_state=object(), reference=["7"] * 4,
    )  # fmt: skip
    swift = as_reward(oracle, reference="solution")(
        completions=ANSWERS, solution=["7"] * 4,
        messages=[[*chat, {"role": "assistant", "content": x}] for chat, x in zip(CHAT, ANSWERS)],
    )  # fmt: skip
    verl = as_reward(oracle, failed=0.0)(
        data_sources=["d"] * 4, solution_strs=ANSWERS, ground_truths=["7"] * 4,
        extra_infos=[{"question": "How many?"}] * 4,
    )  # fmt: skip
    assert trl == swift == verl
    assert trl[0] == trl[3] > trl[1] > trl[2]


def test_groups_are_equal_prompts_in_any_order_or_neighbours():
    reward = as_reward(ReferenceOracle())
    shuffled = reward(
        prompts=["a", "b", "a", "b"], completions=["1", "1", "2", "2"], reference=["1", "2"] * 2
    )
    assert shuffled == [1.0, gains(Ranking((0, 1)))[1], gains(Ranking((0, 1)))[1], 1.0]
    neighbours = as_reward(ReferenceOracle(), group_size=2)
    assert neighbours(prompts=["a"] * 4, completions=["1", "2", "2", "1"], reference=["1"] * 4) == [
        shuffled[0], shuffled[1], shuffled[1], shuffled[0],
    ]  # fmt: skip
    with pytest.raises(UsageError, match="3 responses are no whole groups of 2"):
        neighbours(prompts=["a"] * 3, completions=["1"] * 3)


def test_a_response_without_a_verdict_has_no_reward():
    assert gains(Ranking((0, None, 1)))[1] is None
    without_reference = {"prompts": ["a", "a"], "completions": ["1", "2"]}
    assert as_reward(ReferenceOracle())(**without_reference) == [None, None]
    assert as_reward(ReferenceOracle(), failed=0.0)(**without_reference) == [0.0, 0.0]


def test_prompts_are_needed():
    with pytest.raises(UsageError, match="needs prompts and completions"):
        as_reward(ReferenceOracle())(completions=["1"])


def test_nothing_is_imported_unless_asked_for():
    code = (
        "import sys, rlaif_fast, rlaif_fast.adapters\n"
        "print(sorted({'trl', 'liger_kernel', 'transformers', 'verl'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
