"""The GRPO_rank loss from log-probabilities, from logits, or from hidden states and the head's weight.

    rho_t  = exp(logp_t - old_logp_t)
    J_t    = min(rho_t * A, clip(rho_t, 1 - epsilon, 1 + epsilon_high) * A) - beta * KL_t + entropy_coef * H_t
    loss   = -aggregate(J)

Letters: N groups, G responses a group, B = N * G rows (the rows of a group adjacent), T tokens, M packed
    tokens,
H hidden, V vocabulary. Everything is differentiable once, in ordinary autograd (not under `torch.func`); the
kernels use no floating point atomics, so equal inputs give equal bits on one machine and thread count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import TypedDict, Unpack

from rlaif_fast.loss import backends, checks, ops, reference
from rlaif_fast.loss.advantages import check_ranks
from rlaif_fast.loss.inputs import Padding, TokenInputs
from rlaif_fast.loss.options import STATS, LossOptions, check_number
from rlaif_fast.loss.vocabulary_shard import VocabularyShard

__all__ = [
    "GRPORankLoss",
    "LossArguments",
    "LossOutput",
    "fused_linear_grpo_rank_loss",
    "grpo_rank_loss",
    "grpo_rank_loss_from_logits",
    "selective_log_softmax",
    "token_logps",
]


class LossOutput(NamedTuple):
    """A loss and what it was made of.

    Attributes:
        loss: Scalar, differentiable.
        advantages: (B,), or as they were given; detached.
        stats: Scalars by name, detached and on the device: `loss/policy`, `clip_low`, `clip_high`,
            `ratio_mean`, `ratio_max` and `tokens` always; `loss/kl` and `kl` with `ref_logps`; `entropy`
            where it is known and `loss/entropy` with `entropy_coef`; `penalty`, `ndcg`, `kendall_tau`,
            `top1_agreement` and `no_signal` with `oracle_ranks`.
    """

    loss: Tensor
    advantages: Tensor
    stats: dict[str, Tensor]


class LossArguments(TypedDict, total=False):
    """The keyword arguments of `grpo_rank_loss` that all three forms of the loss take."""

    advantages: Tensor | None
    group_size: int | None
    old_logps: Tensor | None
    ref_logps: Tensor | None
    mask: Tensor | None
    sampling_ratio: Tensor | None
    kind: str
    penalty_weight: float
    scale: str
    score: str
    valid: Tensor | None
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    beta: float
    kl: str
    entropy_coef: float
    loss_type: str
    max_completion_length: int | None
    num_items_in_batch: int | float | Tensor | None
    importance_sampling_level: str


def _check(
    like: Tensor,
    shape: tuple[int, ...],  # of every per-token tensor: (B, T), or (M,) when packed
    responses: int,  # B
    oracle_ranks: Tensor | None,
    *,
    advantages: Tensor | None = None,
    group_size: int | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,
    sampling_ratio: Tensor | None = None,
    kind: str = "directed",
    penalty_weight: float = 1.0,
    scale: str = "none",
    score: str = "mean",
    valid: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    importance_sampling_level: str = "token",
) -> tuple[TokenInputs, LossOptions]:
    """Check every argument against the others; return them as the backends take them."""
    options = LossOptions(
        kind=kind,
        penalty_weight=penalty_weight,
        scale=scale,
        score=score,
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        delta=delta,
        beta=beta,
        kl=kl,
        entropy_coef=entropy_coef,
        loss_type=loss_type,
        max_completion_length=max_completion_length,
        importance_sampling_level=importance_sampling_level,
    )
    if (advantages is None) == (oracle_ranks is None):
        what = "neither" if advantages is None else "both"
        raise ValueError(f"exactly one of oracle_ranks and advantages must be given; got {what}")
    if advantages is not None:
        per_token = (
            isinstance(advantages, Tensor) and advantages.dim() == len(shape) and advantages.shape == shape
        )
        checks.floating("advantages", advantages, shape if per_token else (responses,), like=like)
        if valid is not None:
            raise ValueError(
                "valid belongs to oracle_ranks: with advantages, mask the rows that must not count"
            )
        if group_size is not None and (group_size < 1 or responses % group_size):
            raise ValueError(f"group_size must divide the {responses} responses; got {group_size}")
        advantages = advantages.detach()
    else:
        assert oracle_ranks is not None
        oracle_ranks = _check_groups(oracle_ranks, group_size, responses, like)
        check_ranks(oracle_ranks, valid, kind, like=like)
        oracle_ranks = oracle_ranks.detach().to(torch.promote_types(like.dtype, torch.float32))
    for name, value in (("old_logps", old_logps), ("ref_logps", ref_logps)):
        if value is not None:
            checks.floating(name, value, shape, like=like)
    if sampling_ratio is not None:
        per_row = isinstance(sampling_ratio, Tensor) and sampling_ratio.shape == (responses, 1)
        checks.floating("sampling_ratio", sampling_ratio, (responses, 1) if per_row else shape, like=like)
    if mask is not None:
        checks.tensor("mask", mask, shape, like=like)
        if mask.dtype != torch.bool:
            checks.zero_or_one("mask", mask)
            mask = mask != 0
    if beta != 0.0 and ref_logps is None:
        raise ValueError(f"ref_logps must be given when beta is not 0; got None with beta={beta}")
    num_items = num_items_in_batch
    if num_items is not None and not isinstance(num_items, Tensor):
        if isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
            raise TypeError(
                f"num_items_in_batch must be a number or a scalar tensor; got {checks.describe(num_items)}"
            )
        if not num_items > 0:
            raise ValueError(f"num_items_in_batch must be above 0; got {num_items}")
        num_items = torch.full(
            (), num_items, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)
        )
    elif isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"num_items_in_batch must be a number or a scalar tensor; got {checks.describe(num_items)}"
            )
        num_items = (
            num_items.detach().reshape(()).to(like.device, torch.promote_types(like.dtype, torch.float32))
        )

    def detached(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach()

    inputs = TokenInputs(
        advantages,
        oracle_ranks,
        valid,
        detached(old_logps),
        detached(ref_logps),
        mask,
        detached(sampling_ratio),
        num_items,
    )
    return inputs, options


def _check_groups(
    oracle_ranks: Tensor, group_size: int | None, responses: int, like: Tensor
) -> Tensor:  # (N, G)
    """Bring flat or grouped ranks to (N, G) with N * G = responses."""
    if not isinstance(oracle_ranks, Tensor):
        raise TypeError(
            f"oracle_ranks must be a tensor of shape (N, G) or (B,); got {checks.describe(oracle_ranks)}"
        )
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int)):
        raise TypeError(f"group_size must be an int; got {checks.describe(group_size)}")
    if group_size is not None and (group_size < 1 or responses % group_size):
        raise ValueError(f"group_size must divide the {responses} responses; got {group_size}")
    if oracle_ranks.dim() == 1:
        if group_size is None:
            raise ValueError(
                f"group_size must be given with flat oracle_ranks; got {checks.describe(oracle_ranks)}"
            )
        checks.tensor("oracle_ranks", oracle_ranks, (responses,), like=like)
        return oracle_ranks.view(-1, group_size)
    checks.tensor("oracle_ranks", oracle_ranks, ("N", "G"), like=like)
    N, G = oracle_ranks.shape
    if responses != N * G:
        raise ValueError(
            f"oracle_ranks must be (N, G) with N * G = {responses}; got {tuple(oracle_ranks.shape)}"
        )
    if group_size is not None and group_size != G:
        raise ValueError(f"group_size must be the G of oracle_ranks, {G}; got {group_size}")
    return oracle_ranks


def _output(
    loss: Tensor,
    advantages: Tensor,
    stats: Tensor,  # (len(STATS),)
    inputs: TokenInputs,
    options: LossOptions,
    entropy_known: bool,
) -> LossOutput:
    """Name the statistics whose inputs were given."""
    absent = set()
    if inputs.ref_logps is None:
        absent |= {"loss/kl", "kl"}
    if not entropy_known:
        absent.add("entropy")
    if options.entropy_coef == 0.0:
        absent.add("loss/entropy")
    if inputs.oracle_ranks is None:
        absent |= {"penalty", "ndcg", "kendall_tau", "top1_agreement", "no_signal"}
    named = {name: value for name, value in zip(STATS, stats.detach().unbind()) if name not in absent}
    return LossOutput(loss, advantages, named)


def _token_loss(
    logps: Tensor, entropy: Tensor | None, inputs: TokenInputs, options: LossOptions, backend: str
) -> LossOutput:
    """Close the loss over log-probabilities and entropies that are already there."""
    chosen = backends.select("rank_loss", backend, logps, inputs.group_size)
    if chosen == "reference":
        loss, advantages, stats = reference.rank_loss(
            logps,
            inputs.advantages,
            inputs.oracle_ranks,
            inputs.valid,
            inputs.old_logps,
            inputs.ref_logps,
            inputs.mask,
            inputs.sampling_ratio,
            entropy,
            inputs.num_items,
            options,
        )
    else:
        loss, advantages, stats = ops.rank_loss(logps, entropy, inputs, options, chosen)
    return _output(loss, advantages, stats, inputs, options, entropy is not None)


def grpo_rank_loss(
    logps: Tensor,  # (B, T)
    oracle_ranks: Tensor | None = None,  # (N, G) or (B,)
    *,
    entropy: Tensor | None = None,  # (B, T)
    backend: str = "auto",
    **arguments: Unpack[LossArguments],
) -> LossOutput:
    """Return the GRPO_rank loss of sampled tokens from their log-probabilities.

    Args:
        logps: (B, T) float, log-probability of each sampled token under the policy; differentiable.
        oracle_ranks: (N, G) int or float with N * G = B, 0 is best, equal is a tie (scalar rewards, higher is
            better, with `kind="zscore"`); or (B,) with `group_size`.
        advantages: (B,) or (B, T) float, any trainer's own, in place of `oracle_ranks`.
        group_size: G, where `oracle_ranks` is flat.
        old_logps: (B, T) float under the policy that sampled. None is on-policy: the ratio is 1 with the
            gradient of `logps`. Where they are given, they are also what the policy's own order is taken
            from.
        ref_logps: (B, T) float under the reference policy; needed when `beta` is not 0.
        mask: (B, T) bool or 0/1; a token that is 0 contributes nothing, whatever stands there.
        sampling_ratio: (B, T) or (B, 1) float weight of the policy term (trainer against sampler mismatch).
        entropy: (B, T) float in nats, differentiable; needed when `entropy_coef` is not 0.
        kind: "directed" (default), "oracle", "paper", "paper_swapped" or "zscore".
        penalty_weight: w >= 0 of the directed advantage.
        scale: "none", or "group" to divide advantages by their root mean square over the group.
        score: "mean" (per token) or "sum": which log-probability of a response orders the policy's responses.
        valid: (N,) bool; a group that is false has advantages of 0 and counts in no average.
        epsilon: The ratio is clipped below at 1 - epsilon and, by default, above at 1 + epsilon.
        epsilon_high: The upper bound instead.
        delta: Upper bound on the ratio where clipping does not bound it (two-sided clipping).
        beta: Weight of the KL term.
        kl: "k3" (default), "k1" or "k2".
        entropy_coef: Weight of the entropy bonus.
        loss_type: "grpo" mean over responses of the mean over tokens; "dapo" mean over tokens; "dr_grpo" sum
            over (responses * max_completion_length).
        max_completion_length: Tokens; needed for "dr_grpo".
        num_items_in_batch: What stands for the number of tokens ("dapo") or responses (the others) when the
            batch is part of a larger one: that of the whole divided by the number of processes.
        importance_sampling_level: "token", or "sequence": one ratio a response, the geometric mean (GSPO).
        backend: "auto", "triton", "cpu" or "reference"; a backend asked for by name runs or raises.

    Returns:
        `LossOutput`: loss, advantages (B,) (or as given) and stats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.

    Source: arXiv 2510.02561; names follow TRL's GRPO trainer.
    """
    checks.floating("logps", logps, ("B", "T"))
    if entropy is not None:
        checks.floating("entropy", entropy, tuple(logps.shape), like=logps)
    inputs, options = _check(logps, tuple(logps.shape), logps.shape[0], oracle_ranks, **arguments)
    if options.entropy_coef != 0.0 and entropy is None:
        raise ValueError(
            f"entropy must be given when entropy_coef is not 0; got None with {options.entropy_coef}"
        )
    return _token_loss(logps, entropy, inputs, options, backend)


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each chosen token, and on request the entropy of its distribution.

    Args:
        logits: (..., V) float, differentiable; never copied.
        token_ids: (...) int64 or int32 in [0, V).
        temperature: Above 0; divides the logits.
        return_entropy: Also return the entropy.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        logps (...) in nats, float32 or wider; with `return_entropy` also the entropy (...) in nats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.
    """
    _check_logits(logits, token_ids, temperature, None)
    logps, entropy = _selective_log_softmax(logits, token_ids, temperature, backend)
    return (logps, entropy) if return_entropy else logps


def _check_logits(logits: Tensor, token_ids: Tensor, temperature: float, mask: Tensor | None) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor of shape (..., V); got {checks.describe(logits)}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"logits must be a tensor of shape (..., V) with V of at least 1; got {checks.describe(logits)}"
        )
    checks.floating("logits", logits, tuple(logits.shape))
    checks.token_ids("token_ids", token_ids, tuple(logits.shape[:-1]), like=logits)
    check_number("temperature", temperature, minimum=0.0, strict=True)
    checks.ids_in_range("token_ids", token_ids, logits.shape[-1], mask)


def _selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperature: float,
    backend: str,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    chosen = backends.select("logits_loss", backend, logits)
    if chosen == "reference":
        return reference.selective_log_softmax(logits, token_ids.long(), temperature)
    return ops.selective_log_softmax(logits, token_ids, temperature, chosen, inplace_backward)


def grpo_rank_loss_from_logits(
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (B, T)
    oracle_ranks: Tensor | None = None,  # (N, G) or (B,)
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
    **arguments: Unpack[LossArguments],
) -> LossOutput:
    """Return the GRPO_rank loss of sampled tokens from the logits that predict them; no copy of them is made.

    Args:
        logits: (B, T, V) float, already aligned with `token_ids`; differentiable.
        token_ids: (B, T) int64 or int32 in [0, V) wherever the mask is 1.
        oracle_ranks: As in `grpo_rank_loss`, like every argument not listed here. The entropy comes from the
            logits.
        temperature: Above 0; divides the logits.
        inplace_backward: Let the backward pass overwrite the logits' memory with their gradient. The logits
            must not be used afterwards, and backward runs once. Ignored by the reference and under
            torch.compile.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        `LossOutput`: loss, advantages (B,) (or as given) and stats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.
    """
    checks.floating("logits", logits, ("B", "T", "V"))
    B, T, _ = logits.shape
    like = logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))
    inputs, options = _check(like, (B, T), B, oracle_ranks, **arguments)
    _check_logits(logits, token_ids, temperature, inputs.mask)
    if inputs.mask is not None:
        token_ids = token_ids.where(inputs.mask, 0)
    logps, entropy = _selective_log_softmax(logits, token_ids, temperature, backend, inplace_backward)
    return _token_loss(logps, entropy, inputs, options, backend)


def token_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens from hidden states, a chunk of rows at a time; logits are never
    kept.

    Args:
        hidden: (..., H) float, differentiable (the backward pass makes the logits again).
        weight: (V, H) float, the head.
        token_ids: (...) int64 or int32 in [0, V).
        bias: (V,) float.
        temperature: Above 0; divides the logits.
        return_entropy: Also return the entropy.
        chunk_size: Rows of logits in memory at once; chosen by V where None.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        logps (...) in nats, float32 or wider; with `return_entropy` also the entropy (...) in nats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.
    """
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a tensor of shape (..., H); got {checks.describe(hidden)}")
    _check_head(hidden, weight, bias, temperature, chunk_size)
    checks.token_ids("token_ids", token_ids, tuple(hidden.shape[:-1]), like=hidden)
    checks.ids_in_range("token_ids", token_ids, weight.shape[0], None)
    chosen = backends.select("linear_loss", backend, hidden)
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1)
    if chosen == "reference":
        logps, entropy = reference.linear_logps(rows, weight, bias, ids.long(), temperature)
    else:
        logps, entropy = ops.linear_logps(rows, weight, bias, ids, temperature, chunk_size, chosen)
    logps, entropy = logps.view(token_ids.shape), entropy.view(token_ids.shape)
    return (logps, entropy) if return_entropy else logps


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk_size: int | None
) -> None:
    checks.floating("hidden", hidden, tuple(hidden.shape))
    checks.floating("weight", weight, ("V", hidden.shape[-1]), like=hidden)
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"weight must have the dtype of hidden, {hidden.dtype}; got {checks.describe(weight)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"weight must be (V, H) with V of at least 1; got {checks.describe(weight)}")
    if bias is not None:
        checks.floating("bias", bias, (weight.shape[0],), like=hidden)
    check_number("temperature", temperature, minimum=0.0, strict=True)
    if chunk_size is not None:
        check_number("chunk_size", chunk_size, minimum=1)


def fused_linear_grpo_rank_loss(
    hidden: Tensor,  # (B, T, H) or (M, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (B, T) or (M,)
    oracle_ranks: Tensor | None = None,  # (N, G) or (B,)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    lengths: Tensor | None = None,  # (B,)
    chunk_size: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
    **arguments: Unpack[LossArguments],
) -> LossOutput:
    """Return the GRPO_rank loss of sampled tokens from the hidden states that predict them; logits are never
    kept.

    The gradient is computed in the forward pass, chunk by chunk, with one matmul for the logits, one for the
    gradient of `hidden` and one for that of `weight`. Rows without gradient (masked, A = 0 or clipped while
    `beta` and `entropy_coef` are 0) never reach the last two.

    Args:
        hidden: (B, T, H) float, already aligned with `token_ids`; or (M, H) packed, the responses one after
            another, with `lengths`. Differentiable.
        weight: (V, H) float, the head (an effective weight where the head is adapted); differentiable.
        token_ids: (B, T) or (M,) int64 or int32 in [0, V) wherever the mask is 1.
        oracle_ranks: As in `grpo_rank_loss`, like every argument not listed here; with `lengths` every (B, T)
            there is (M,) here. The entropy comes from the logits.
        bias: (V,) float; differentiable.
        temperature: Above 0; divides the logits.
        lengths: (B,) int64 tokens of each response, their sum M, when packed.
        chunk_size: Rows of logits in memory at once; chosen by V where None.
        process_group: Ranks that hold the head's vocabulary in consecutive shards, in their order: `weight`
            (and `bias`) is this rank's shard, everything else the same on every rank, and so are the loss and
            the gradient of `hidden`. Not under torch.compile.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        `LossOutput`: loss, advantages (B,) (or as given) and stats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.
    """
    checks.floating("hidden", hidden, ("B", "T", "H") if lengths is None else ("M", "H"))
    _check_head(hidden, weight, bias, temperature, chunk_size)
    shape = tuple(hidden.shape[:-1])
    responses = shape[0]
    if lengths is not None:
        responses = _check_lengths(lengths, shape[0], hidden)
    like = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    inputs, options = _check(like, shape, responses, oracle_ranks, **arguments)
    checks.token_ids("token_ids", token_ids, shape, like=hidden)
    vocabulary = weight.shape[0]
    if process_group is not None:
        if backend == "reference":
            raise ValueError("process_group must be None with backend='reference'; got a process group")
        vocabulary = VocabularyShard(process_group, vocabulary, weight.device).vocabulary
    checks.ids_in_range("token_ids", token_ids, vocabulary, inputs.mask)
    if inputs.mask is not None:
        token_ids = token_ids.where(inputs.mask, 0)

    chosen = backends.select("linear_loss", backend, hidden, inputs.group_size)
    if chosen == "reference":
        rows, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1).long()
        logps, entropy = reference.linear_logps(rows, weight, bias, ids, temperature)
        logps, entropy = logps.view(shape), entropy.view(shape)
        if lengths is not None:
            padding = Padding(lengths)
            inputs, logps, entropy = padding.pad_inputs(inputs), padding.pad(logps), padding.pad(entropy)
        return _token_loss(logps, entropy, inputs, options, "reference")
    loss, advantages, stats = ops.linear_loss(
        hidden,
        weight,
        bias,
        token_ids,
        lengths,
        inputs,
        options,
        temperature,
        chunk_size,
        process_group,
        chosen,
    )
    return _output(loss, advantages, stats, inputs, options, entropy_known=True)


def _check_lengths(lengths: Tensor, packed: int, like: Tensor) -> int:
    checks.tensor("lengths", lengths, ("B",), like=like)
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"lengths must be int64 or int32; got {checks.describe(lengths)}")
    if checks.can_read(lengths):
        if (lengths < 0).any():
            raise ValueError(f"lengths must be at least 0; got {int(lengths.min())}")
        if int(lengths.sum()) != packed:
            raise ValueError(f"lengths must add up to the {packed} rows of hidden; got {int(lengths.sum())}")
    return lengths.shape[0]


class GRPORankLoss(nn.Module):
    """The loss with its options fixed at construction.

    Args:
        temperature: Above 0; divides the logits, where the loss sees them.
        backend: "auto", "triton", "cpu" or "reference".
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
        self, *, temperature: float = 1.0, backend: str = "auto", **options: Unpack[LossArguments]
    ) -> None:
        super().__init__()
        tensors = [name for name in options if name in _BATCH_TENSORS]
        if tensors:
            raise TypeError(
                f"{', '.join(tensors)} belong(s) to the call, not to the construction of GRPORankLoss"
            )
        unknown = [name for name in options if name not in LossArguments.__annotations__]
        if unknown:
            raise TypeError(f"GRPORankLoss has no option {', '.join(map(repr, unknown))}")
        check_number("temperature", temperature, minimum=0.0, strict=True)
        self.temperature = temperature
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
        merged: LossArguments = {**self.options, **arguments}
        if logps is not None:
            return grpo_rank_loss(logps, oracle_ranks, entropy=entropy, backend=self.backend, **merged)
        if token_ids is None:
            raise ValueError(f"token_ids must be given with {given[0]}; got None")
        if logits is not None:
            return grpo_rank_loss_from_logits(
                logits, token_ids, oracle_ranks, temperature=self.temperature, backend=self.backend, **merged
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
            temperature=self.temperature,
            lengths=lengths,
            backend=self.backend,
            **merged,
        )

    def extra_repr(self) -> str:
        """Show the options that were set."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


_BATCH_TENSORS = ("advantages", "old_logps", "ref_logps", "mask", "sampling_ratio", "valid")
