"""The operators that run the kernels under autograd and torch.compile.

    rlaif_fast::rank_advantages        scores and ranks -> advantages, penalties, agreement
    rlaif_fast::rank_loss              log-probs -> loss, statistics and the gradients of logps and entropy
    rlaif_fast::logits_stats           logits -> log-prob, logsumexp and entropy of chosen tokens
    rlaif_fast::logits_grad            its backward, one sweep over the logits
    rlaif_fast::linear_stats           hidden states -> the same, logits a chunk at a time
    rlaif_fast::linear_grad            its backward, makes the logits again
    rlaif_fast::linear_grpo_rank_loss  hidden states -> loss and all gradients, computed in the forward pass

The compiled extension adds rank_penalty, token_loss, row_stats, row_grad and row_loss_, which these call on
the CPU. Each operator takes the name of a backend that `backends.select` chose. Gradients flow through
ordinary autograd, once; `torch.func` transforms are not supported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rlaif_fast.loss import backends
from rlaif_fast.loss.backends import RowStats, TokenGradients
from rlaif_fast.loss.inputs import Padding, TokenInputs
from rlaif_fast.loss.linear import Head, Needs
from rlaif_fast.loss.options import STATS, LossOptions, RankOptions
from rlaif_fast.loss.reference.rank_penalty import RankAdvantages
from rlaif_fast.loss.vocabulary_shard import VocabularyShard

_INPUTS = (
    "Tensor? advantages, Tensor? oracle_ranks, Tensor? valid, Tensor? old_logps, Tensor? ref_logps, "
    "Tensor? mask, Tensor? sampling_ratio, Tensor? num_items"
)
_OPTIONS = (
    "str kind, float penalty_weight, str scale, str score, float epsilon_low, float epsilon_high, "
    "float? delta, float beta, str kl, float entropy_coef, str loss_type, "
    "int? max_completion_length, str importance_sampling_level"
)
_INPUT_COUNT = len(TokenInputs._fields)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _only_loss_differentiable(ctx, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


# --- ranks


@torch.library.custom_op(
    "rlaif_fast::rank_advantages",
    mutates_args=(),
    schema="(Tensor scores, Tensor oracle_ranks, Tensor? valid, str kind, float penalty_weight, str scale, "
    "str backend) -> (Tensor advantages, Tensor penalties, Tensor ndcg, Tensor kendall_tau, Tensor has_signal, "
    "Tensor top1_agreement)",
)
def _rank_advantages(scores, oracle_ranks, valid, kind, penalty_weight, scale, backend):
    options = RankOptions(kind, penalty_weight, scale)
    return tuple(backends.get("rank_penalty", backend).rank_penalty(scores, oracle_ranks, valid, options))


@_rank_advantages.register_fake
def _(scores, oracle_ranks, valid, kind, penalty_weight, scale, backend):
    matrix = [torch.empty(scores.shape, dtype=scores.dtype, device=scores.device) for _ in range(2)]
    column = [scores.new_empty(scores.shape[0]) for _ in range(3)]
    signal = scores.new_empty(scores.shape[0], dtype=torch.bool)
    return (*matrix, *column[:2], signal, column[2])


def rank_advantages(
    scores: Tensor,  # (N, G)
    oracle_ranks: Tensor,  # (N, G)
    valid: Tensor | None,  # (N,) bool
    options: RankOptions,
    backend: str,
) -> RankAdvantages:
    """Rank N groups; nothing here is differentiable."""
    rest = options.kind, options.penalty_weight, options.scale, backend
    return RankAdvantages(*_rank_advantages(scores, oracle_ranks, valid, *rest))


# --- rank_loss


@torch.library.custom_op(
    "rlaif_fast::rank_loss",
    mutates_args=(),
    schema=f"(Tensor logps, Tensor? entropy, {_INPUTS}, {_OPTIONS}, str backend) "
    "-> (Tensor loss, Tensor advantages, Tensor stats, Tensor grad_logps, Tensor grad_entropy)",
)
def _rank_loss(logps, entropy, *arguments):
    inputs, options, backend = _unflatten(arguments)
    result: TokenGradients = backends.get("rank_loss", backend).rank_loss(
        logps, *inputs[:-1], entropy, inputs.num_items, options
    )
    ranked = result.advantages if inputs.advantages is None else logps.new_empty(0)
    grad_entropy = result.grad_entropy
    if grad_entropy is None or entropy is None:
        grad_entropy = result.grad_logps.new_empty(0)
    return result.loss, ranked, result.stats, result.grad_logps, grad_entropy


@_rank_loss.register_fake
def _(logps, entropy, *arguments):
    inputs, _, _ = _unflatten(arguments)
    wide = _wide(logps)
    rows = logps.shape[0] if inputs.advantages is None else 0
    return (
        logps.new_empty((), dtype=wide),
        logps.new_empty(rows, dtype=wide if inputs.advantages is None else logps.dtype),
        logps.new_empty(len(STATS), dtype=wide),
        logps.new_empty(logps.shape, dtype=wide),
        logps.new_empty(logps.shape if entropy is not None else 0, dtype=wide),
    )


def _rank_loss_setup(ctx, inputs, output):
    logps, entropy = inputs[:2]
    _only_loss_differentiable(ctx, output)
    ctx.save_for_backward(output[3], output[4])
    ctx.dtypes = logps.dtype, None if entropy is None else entropy.dtype
    ctx.count = len(inputs)


def _rank_loss_backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return tuple(None for _ in range(ctx.count))
    grad_logps, grad_entropy = ctx.saved_tensors
    dtype, entropy_dtype = ctx.dtypes
    to_entropy = None if entropy_dtype is None else (grad_loss * grad_entropy).to(entropy_dtype)
    return (grad_loss * grad_logps).to(dtype), to_entropy, *(None for _ in range(ctx.count - 2))


torch.library.register_autograd("rlaif_fast::rank_loss", _rank_loss_backward, setup_context=_rank_loss_setup)


def rank_loss(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # (B, T)
    inputs: TokenInputs,
    options: LossOptions,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, advantages and statistics; differentiable in logps and entropy."""
    loss, ranked, stats, _, _ = _rank_loss(logps, entropy, *_flatten(inputs, options), backend)
    return loss, ranked if inputs.advantages is None else inputs.advantages, stats


def _flatten(inputs: TokenInputs, options: LossOptions) -> tuple[Any, ...]:
    return (
        *inputs,
        options.kind,
        options.penalty_weight,
        options.scale,
        options.score,
        options.epsilon_low,
        options.epsilon_high,
        options.delta,
        options.beta,
        options.kl,
        options.entropy_coef,
        options.loss_type,
        options.max_completion_length,
        options.importance_sampling_level,
    )


def _unflatten(arguments: tuple[Any, ...]) -> tuple[TokenInputs, LossOptions, str]:
    inputs = TokenInputs(*arguments[:_INPUT_COUNT])
    return inputs, LossOptions(*arguments[_INPUT_COUNT:-1]), arguments[-1]


# --- logits


@torch.library.custom_op(
    "rlaif_fast::logits_stats",
    mutates_args=(),
    schema="(Tensor logits, Tensor token_ids, float temperature, str backend) "
    "-> (Tensor logps, Tensor lse, Tensor entropy)",
)
def _logits_stats(logits, token_ids, temperature, backend):
    stats = backends.get("logits_loss", backend).row_stats(logits, token_ids.reshape(-1), temperature)
    return tuple(x.view(token_ids.shape) for x in stats)


@_logits_stats.register_fake
def _(logits, token_ids, temperature, backend):
    return tuple(token_ids.new_empty(token_ids.shape, dtype=_wide(logits)) for _ in range(3))


@torch.library.custom_op(
    "rlaif_fast::logits_grad",
    mutates_args=(),
    schema="(Tensor logits, Tensor token_ids, float temperature, Tensor lse, Tensor entropy, "
    "Tensor grad_logps, Tensor grad_entropy, str backend) -> Tensor",
)
def _logits_grad(logits, token_ids, temperature, lse, entropy, grad_logps, grad_entropy, backend):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_logits_grad(logits, token_ids, temperature, lse, entropy, grad_logps, grad_entropy, backend, out)
    return out


@_logits_grad.register_fake
def _(logits, token_ids, temperature, lse, entropy, grad_logps, grad_entropy, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _write_logits_grad(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperature: float,
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
        temperature,
        stats,
        grad_logps.reshape(-1),
        grad_entropy.reshape(-1),
        out,
    )


def _logits_setup(ctx, inputs, output):
    logits, token_ids, temperature, backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, token_ids, lse, entropy)
    ctx.temperature, ctx.backend = temperature, backend


def _logits_backward(ctx, grad_logps, _, grad_entropy):
    logits, token_ids, lse, entropy = ctx.saved_tensors
    grad = _logits_grad(
        logits, token_ids, ctx.temperature, lse, entropy, grad_logps, grad_entropy, ctx.backend
    )
    return grad, None, None, None


torch.library.register_autograd("rlaif_fast::logits_stats", _logits_backward, setup_context=_logits_setup)


class _InplaceLogitsStats(torch.autograd.Function):
    """logits_stats whose backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx, logits, token_ids, temperature, backend):
        logps, lse, entropy = _logits_stats(logits, token_ids, temperature, backend)
        ctx.save_for_backward(token_ids, lse, entropy)
        ctx.logits = logits.detach()
        ctx.temperature, ctx.backend = temperature, backend
        return logps, entropy

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy):
        token_ids, lse, entropy = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        if logits is None:
            raise RuntimeError("inplace_backward=True runs backward once: the logits have been overwritten")
        _write_logits_grad(
            logits, token_ids, ctx.temperature, lse, entropy, grad_logps, grad_entropy, ctx.backend, logits
        )
        return logits, None, None, None


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperature: float,
    backend: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Return logps and entropy (...), differentiable in the logits."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()  # the kernels read a row as one run of memory
    if inplace_backward and not torch.compiler.is_compiling():
        return _InplaceLogitsStats.apply(logits, token_ids, temperature, backend)
    logps, _, entropy = _logits_stats(logits, token_ids, temperature, backend)
    return logps, entropy


# --- hidden states


@torch.library.custom_op(
    "rlaif_fast::linear_stats",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, float temperature, "
    "int? chunk_size, str backend) -> (Tensor logps, Tensor lse, Tensor entropy)",
)
def _linear_stats(hidden, weight, bias, token_ids, temperature, chunk_size, backend):
    module = backends.get("linear_loss", backend)
    with torch.autocast(hidden.device.type, enabled=False):
        return tuple(module.linear_stats(hidden, Head(weight, bias, temperature), token_ids, chunk_size))


@_linear_stats.register_fake
def _(hidden, weight, bias, token_ids, temperature, chunk_size, backend):
    return tuple(hidden.new_empty(token_ids.shape, dtype=_wide(hidden)) for _ in range(3))


@torch.library.custom_op(
    "rlaif_fast::linear_grad",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, float temperature, "
    "int? chunk_size, Tensor lse, Tensor entropy, Tensor grad_logps, Tensor grad_entropy, bool need_hidden, "
    "bool need_weight, bool need_bias, str backend) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
def _linear_grad(
    hidden,
    weight,
    bias,
    token_ids,
    temperature,
    chunk_size,
    lse,
    entropy,
    grad_logps,
    grad_entropy,
    need_hidden,
    need_weight,
    need_bias,
    backend,
):
    module = backends.get("linear_loss", backend)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = module.linear_grad(
            hidden,
            Head(weight, bias, temperature),
            token_ids,
            RowStats(lse, lse, entropy),
            grad_logps.contiguous(),
            grad_entropy.contiguous(),
            chunk_size,
            Needs(need_hidden, need_weight, need_bias),
        )
    return _in_dtype(gradients, (hidden, weight, bias))


@_linear_grad.register_fake
def _(
    hidden,
    weight,
    bias,
    token_ids,
    temperature,
    chunk_size,
    lse,
    entropy,
    gl,
    ge,
    need_h,
    need_w,
    need_b,
    backend,
):
    return _fake_gradients((hidden, need_h), (weight, need_w), (bias, need_b))


def _in_dtype(gradients: Any, of: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Round each gradient to the dtype of what it belongs to; an operator returns no None, but an empty
    tensor."""
    like = of[0]
    assert like is not None
    return tuple(
        like.new_empty(0) if grad is None or x is None else grad.to(x.dtype) for grad, x in zip(gradients, of)
    )


def _fake_gradients(*pairs: tuple[Tensor | None, bool]) -> tuple[Tensor, ...]:
    like = pairs[0][0]
    assert like is not None
    return tuple(
        like.new_empty(0) if x is None or not need else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x, need in pairs
    )


def _linear_stats_setup(ctx, inputs, output):
    hidden, weight, bias, token_ids, temperature, chunk_size, backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, bias, token_ids, lse, entropy)
    ctx.rest = temperature, chunk_size, backend


def _linear_stats_backward(ctx, grad_logps, _, grad_entropy):
    *head_inputs, lse, entropy = ctx.saved_tensors
    temperature, chunk_size, backend = ctx.rest
    needs = ctx.needs_input_grad[:3]
    gradients = _linear_grad(
        *head_inputs, temperature, chunk_size, lse, entropy, grad_logps, grad_entropy, *needs, backend
    )
    return *(grad if need else None for grad, need in zip(gradients, needs)), None, None, None, None


torch.library.register_autograd(
    "rlaif_fast::linear_stats", _linear_stats_backward, setup_context=_linear_stats_setup
)


def linear_logps(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    token_ids: Tensor,  # (M,)
    temperature: float,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return logps and entropy (M,), differentiable in hidden, weight and bias."""
    hidden, weight, bias = _autocast(hidden, weight, bias)
    logps, _, entropy = _linear_stats(hidden, weight, bias, token_ids, temperature, chunk_size, backend)
    return logps, entropy


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would for the matmul of the head."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _run_linear_loss(
    hidden: Tensor,  # (B, T, H) or (M, H)
    head: Head,
    token_ids: Tensor,  # (B, T) or (M,)
    lengths: Tensor | None,  # (B,)
    inputs: TokenInputs,
    options: LossOptions,
    chunk_size: int | None,
    needs: Needs,
    backend: str,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, ...]:
    """Return the loss, the advantages where they were computed here, the statistics, and the gradients of hidden,
    weight and bias; an empty tensor for what is not there."""
    padding = None if lengths is None else Padding(lengths)
    with torch.autocast(hidden.device.type, enabled=False):
        closed, *gradients = backends.get("linear_loss", backend).linear_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            token_ids.reshape(-1),
            tuple(token_ids.shape if padding is None else padding.mask.shape),
            padding,
            inputs if padding is None else padding.pad_inputs(inputs),
            options,
            chunk_size,
            needs,
            shard,
        )
    grad_hidden, *grad_head = _in_dtype(gradients, (hidden, head.weight, head.bias))
    if needs.hidden:
        grad_hidden = grad_hidden.view(hidden.shape)
    ranked = closed.advantages if inputs.advantages is None else closed.loss.new_empty(0)
    return closed.loss, ranked, closed.stats, grad_hidden, *grad_head


@torch.library.custom_op(
    "rlaif_fast::linear_grpo_rank_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? lengths, "
    f"float temperature, int? chunk_size, bool need_hidden, bool need_weight, bool need_bias, "
    f"{_INPUTS}, {_OPTIONS}, str backend) "
    "-> (Tensor loss, Tensor advantages, Tensor stats, Tensor grad_hidden, Tensor grad_weight, "
    "Tensor grad_bias)",
)
def _linear_loss(
    hidden,
    weight,
    bias,
    token_ids,
    lengths,
    temperature,
    chunk_size,
    need_hidden,
    need_weight,
    need_bias,
    *arguments,
):
    needs = Needs(need_hidden, need_weight, need_bias)
    inputs, options, backend = _unflatten(arguments)
    head = Head(weight, bias, temperature)
    return _run_linear_loss(hidden, head, token_ids, lengths, inputs, options, chunk_size, needs, backend)


@_linear_loss.register_fake
def _(hidden, weight, bias, token_ids, lengths, temperature, chunk_size, need_h, need_w, need_b, *arguments):
    inputs, _, _ = _unflatten(arguments)
    wide = _wide(hidden)
    responses = (token_ids if lengths is None else lengths).shape[0]
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(responses if inputs.advantages is None else 0, dtype=wide),
        hidden.new_empty(len(STATS), dtype=wide),
        *_fake_gradients((hidden, need_h), (weight, need_w), (bias, need_b)),
    )


def _linear_loss_setup(ctx, inputs, output):
    _only_loss_differentiable(ctx, output)
    ctx.save_for_backward(*output[3:])
    ctx.needs = inputs[7:10]
    ctx.count = len(inputs)


def _linear_loss_backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return tuple(None for _ in range(ctx.count))
    scaled = [_scale(grad, grad_loss) if need else None for grad, need in zip(ctx.saved_tensors, ctx.needs)]
    return *scaled, *(None for _ in range(ctx.count - len(scaled)))


def _scale(grad: Tensor, by: Tensor) -> Tensor:
    """Apply the upstream gradient; where it can be looked at for nothing and is 1, nothing is copied."""
    eager = type(by) is Tensor and not torch.compiler.is_compiling()
    if eager and by.device.type == "cpu" and by.item() == 1.0:
        return grad
    return grad * by.to(grad.dtype)


torch.library.register_autograd(
    "rlaif_fast::linear_grpo_rank_loss", _linear_loss_backward, setup_context=_linear_loss_setup
)


def linear_loss(
    hidden: Tensor,  # (B, T, H) or (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    token_ids: Tensor,  # (B, T) or (M,)
    lengths: Tensor | None,  # (B,)
    inputs: TokenInputs,
    options: LossOptions,
    temperature: float,
    chunk_size: int | None,
    group: ProcessGroup | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, advantages and statistics; differentiable in hidden, weight and bias."""
    hidden, weight, bias = _autocast(hidden, weight, bias)
    if group is not None:
        loss, ranked, stats = _ShardedLinearLoss.apply(
            hidden, weight, bias, temperature, group, token_ids, lengths, inputs, options, chunk_size, backend
        )
        return loss, ranked if inputs.advantages is None else inputs.advantages, stats
    grad = torch.is_grad_enabled()
    needs = Needs(
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    loss, ranked, stats, *_ = _linear_loss(
        hidden,
        weight,
        bias,
        token_ids,
        lengths,
        temperature,
        chunk_size,
        *needs,
        *_flatten(inputs, options),
        backend,
    )
    return loss, ranked if inputs.advantages is None else inputs.advantages, stats


class _ShardedLinearLoss(torch.autograd.Function):
    """The fused linear loss on a shard of the vocabulary; a process group cannot pass through an operator."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        temperature,
        group,
        token_ids,
        lengths,
        inputs,
        options,
        chunk_size,
        backend,
    ):
        ctx.needs = Needs(*ctx.needs_input_grad[:3])
        head = Head(weight, bias, temperature)
        shard = VocabularyShard(group, weight.shape[0], weight.device)
        loss, ranked, stats, *gradients = _run_linear_loss(
            hidden, head, token_ids, lengths, inputs, options, chunk_size, ctx.needs, backend, shard
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(ranked, stats)
        ctx.set_materialize_grads(False)
        return loss, ranked, stats

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return tuple(None for _ in range(11))
        scaled = [_scale(x, grad_loss) if need else None for x, need in zip(ctx.saved_tensors, ctx.needs)]
        return *scaled, *(None for _ in range(8))
