"""The reference against cases worked out in float64 with the standard library alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlaif_fast import grpo_rank_loss, rank_advantages
from rlaif_fast.loss.reference import policy_scores

CASES = json.loads((Path(__file__).parent / "data" / "grpo_rank.json").read_text())
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_reference_matches_the_vectors(case):
    params = dict(case["params"])
    params["epsilon"] = params.pop("epsilon_low")
    mask = tensor(case["mask"], torch.bool)
    old, ranks = tensor(case["old_logps"]), tensor(case["oracle_ranks"])
    loss, advantages, stats = grpo_rank_loss(
        tensor(case["logps"]),
        ranks,
        old_logps=old,
        ref_logps=tensor(case["ref_logps"]),
        mask=mask,
        max_completion_length=case["max_completion_length"],
        backend="reference",
        **params,
    )
    expect = case["expect"]
    torch.testing.assert_close(advantages, tensor(expect["advantages"]), **TOLERANCE)
    torch.testing.assert_close(loss, tensor(expect["loss"]), **TOLERANCE)
    torch.testing.assert_close(stats["kl"], tensor(expect["kl"]), **TOLERANCE)
    clip = stats["clip_low"] + stats["clip_high"]
    torch.testing.assert_close(clip, tensor(expect["clip_fraction"]), **TOLERANCE)

    ranking = rank_advantages(
        policy_scores(old, mask, case["group_size"], params["score"]),
        ranks,
        kind=params["kind"],
        penalty_weight=params["penalty_weight"],
        scale=params["scale"],
        backend="reference",
    )
    torch.testing.assert_close(ranking.advantages.flatten(), tensor(expect["advantages"]), **TOLERANCE)
    torch.testing.assert_close(ranking.penalties.flatten(), tensor(expect["penalty"]), **TOLERANCE)
