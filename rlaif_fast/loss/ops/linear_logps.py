"""Log-probability and entropy of tokens from hidden states, a chunk of logits at a time.

rlaif_fast::linear_stats   hidden states -> log-probability, logsumexp and entropy
rlaif_fast::linear_grad    its backward, makes the logits again
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss import backends, reference
from rlaif_fast.loss.inputs import Head, Needs, RowStats, Scaling
from rlaif_fast.loss.schema import declare, flatten, unflatten


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would for the matmul of the head."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def in_dtype(gradients: Any, of: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Round each gradient to the dtype of what it belongs to; an operator returns no None, but an empty
    tensor."""
    like = of[0]
    assert like is not None
    return tuple(
        like.new_empty(0) if grad is None or x is None else grad.to(x.dtype) for grad, x in zip(gradients, of)
    )


def fake_gradients(*pairs: tuple[Tensor | None, bool]) -> tuple[Tensor, ...]:
    """Return what `in_dtype` does, without values."""
    like = pairs[0][0]
    assert like is not None
    return tuple(
        like.new_empty(0) if x is None or not need else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x, need in pairs
    )


@torch.library.custom_op(
    "rlaif_fast::linear_stats",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, {declare(Scaling)}, "
    "int? chunk_size, str backend) -> (Tensor logps, Tensor lse, Tensor entropy)",
)
def _linear_stats(hidden, weight, bias, token_ids, *arguments):
    scaling, chunk_size, backend = unflatten(arguments, Scaling)
    module = backends.get("linear_loss", backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return tuple(module.linear_stats(hidden, Head(weight, bias, scaling), token_ids, chunk_size))


@_linear_stats.register_fake
def _(hidden, weight, bias, token_ids, *_):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(token_ids.shape, dtype=wide) for _ in range(3))


@torch.library.custom_op(
    "rlaif_fast::linear_grad",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, {declare(Scaling)}, "
    "int? chunk_size, Tensor lse, Tensor entropy, Tensor grad_logps, Tensor grad_entropy, bool need_hidden, "
    "bool need_weight, bool need_bias, str backend) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
def _linear_grad(hidden, weight, bias, token_ids, *arguments):
    scaling, chunk_size, lse, entropy, grad_logps, grad_entropy, *needs, backend = unflatten(
        arguments, Scaling
    )
    module = backends.get("linear_loss", backend)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = module.linear_grad(
            hidden,
            Head(weight, bias, scaling),
            token_ids,
            RowStats(lse, lse, entropy),
            grad_logps.contiguous(),
            grad_entropy.contiguous(),
            chunk_size,
            Needs(*needs),
        )
    return in_dtype(gradients, (hidden, weight, bias))


@_linear_grad.register_fake
def _(hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-4:-1]
    return fake_gradients((hidden, need_hidden), (weight, need_weight), (bias, need_bias))


def _setup(ctx, inputs, output):
    hidden, weight, bias, token_ids, temperature, temperatures, softcap, scale, chunk_size, backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, bias, token_ids, temperatures, lse, entropy)
    ctx.rest = temperature, softcap, scale, chunk_size, backend


def _backward(ctx, grad_logps, _, grad_entropy):
    *head_inputs, temperatures, lse, entropy = ctx.saved_tensors
    temperature, softcap, scale, chunk_size, backend = ctx.rest
    scaling = (temperature, temperatures, softcap, scale)
    needs = ctx.needs_input_grad[:3]
    gradients = _linear_grad(
        *head_inputs, *scaling, chunk_size, lse, entropy, grad_logps, grad_entropy, *needs, backend
    )
    return *(grad if need else None for grad, need in zip(gradients, needs)), *[None] * 7


torch.library.register_autograd("rlaif_fast::linear_stats", _backward, setup_context=_setup)


def linear_logps(
    hidden: Tensor,  # (M, H)
    head: Head,
    token_ids: Tensor,  # (M,)
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return logps and entropy (M,), differentiable in hidden, weight and bias."""
    backend = backends.select("linear_loss", backend, hidden)
    if backend == "reference":
        return reference.linear_logps(hidden, head, token_ids.long())
    hidden, weight, bias = autocast(hidden, head.weight, head.bias)
    rest = (token_ids, *flatten(head.scaling), chunk_size, backend)
    logps, _, entropy = _linear_stats(hidden, weight, bias, *rest)
    return logps, entropy
