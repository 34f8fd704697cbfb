"""rlaif_fast::rank_loss: log-probabilities -> loss, statistics and the gradients of logps and entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss import backends, reference
from rlaif_fast.loss.inputs import TokenGradients, TokenInputs
from rlaif_fast.loss.ops.scale import refuse_double_backward, refuse_transforms
from rlaif_fast.loss.options import STATS, LossOptions
from rlaif_fast.loss.schema import declare, flatten, unflatten


@torch.library.custom_op(
    "rlaif_fast::rank_loss",
    mutates_args=(),
    schema=f"(Tensor logps, Tensor? entropy, {declare(TokenInputs, LossOptions)}, str backend) "
    "-> (Tensor loss, Tensor advantages, Tensor stats, Tensor grad_logps, Tensor grad_entropy)",
)
def _rank_loss(logps, entropy, *arguments):
    inputs, options, backend = unflatten(arguments, TokenInputs, LossOptions)
    result: TokenGradients = backends.get("rank_loss", backend).rank_loss(logps, entropy, inputs, options)
    ranked = result.advantages if inputs.advantages is None else logps.new_empty(0)
    grad_entropy = result.grad_entropy
    if grad_entropy is None or entropy is None:
        grad_entropy = result.grad_logps.new_empty(0)
    return result.loss, ranked, result.stats, result.grad_logps, grad_entropy


@_rank_loss.register_fake
def _(logps, entropy, *arguments):
    inputs, _, _ = unflatten(arguments, TokenInputs, LossOptions)
    wide = torch.promote_types(logps.dtype, torch.float32)
    rows = logps.shape[0] if inputs.advantages is None else 0
    return (
        logps.new_empty((), dtype=wide),
        logps.new_empty(rows, dtype=wide if inputs.advantages is None else logps.dtype),
        logps.new_empty(len(STATS), dtype=wide),
        logps.new_empty(logps.shape, dtype=wide),
        logps.new_empty(logps.shape if entropy is not None else 0, dtype=wide),
    )


def _setup(ctx, inputs, output):
    logps, entropy = inputs[:2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], output[4])
    ctx.dtypes = logps.dtype, None if entropy is None else entropy.dtype
    ctx.count = len(inputs)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return tuple(None for _ in range(ctx.count))
    refuse_double_backward()
    grad_logps, grad_entropy = ctx.saved_tensors
    dtype, entropy_dtype = ctx.dtypes
    to_entropy = None if entropy_dtype is None else (grad_loss * grad_entropy).to(entropy_dtype)
    return (grad_loss * grad_logps).to(dtype), to_entropy, *(None for _ in range(ctx.count - 2))


torch.library.register_autograd("rlaif_fast::rank_loss", _backward, setup_context=_setup)


def rank_loss(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # (B, T)
    inputs: TokenInputs,
    options: LossOptions,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, advantages and statistics; differentiable in logps and entropy."""
    backend = backends.select("rank_loss", backend, logps, inputs.group_size)
    if backend == "reference":
        return reference.rank_loss(logps, entropy, inputs, options)
    refuse_transforms(logps, entropy)
    loss, ranked, stats, _, _ = _rank_loss(logps, entropy, *flatten(inputs, options), backend)
    return loss, ranked if inputs.advantages is None else inputs.advantages, stats
