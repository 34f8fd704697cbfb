"""The packed path beside the plain one: log-probs, entropies and gradients of both."""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.policy.policy import Policy
from rlaif_fast.policy.testing import make_responses, standard_prompts

# Relative l2. The two paths add the same terms in another order, so a few units in the last place over some
# hundred additions.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def passes(policy: Policy, case) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Hidden states, log-probabilities, entropies and the gradients of a weighted sum of the latter two."""
    prompts, ids, lengths, sizes = case
    policy.model.zero_grad()
    hidden = policy.response_hidden(prompts, ids, lengths, group_sizes=sizes)
    logps, entropies = policy.response_logps(prompts, ids, lengths, group_sizes=sizes, return_entropy=True)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, len(logps), generator=generator).to(logps)
    (logps * weights[0] + 0.1 * entropies * weights[1]).sum().backward()
    gradients = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    return hidden.detach(), logps.detach(), entropies.detach(), gradients


def assert_same(ours: Policy, plain: Policy, case) -> None:
    hidden, logps, entropies, gradients = passes(ours, case)
    expected = passes(plain, case)
    dtype = hidden.dtype
    assert hidden.shape == (int(case[2].sum()), ours.head_weight.shape[1])
    for name, a, b in zip(("hidden", "logps", "entropies"), (hidden, logps, entropies), expected):
        assert distance(a, b) < (TOLERANCE[dtype] if name == "hidden" else TOLERANCE[torch.float32]), name
    assert gradients.keys() >= expected[3].keys()
    for name, gradient in gradients.items():
        reference = expected[3].get(name, torch.zeros_like(gradient))
        assert distance(gradient, reference) < TOLERANCE[torch.float32], name


def standard_case(family: str):
    prompts = standard_prompts(family)
    sizes = [3, 1, 4, 2, 3]
    ids, lengths = make_responses([5, 1, 7, 4, 2, 2, 9, 1, 3, 6, 8, 8, 2])
    return prompts, ids, lengths, sizes
