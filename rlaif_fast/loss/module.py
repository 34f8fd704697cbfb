"""The loss as a module, its options fixed at construction."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from rlaif_fast.loss import backends, checks
from rlaif_fast.loss.api import (
    LossOutput,
    fused_linear_grpo_rank_loss,
    grpo_rank_loss,
    grpo_rank_loss_from_logits,
)
from rlaif_fast.loss.inputs import BATCH_TENSORS, LossArguments
from rlaif_fast.loss.options import check_choice, check_scaling

__all__ = ["GRPORankLoss"]


class GRPORankLoss(nn.Module):
    """The loss with its options fixed at construction.

    Args:
        temperature: Above 0; divides the logits, where the loss sees them.
        logit_softcap: Bounds the logits, where the loss sees them.
        logit_scale: Multiplies the logits, where the loss sees them.
        backend: "auto", "triton", "cpu" or "reference"; of hidden states also "cuda".
        **options: Every option of `grpo_rank_loss` that is not a tensor of the batch (`kind`, `beta`,
            `loss_type`, ...).

    Call it with the log-probabilities, the logits, or the hidden states and the weight, and the tensors of
    the batch:

        loss_fn = GRPORankLoss(beta=0.04, loss_type="dapo")
        loss_fn(logps, oracle_ranks=ranks, mask=mask)
        loss_fn(logits=logits, token_ids=ids, oracle_ranks=ranks, mask=mask)
        loss_fn(hidden=hidden, weight=head.weight, token_ids=ids, oracle_ranks=ranks, mask=mask)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        backend: str = "auto",
        **options: Unpack[LossArguments],
    ) -> None:
        super().__init__()
        tensors = [name for name in options if name in BATCH_TENSORS]
        if tensors:
            raise TypeError(
                f"{', '.join(tensors)} belong(s) to the call, not to the construction of GRPORankLoss"
            )
        unknown = [name for name in options if name not in LossArguments.__annotations__]
        if unknown:
            raise TypeError(f"GRPORankLoss has no option {', '.join(map(repr, unknown))}")
        checks.loss_options(options)
        check_choice("backend", backend, ("auto", *backends.NAMES))
        check_scaling(temperature, logit_softcap, logit_scale)
        self.scaling: dict[str, Any] = {
            "temperature": temperature, "logit_softcap": logit_softcap, "logit_scale": logit_scale
        }  # fmt: skip
        self.backend = backend
        self.options = options

    def forward(
        self,
        logps: Tensor | None = None,  # (B, T)
        oracle_ranks: Tensor | None = None,  # (N, G) or (B,)
        *,
        logits: Tensor | None = None,  # (B, T, V)
        hidden: Tensor | None = None,  # (B, T, H) or (M, H)
        weight: Tensor | None = None,  # (V, H)
        bias: Tensor | None = None,  # (V,)
        token_ids: Tensor | None = None,  # (B, T) or (M,)
        lengths: Tensor | None = None,  # (B,)
        entropy: Tensor | None = None,  # (B, T), with logps
        **arguments: Unpack[LossArguments],
    ) -> LossOutput:
        """Return the loss of exactly one of `logps`, `logits` and `hidden` (see the three functions)."""
        given = [
            name for name, x in (("logps", logps), ("logits", logits), ("hidden", hidden)) if x is not None
        ]
        if len(given) != 1:
            raise ValueError(f"exactly one of logps, logits and hidden must be given; got {given or 'none'}")
        of_form = {
            "logps": ["entropy"],
            "logits": ["token_ids"],
            "hidden": ["token_ids", "weight", "bias", "lengths"],
        }
        others = {
            "weight": weight,
            "bias": bias,
            "token_ids": token_ids,
            "lengths": lengths,
            "entropy": entropy,
        }
        unread = [name for name, x in others.items() if x is not None and name not in of_form[given[0]]]
        if unread:
            raise ValueError(f"{', '.join(unread)} must be None with {given[0]}")
        fixed = sorted(arguments.keys() & {*self.scaling, "backend"})
        if fixed:
            raise TypeError(
                f"{', '.join(fixed)} belong(s) to the construction of GRPORankLoss, not to the call"
            )
        merged: LossArguments = {**self.options, **arguments}
        if logps is not None:
            return grpo_rank_loss(logps, oracle_ranks, entropy=entropy, backend=self.backend, **merged)
        if token_ids is None:
            raise ValueError(f"token_ids must be given with {given[0]}; got None")
        if logits is not None:
            return grpo_rank_loss_from_logits(
                logits, token_ids, oracle_ranks, **self.scaling, backend=self.backend, **merged
            )
        assert hidden is not None
        if weight is None:
            raise ValueError("weight must be given with hidden; got None")
        return fused_linear_grpo_rank_loss(
            hidden,
            weight,
            token_ids,
            oracle_ranks,
            bias=bias,
            **self.scaling,
            lengths=lengths,
            backend=self.backend,
            **merged,
        )

    def extra_repr(self) -> str:
        """Show the options that were set, the scaling of logits and the backend."""
        shown = {**self.options, **self.scaling, "backend": self.backend}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
