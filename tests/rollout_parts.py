"""What two rollouts of equal draws have in common."""

from __future__ import annotations

import torch

from rlaif_fast.rollout.base import Rollout


def assert_same(ours: Rollout, plain: Rollout) -> None:
    assert torch.equal(ours.token_ids, plain.token_ids)
    assert torch.equal(ours.mask, plain.mask)
    assert torch.equal(ours.finished, plain.finished)
    assert ours.texts == plain.texts
    torch.testing.assert_close(ours.logps, plain.logps, rtol=1e-4, atol=1e-5)
