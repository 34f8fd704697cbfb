"""The table of answers that `bench/rank_bandit.py` learns: its gradient, its feedback, and that every use learns."""

import random

import pytest
import torch
from rank_bandit import SHOWN, corrupt, learn, policy_gradient


def test_the_gradient_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    drawn = torch.randint(0, 5, (3, 4), generator=generator)
    advantages = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    aim = (advantages * table.log_softmax(1).gather(1, drawn)).mean(1).sum()
    (expected,) = torch.autograd.grad(aim, table)
    torch.testing.assert_close(policy_gradient(table.detach(), drawn, advantages), expected)


@pytest.mark.parametrize("kind", ["exact", "heavy_tails", "flips", "outliers"])
def test_equal_answers_are_told_alike(kind):
    clean = torch.rand(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = torch.randint(0, 6, (50, 8), generator=torch.Generator().manual_seed(2))
    scores = corrupt(clean, drawn, kind, random.Random(3))
    alike = drawn[:, :, None] == drawn[:, None, :]
    assert (scores[:, :, None] == scores[:, None, :])[alike].all()
    assert torch.equal(scores, clean.gather(1, drawn)) is (kind == "exact")


@pytest.mark.parametrize("use", SHOWN)
def test_every_use_learns_and_repeats(use):
    curve = learn(use, "exact", 8, 3.0, seed=4, steps=15)
    assert len(curve) == 16 and curve[-1] > curve[0] + 0.05
    assert learn(use, "exact", 8, 3.0, seed=4, steps=15) == curve
