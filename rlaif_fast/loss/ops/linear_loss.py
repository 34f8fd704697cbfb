"""Losses on hidden states whose gradients are made in the forward pass.

    rlaif_fast::linear_grpo_rank_loss   hidden states -> loss, statistics and all gradients

`with_close` runs any other `linear.Close`, or a sharded vocabulary, which cannot pass through an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlaif_fast.loss import backends, reference
from rlaif_fast.loss.inputs import Head, Needs, Padding, Scaling, TokenGradients, TokenInputs
from rlaif_fast.loss.linear import Close
from rlaif_fast.loss.ops.linear_logps import autocast, fake_gradients, in_dtype, linear_logps
from rlaif_fast.loss.ops.rank_loss import rank_loss
from rlaif_fast.loss.ops.scale import refuse_double_backward, refuse_transforms, scaled, wants_gradient
from rlaif_fast.loss.options import STATS, LossOptions
from rlaif_fast.loss.precision import dtype_of
from rlaif_fast.loss.rank_close import RankClose
from rlaif_fast.loss.schema import declare, flatten, unflatten
from rlaif_fast.loss.vocabulary_shard import VocabularyShard

# Makes a close from the backend's module, a tensor of the dtype of the statistics, and (B, T).
MakeClose = Callable[[Any, Tensor, tuple[int, int]], Close]


def _run(
    hidden: Tensor,  # (B, T, H) or (M, H)
    head: Head,
    token_ids: Tensor,  # (B, T) or (M,)
    padding: Padding | None,
    make_close: MakeClose,
    chunk_size: int | None,
    needs: Needs,
    backend: str,
    shard: VocabularyShard | None = None,
) -> tuple[TokenGradients, tuple[Tensor, ...]]:
    """Return the closed loss and the gradients of hidden, the head's leaf and bias; a missing one is an empty
    tensor."""
    kernels = backends.get("linear_loss", backend)
    like = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    B, T = token_ids.shape if padding is None else padding.mask.shape
    with torch.autocast(hidden.device.type, enabled=False):
        closed, *gradients = kernels.linear_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            token_ids.reshape(-1),
            padding,
            make_close(kernels, like, (B, T)),
            chunk_size,
            needs,
            shard,
        )
    grad_hidden, *grad_head = in_dtype(gradients, (hidden, head.leaf, head.bias))
    return closed, (grad_hidden.view(hidden.shape) if needs.hidden else grad_hidden, *grad_head)


def _rank_close(inputs: TokenInputs, options: LossOptions, padding: Padding | None) -> MakeClose:
    padded = inputs if padding is None else padding.pad_inputs(inputs)
    return lambda kernels, like, shape: RankClose(kernels, like, shape, padded, options)


@torch.library.custom_op(
    "rlaif_fast::linear_grpo_rank_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? float32_weight, Tensor token_ids, Tensor? lengths, "
    "int? chunk_size, bool need_hidden, bool need_weight, bool need_bias, "
    f"{declare(Scaling, TokenInputs, LossOptions)}, str backend) "
    "-> (Tensor loss, Tensor advantages, Tensor stats, Tensor grad_hidden, Tensor grad_weight, "
    "Tensor grad_bias)",
)
def _linear_loss(hidden, weight, bias, float32_weight, token_ids, lengths, chunk_size, *arguments):
    needs = Needs(*arguments[:3])
    scaling, inputs, options, backend = unflatten(arguments[3:], Scaling, TokenInputs, LossOptions)
    padding = None if lengths is None else Padding(lengths, hidden.shape[0])
    head = Head(weight, bias, scaling, float32_weight)
    make_close = _rank_close(inputs, options, padding)
    closed, gradients = _run(hidden, head, token_ids, padding, make_close, chunk_size, needs, backend)
    ranked = closed.advantages if inputs.advantages is None else closed.loss.new_empty(0)
    return closed.loss, ranked, closed.stats, *gradients


@_linear_loss.register_fake
def _(hidden, weight, bias, float32_weight, token_ids, lengths, chunk_size, *arguments):
    need_hidden, need_weight, need_bias = arguments[:3]
    _, inputs, _, _ = unflatten(arguments[3:], Scaling, TokenInputs, LossOptions)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    responses = (token_ids if lengths is None else lengths).shape[0]
    leaf = weight if float32_weight is None else float32_weight
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(responses if inputs.advantages is None else 0, dtype=wide),
        hidden.new_empty(len(STATS), dtype=wide),
        *fake_gradients((hidden, need_hidden), (leaf, need_weight), (bias, need_bias)),
    )


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])
    ctx.needs = inputs[7:10]
    ctx.leaf_at = 1 if inputs[3] is None else 3
    ctx.count, ctx.backend = len(inputs), inputs[-1]


def _backward(ctx, grad_loss, *_):
    results = [None] * ctx.count
    if grad_loss is not None:
        refuse_double_backward()
        for at, grad, need in zip((0, ctx.leaf_at, 2), ctx.saved_tensors, ctx.needs):
            results[at] = scaled(grad, grad_loss, ctx.backend) if need else None
    return tuple(results)


torch.library.register_autograd("rlaif_fast::linear_grpo_rank_loss", _backward, setup_context=_setup)


def linear_loss(
    hidden: Tensor,  # (B, T, H) or (M, H)
    head: Head,
    token_ids: Tensor,  # (B, T) or (M,)
    lengths: Tensor | None,  # (B,)
    inputs: TokenInputs,
    options: LossOptions,
    chunk_size: int | None,
    shard: VocabularyShard | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, advantages and statistics; differentiable in hidden, the head's leaf and bias."""
    backend = backends.select("linear_loss", backend, hidden, inputs.group_size)
    if in_backward(hidden, head, backend):
        if shard is not None:
            raise ValueError("process_group must be None where float16 needs a gradient; use bfloat16")
        padding = None if lengths is None else Padding(lengths, hidden.shape[0])
        rest = (token_ids, padding, inputs.counting(lengths), chunk_size, backend)
        logps, entropy = padded_logps(hidden, head, *rest)
        padded = inputs if padding is None else padding.pad_inputs(inputs)
        closing = "auto" if backend == "cuda" else backend
        loss, ranked, stats = rank_loss(logps, entropy, padded, options, closing)
    else:
        refuse_transforms(hidden, head.leaf, head.bias)
        hidden, head = autocast(hidden, head)
        arguments = (token_ids, lengths, inputs, options, chunk_size, shard, backend)
        loss, ranked, stats = _by_kernels(hidden, head, *arguments)
    return loss, ranked if inputs.advantages is None else inputs.advantages, stats


def _by_kernels(
    hidden: Tensor,  # (B, T, H) or (M, H)
    head: Head,
    token_ids: Tensor,  # (B, T) or (M,)
    lengths: Tensor | None,  # (B,)
    inputs: TokenInputs,
    options: LossOptions,
    chunk_size: int | None,
    shard: VocabularyShard | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss with its gradients made in the forward pass."""
    if shard is not None:
        padding = None if lengths is None else Padding(lengths, hidden.shape[0])
        make_close = _rank_close(inputs, options, padding)
        return with_close(hidden, head, token_ids, padding, make_close, chunk_size, backend, shard)
    needs = [wants_gradient(x) for x in (hidden, head.leaf, head.bias)]
    rest = (token_ids, lengths, chunk_size, *needs, *flatten(head.scaling, inputs, options), backend)
    loss, ranked, stats, *_ = _linear_loss(hidden, head.weight, head.bias, head.float32_weight, *rest)
    return loss, ranked, stats


def in_backward(hidden: Tensor, head: Head, backend: str) -> bool:
    """Return whether the gradients of a loss are made in the backward pass: the reference's, and those of float16.

    A float16 gradient needs its loss scale from the start, and that arrives with the backward pass.
    """
    dtype = dtype_of(hidden.device, hidden.dtype)
    wanted = any(wants_gradient(x) for x in (hidden, head.leaf, head.bias))
    return backend == "reference" or (dtype == torch.float16 and wanted)


def padded_logps(
    hidden: Tensor,  # (B, T, H) or (M, H)
    head: Head,
    token_ids: Tensor,  # (B, T) or (M,)
    padding: Padding | None,  # of the packed layout
    counting: Tensor | None,  # (B, T), (B, 1) or (M,) bool, the tokens that count
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return logps and entropy (B, T), differentiable; the backward pass makes the logits again.

    The hidden states of tokens that do not count may hold anything: they are set to 0 first, for the weight's gradient.
    """
    rows = reference.cleared(hidden, counting).reshape(-1, hidden.shape[-1])
    logps, entropy = linear_logps(rows, head, token_ids.reshape(-1), chunk_size, backend)
    if padding is None:
        return logps.view(token_ids.shape), entropy.view(token_ids.shape)
    return padding.pad(logps), padding.pad(entropy)


def with_close(
    hidden: Tensor,  # (B, T, H) or (M, H)
    head: Head,
    token_ids: Tensor,  # (B, T) or (M,)
    padding: Padding | None,  # of the packed layout
    make_close: MakeClose,
    chunk_size: int | None,
    backend: str,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a close, the advantage or reward of each response, and the statistics; differentiable in
    hidden, the head's leaf and bias. Not under torch.compile."""
    refuse_transforms(hidden, head.leaf, head.bias)
    hidden, head = autocast(hidden, head)

    def run(needs: Needs) -> tuple[TokenGradients, tuple[Tensor, ...]]:
        rest = (padding, make_close, chunk_size, needs, backend, shard)
        return _run(hidden.detach(), head.detach(), token_ids, *rest)

    return _InForward.apply(hidden, head.leaf, head.bias, run, backend)


class _InForward(torch.autograd.Function):
    """A loss whose gradients are made in its forward pass."""

    @staticmethod
    def forward(ctx, hidden, leaf, bias, run, backend):
        ctx.needs, ctx.backend = Needs(*ctx.needs_input_grad[:3]), backend
        closed, gradients = run(ctx.needs)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(closed.advantages, closed.stats)
        ctx.set_materialize_grads(False)
        return closed.loss, closed.advantages, closed.stats

    @staticmethod
    def backward(ctx, grad_loss, *_):
        results: list[Tensor | None] = [None] * 5
        if grad_loss is not None:
            refuse_double_backward()
            for place, (grad, need) in enumerate(zip(ctx.saved_tensors, ctx.needs)):
                if need:
                    results[place] = scaled(grad, grad_loss, ctx.backend)
        return tuple(results)
