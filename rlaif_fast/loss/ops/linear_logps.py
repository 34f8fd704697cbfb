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
from rlaif_fast.loss.ops.scale import refuse_second_derivative, refuse_transforms
from rlaif_fast.loss.precision import dtype_of
from rlaif_fast.loss.schema import declare, flatten, unflatten


def autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Cast as autocast would for the matmul of the head; of two weights only the leaf stays in the graph."""

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype_of(x.device, x.dtype))

    weight, bias = cast(head.weight), None if head.bias is None else cast(head.bias)
    if head.float32_weight is not None:
        weight = weight.detach()
    return cast(hidden), Head(weight, bias, head.scaling, head.float32_weight)


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
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? float32_weight, Tensor token_ids, "
    f"{declare(Scaling)}, int? chunk_size, str backend) -> (Tensor logps, Tensor lse, Tensor entropy)",
)
def _linear_stats(hidden, weight, bias, float32_weight, token_ids, *arguments):
    scaling, chunk_size, backend = unflatten(arguments, Scaling)
    module = backends.get("linear_loss", backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return tuple(module.linear_stats(hidden, Head(weight, bias, scaling), token_ids, chunk_size))


@_linear_stats.register_fake
def _(hidden, weight, bias, float32_weight, token_ids, *_):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(token_ids.shape, dtype=wide) for _ in range(3))


@torch.library.custom_op(
    "rlaif_fast::linear_grad",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? float32_weight, Tensor token_ids, "
    f"{declare(Scaling)}, int? chunk_size, Tensor lse, Tensor entropy, Tensor grad_logps, Tensor grad_entropy, "
    "bool need_hidden, bool need_weight, bool need_bias, str backend) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
def _linear_grad(hidden, weight, bias, float32_weight, token_ids, *arguments):
    scaling, chunk_size, lse, entropy, grad_logps, grad_entropy, *needs, backend = unflatten(
        arguments, Scaling
    )
    module, head = backends.get("linear_loss", backend), Head(weight, bias, scaling, float32_weight)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = module.linear_grad(
            hidden,
            head,
            token_ids,
            RowStats(lse, lse, entropy),
            grad_logps.contiguous(),
            grad_entropy.contiguous(),
            chunk_size,
            Needs(*needs),
        )
    return in_dtype(gradients, (hidden, head.leaf, bias))


@_linear_grad.register_fake
def _(hidden, weight, bias, float32_weight, *rest):
    need_hidden, need_weight, need_bias = rest[-4:-1]
    leaf = weight if float32_weight is None else float32_weight
    return fake_gradients((hidden, need_hidden), (leaf, need_weight), (bias, need_bias))


def _setup(ctx, inputs, output):
    *tensors, temperature, temperatures, softcap, scale, chunk_size, backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(*tensors, temperatures, lse, entropy)
    ctx.rest = temperature, softcap, scale, chunk_size, backend
    ctx.leaf_at, ctx.count = (1 if tensors[3] is None else 3), len(inputs)


def _backward(ctx, grad_logps, _, grad_entropy):
    *head_inputs, temperatures, lse, entropy = ctx.saved_tensors
    temperature, softcap, scale, chunk_size, backend = ctx.rest
    scaling = (temperature, temperatures, softcap, scale)
    places = (0, ctx.leaf_at, 2)
    needs = [ctx.needs_input_grad[at] for at in places]
    gradients = _linear_grad(
        *head_inputs, *scaling, chunk_size, lse, entropy, grad_logps, grad_entropy, *needs, backend
    )
    results = [None] * ctx.count
    for at, grad, need in zip(places, gradients, needs):
        results[at] = grad if need else None
    return tuple(results)


torch.library.register_autograd("rlaif_fast::linear_stats", _backward, setup_context=_setup)
torch.library.register_autograd("rlaif_fast::linear_grad", refuse_second_derivative)


def linear_logps(
    hidden: Tensor,  # (M, H)
    head: Head,
    token_ids: Tensor,  # (M,)
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return logps and entropy (M,), differentiable in hidden, the head's leaf and bias."""
    backend = backends.select("linear_loss", backend, hidden)
    if backend == "reference":
        return reference.linear_logps(hidden, head, token_ids.long())
    refuse_transforms(hidden, head.leaf, head.bias)
    hidden, (weight, bias, scaling, wide) = autocast(hidden, head)
    rest = (token_ids, *flatten(scaling), chunk_size, backend)
    logps, _, entropy = _linear_stats(hidden, weight, bias, wide, *rest)
    return logps, entropy
