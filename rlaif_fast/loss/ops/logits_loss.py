"""Log-probability and entropy of chosen tokens from logits, and their gradient, one sweep each.

rlaif_fast::logits_stats   logits -> log-probability, logsumexp and entropy
rlaif_fast::logits_grad    its backward
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_fast.loss import backends, reference
from rlaif_fast.loss.inputs import RowStats, Scaling
from rlaif_fast.loss.ops.scale import refuse_second_derivative, refuse_transforms
from rlaif_fast.loss.options import check_flag
from rlaif_fast.loss.schema import declare, flatten, unflatten


@torch.library.custom_op(
    "rlaif_fast::logits_stats",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor token_ids, {declare(Scaling)}, str backend) "
    "-> (Tensor logps, Tensor lse, Tensor entropy)",
)
def _logits_stats(logits, token_ids, *arguments):
    scaling, backend = unflatten(arguments, Scaling)
    stats = backends.get("logits_loss", backend).row_stats(logits, token_ids.reshape(-1), scaling)
    return tuple(x.view(token_ids.shape) for x in stats)


@_logits_stats.register_fake
def _(logits, token_ids, *_):
    return tuple(
        token_ids.new_empty(token_ids.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
        for _ in range(3)
    )


@torch.library.custom_op(
    "rlaif_fast::logits_grad",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor token_ids, {declare(Scaling)}, Tensor lse, Tensor entropy, "
    "Tensor grad_logps, Tensor grad_entropy, str backend) -> Tensor",
)
def _logits_grad(logits, token_ids, *arguments):
    scaling, lse, entropy, grad_logps, grad_entropy, backend = unflatten(arguments, Scaling)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_logits_grad(logits, token_ids, scaling, lse, entropy, grad_logps, grad_entropy, backend, out)
    return out


@_logits_grad.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _write_logits_grad(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    scaling: Scaling,
    lse: Tensor,  # (...)
    entropy: Tensor,  # (...)
    grad_logps: Tensor,  # (...)
    grad_entropy: Tensor,  # (...)
    backend: str,
    out: Tensor,  # (..., V)
) -> None:
    stats = RowStats(lse.reshape(-1), lse.reshape(-1), entropy.reshape(-1))
    backends.get("logits_loss", backend).row_grad(
        logits,
        token_ids.reshape(-1),
        scaling,
        stats,
        grad_logps.reshape(-1),
        grad_entropy.reshape(-1),
        out,
    )


def _logits_setup(ctx, inputs, output):
    logits, token_ids, temperature, temperatures, softcap, scale, backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, token_ids, temperatures, lse, entropy)
    ctx.rest = temperature, softcap, scale, backend


def _logits_backward(ctx, grad_logps, _, grad_entropy):
    logits, token_ids, temperatures, lse, entropy = ctx.saved_tensors
    temperature, softcap, scale, backend = ctx.rest
    scaling = (temperature, temperatures, softcap, scale)
    grad = _logits_grad(logits, token_ids, *scaling, lse, entropy, grad_logps, grad_entropy, backend)
    return grad, None, None, None, None, None, None


torch.library.register_autograd("rlaif_fast::logits_stats", _logits_backward, setup_context=_logits_setup)
torch.library.register_autograd("rlaif_fast::logits_grad", refuse_second_derivative)


class _InplaceLogitsStats(torch.autograd.Function):
    """logits_stats whose backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx, logits, token_ids, scaling, backend):
        logps, lse, entropy = _logits_stats(logits, token_ids, *flatten(scaling), backend)
        ctx.save_for_backward(token_ids, lse, entropy)
        ctx.logits, ctx.version = logits.detach(), logits._version
        ctx.scaling, ctx.backend = scaling, backend
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        token_ids, lse, entropy = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        if logits is None:
            raise RuntimeError("inplace_backward=True runs backward once: the logits have been overwritten")
        if logits._version != ctx.version:
            raise RuntimeError(
                "inplace_backward=True needs the logits as they were: something has written to them since the "
                "forward pass"
            )
        _write_logits_grad(
            logits, token_ids, ctx.scaling, lse, entropy, grad_logps, grad_entropy, ctx.backend, logits
        )
        # another node that saved the logits for its backward pass then raises
        torch.autograd.graph.increment_version(logits)
        return logits, None, None, None


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    scaling: Scaling,
    backend: str,
    inplace_backward: bool = False,
    mask: Tensor | None = None,  # (...) bool
) -> tuple[Tensor, Tensor]:
    """Return logps and entropy (...), differentiable in the logits; undefined where the mask is false."""
    check_flag("inplace_backward", inplace_backward)
    backend = backends.select("logits_loss", backend, logits)
    if backend == "reference":
        return reference.selective_log_softmax(reference.cleared(logits, mask), token_ids.long(), scaling)
    refuse_transforms(logits)
    if logits.stride(-1) != 1 or (inplace_backward and 0 in logits.stride()):
        logits = logits.contiguous()  # the kernels read a row as one run of memory, and write each row once
    if inplace_backward and not torch.compiler.is_compiling():
        return _InplaceLogitsStats.apply(logits, token_ids, scaling, backend)
    logps, _, entropy = _logits_stats(logits, token_ids, *flatten(scaling), backend)
    return logps, entropy
