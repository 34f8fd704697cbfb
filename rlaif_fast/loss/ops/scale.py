"""Losses whose gradients are made in the forward pass: scaling those, and refusing derivatives they do not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_double_backward() -> None:
    """Raise where a graph of the backward pass is asked for: gradients made in the forward pass have none."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the loss is differentiable once: create_graph=True is not supported")


def refuse_second_derivative(ctx: Any, *_: Tensor) -> None:
    """Raise where autograd reaches an operator that computes a gradient of log-probabilities."""
    raise RuntimeError(
        "log-probabilities are differentiable once; with backend='reference' any number of times"
    )


def wants_gradient(x: Tensor | None) -> bool:
    """Return whether autograd follows a tensor; a batched tensor of `torch.vmap` has to be unwrapped to tell."""
    if x is None or not torch.is_grad_enabled():
        return False
    while not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def refuse_transforms(*leaves: Tensor | None) -> None:
    """Raise under forward-mode differentiation, which would silently give 0, and under `torch.func`."""
    if torch.compiler.is_compiling():
        return
    for x in leaves:
        if x is not None and (
            torch._C._functorch.is_gradtrackingtensor(x) or forward_ad.unpack_dual(x).tangent is not None
        ):
            raise RuntimeError(
                "the loss is differentiable by ordinary autograd, not by torch.func or in forward mode; with "
                "backend='reference' it is"
            )


def scaled(grad: Tensor, by: Tensor, backend: str) -> Tensor:
    """Return grad * by, multiplied in float32 and rounded once.

    Where `by` is 1 nothing is copied: on the CPU it is read here, on a GPU the kernel reads it, and works in place
    where the graph is not kept for another backward pass.
    """
    if torch.compiler.is_compiling() or type(by) is not Tensor:
        return (grad * by.reshape([1] * grad.dim())).to(grad.dtype)
    if by.device.type == "cpu":
        if by.item() == 1.0:
            return grad
    elif backend == "triton" and not torch._C._autograd._get_current_graph_task_keep_graph():
        from rlaif_fast_kernels.scale_gradient import scale_gradient_

        return scale_gradient_(grad, by)
    return torch.mul(grad, by.reshape([1] * grad.dim()), out=torch.empty_like(grad))
