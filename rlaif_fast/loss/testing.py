"""What tests and benchmarks of the losses share: random problems, one table of tolerances, error measures.

Letters: N groups, G responses a group, B = N * G, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest errors against the float64 reference on the same (rounded) inputs, and why.

    Attributes:
        value: Relative error of loss, advantages and log-probabilities.
        gradient: Relative l2 error of a gradient.
        reason: Why.
    """

    value: float
    gradient: float
    reason: str


TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-9, "float64 throughout"),
    torch.float32: Tolerance(1e-5, 1e-5, "float32 sums over V, and of ratios and KL over tokens"),
    torch.bfloat16: Tolerance(1e-4, 4e-3, "inputs exact, statistics in float32; gradients round to 8 bits"),
    torch.float16: Tolerance(1e-4, 4e-3, "inputs exact, statistics in float32; gradients round to 11 bits"),
}


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in float64; NaN where either has one, absolute where expected
    is 0.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm()
    return float((actual - expected).norm() / (norm if norm > 0 else 1.0))


def relative(actual: Tensor, expected: Tensor, scale: float = 1.0) -> float:
    """Return the largest |actual - expected| / max(scale, |expected|)."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if actual.numel() == 0:
        return 0.0
    return float(((actual - expected).abs() / expected.abs().clamp(min=scale)).max())


@dataclass(frozen=True)
class Problem:
    """A random batch; float tensors are of `dtype`, and the log-probabilities float32 or wider.

    Attributes:
        tensors: `old_logps`, `ref_logps`, `mask`, ... as the losses take them.
    """

    logits: Tensor  # (B, T, V)
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor  # (V,)
    token_ids: Tensor  # (B, T)
    logps: Tensor  # (B, T)
    entropy: Tensor  # (B, T)
    oracle_ranks: Tensor  # (N, G)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def double(self) -> Problem:
        """Return the same values in float64."""
        return self.each(lambda x: x.double() if x.is_floating_point() else x)

    def each(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """Return the batch with every tensor changed."""
        names = [name for name in self.__dataclass_fields__ if name != "tensors"]
        fields: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return Problem(**fields, tensors={name: change(x) for name, x in self.tensors.items()})


def random_problem(
    *,
    N: int = 3,
    G: int = 4,
    T: int = 7,
    V: int = 33,
    H: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    drift: float = 0.3,
    device: str = "cpu",
) -> Problem:
    """Draw a batch with ragged masks, tied ranks, and old and reference policies `drift` away from the
    current one.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    B = N * G
    hidden = normal(B, T, H).to(dtype)
    weight = normal(V, H, scale=2 * H**-0.5).to(dtype)
    bias = normal(V, scale=0.3).to(dtype)
    token_ids = torch.randint(0, V, (B, T), generator=generator)
    logits = normal(B, T, V, scale=2.0).to(dtype)
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    logps = log_p.gather(-1, token_ids[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    lengths[0] = T
    mask = torch.arange(T) < lengths[:, None]
    ranks = torch.randint(0, max(2, G - 1), (N, G), generator=generator)
    tensors = {
        "old_logps": (logps + normal(B, T, scale=drift)).to(wide),
        "ref_logps": (logps + normal(B, T, scale=drift)).to(wide),
        "mask": mask,
    }
    of_tokens = (token_ids, logps.to(wide), entropy.to(wide))
    problem = Problem(logits, hidden, weight, bias, *of_tokens, ranks, tensors)
    return problem.each(lambda x: x.to(device))
