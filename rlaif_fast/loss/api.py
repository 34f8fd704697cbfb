"""The GRPO_rank loss from log-probabilities, from logits, or from hidden states and the head's weight.

    rho_t  = exp(logp_t - old_logp_t)
    J_t    = min(rho_t * A, clip(rho_t, 1 - epsilon, 1 + epsilon_high) * A) - beta * KL_t + entropy_coef * H_t
    loss   = -aggregate(J)

Letters: N groups, G responses a group, B = N * G rows (the rows of a group adjacent), T tokens, M packed tokens, H
hidden, V vocabulary. Everything is differentiable once, in ordinary autograd (not under `torch.func`); the kernels use
no floating point atomics, so equal inputs give equal bits on one machine and thread count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import Unpack

from rlaif_fast.loss import checks, ops, values
from rlaif_fast.loss.grouping import close_groups, rank_by_index
from rlaif_fast.loss.inputs import Head, LossArguments, Padding, RankAdvantages
from rlaif_fast.loss.options import RankOptions
from rlaif_fast.loss.output import LossOutput, named
from rlaif_fast.loss.vocabulary_shard import VocabularyShard

__all__ = [
    "LossArguments",
    "LossOutput",
    "fused_linear_grpo_rank_loss",
    "grpo_rank_loss",
    "grpo_rank_loss_from_logits",
    "rank_advantages",
    "selective_log_softmax",
    "token_logps",
]


def rank_advantages(
    scores: Tensor,  # (N, G), or (B,) with group_index
    oracle_ranks: Tensor,  # like scores
    *,
    kind: str = "directed",
    penalty_weight: float = 1.0,
    scale: str = "none",
    judged: Tensor | None = None,  # like scores, bool
    weights: Tensor | None = None,  # (N,)
    valid: Tensor | None = None,  # (N,) bool
    group_index: Tensor | None = None,  # (B,)
    validate: bool = True,
    backend: str = "auto",
) -> RankAdvantages:
    """Turn the oracle's ranks of N groups of G responses into advantages.

    Args:
        scores: (N, G) float, the policy's log-probability of each response; higher is more likely. It only
            orders the responses, and with `kind="oracle"` or `"zscore"` does not touch the advantages.
        oracle_ranks: (N, G) int or float, 0 is best and equal numbers tie; only the order counts. With
            `kind="zscore"` they are scalar rewards instead: higher is better.
        kind: "directed" (default), "oracle", "paper", "paper_swapped" or "zscore".
        penalty_weight: w >= 0, how much more a misranked response weighs ("directed").
        scale: "none", or "group" to divide by the root mean square over the group.
        judged: (N, G) bool; a response without a verdict is false: its advantage is 0, and the others are a
            smaller group. A group with fewer than two judged responses has no signal.
        weights: (N,) float that multiply the advantages of each group (the oracle's confidence).
        valid: (N,) bool; a group whose ranking failed is false and gets advantages of 0.
        group_index: (B,) int64 or int32, for responses in any order and groups of unequal size: equal numbers
            are a group. `scores`, `oracle_ranks` and `judged` are then (B,), as are advantages and penalties;
            (N,) tensors are in ascending order of the index. A trainer that shuffles or splits its rows
            should make advantages where all rows of a group are together.
        validate: Whether values are checked, which synchronises with an accelerator; False trusts the caller.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        `RankAdvantages`, in the dtype of `scores`.

    Raises:
        ValueError: A shape, device or value does not fit.
        TypeError: A dtype or type does not fit.

    Source: arXiv 2510.02561 (GRPO_rank).
    """
    options = RankOptions(kind, penalty_weight, scale)
    if group_index is not None:
        rest = (judged, weights, valid, options, validate, backend)
        return rank_by_index(scores, oracle_ranks, group_index, *rest)[0]
    inputs = checks.rank_inputs(scores, oracle_ranks, judged, weights, valid, options, validate)
    return ops.rank_advantages(inputs, options, backend)


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
        advantages: (B,), (B, 1) or (B, T) float, from any trainer, in place of `oracle_ranks` and all that belongs to
            them (`kind`, `penalty_weight`, `scale`, `score`, `scores`, `judged`, `weights`, `valid`).
        group_size: G, where `oracle_ranks` is flat.
        old_logps: (B, T) float under the policy that sampled. None is on-policy: the ratio is 1 with the
            gradient of `logps`. Where they are given, the policy's own order is taken from them too.
        ref_logps: (B, T) float under the reference policy; needed when `beta` is not 0.
        mask: (B, T) bool, or 0/1 of any dtype; a token that is 0 contributes nothing, whatever values it has.
        sampling_ratio: (B, T), (B, 1) or (B,) float weight of the policy term (trainer against sampler
            mismatch).
        entropy: (B, T) float in nats, differentiable; needed when `entropy_coef` is not 0.
        kind: "directed" (default), "oracle", "paper", "paper_swapped" or "zscore".
        penalty_weight: w >= 0 of the directed advantage.
        scale: "none", or "group" to divide advantages by their root mean square over the group.
        score: "mean" (per token) or "sum": which log-probability of a response orders the policy's responses. One
            without a token stands last.
        scores: (N, G) float, what orders the policy's responses; else `old_logps` do, else `logps`.
        judged: (N, G) bool; a response without a verdict is false: its advantage is 0, its tokens still count,
            and the others are a smaller group.
        weights: (N,) float that multiply the advantages of each group.
        valid: (N,) bool; a group that is false has advantages of 0 and counts in no average.
        group_index: (B,) int, see `rank_advantages`: `oracle_ranks`, `scores` and `judged` are then (B,).
        epsilon: The ratio is clipped below at 1 - epsilon and, by default, above at 1 + epsilon.
        epsilon_high: The upper bound instead.
        delta: Upper bound on the ratio where clipping does not bound it (two-sided clipping).
        dual_clip: Above 1; where A < 0 the policy term is at least dual_clip * A.
        beta: Weight of the KL term.
        kl: "k3" (default), "k1" or "k2".
        kl_clamp: Above 0; keeps the estimate within +-kl_clamp (verl and ms-swift: 10; TRL: None).
        unbiased_kl: Multiply the estimate by the ratio (importance sampling correction).
        entropy_coef: Weight of the entropy bonus.
        entropy_aggregate: "loss" (default) averages the entropy as `loss_type` does the policy term; "tokens"
            is TRL's: the mean over the tokens of this batch, whatever the loss type.
        loss_type: "grpo" mean over responses of the mean over tokens; "dapo" and "bnpo" mean over tokens;
            "dr_grpo" sum over (responses * max_completion_length); "luspo" mean over responses of the sum;
            "cispo" as "dapo", the bounded ratio a constant weight of logp; "sapo" as "grpo", a soft gate in
            place of the clip.
        empty_rows: "count" (default; TRL, Liger) or "skip" (verl, OpenRLHF) responses without a token in the
            number of responses.
        cispo_bound: "relative" (default) bounds the ratio of "cispo" by 1 + epsilon_high, "absolute" (TRL,
            Liger) by epsilon_high.
        sapo_temperature_pos, sapo_temperature_neg: Temperature of the "sapo" gate where A > 0, and elsewhere.
        max_completion_length: Tokens; needed for "dr_grpo".
        num_items_in_batch: Above 0; divides in place of the number of tokens ("dapo", "bnpo", "cispo") or of
            responses (the others) when the batch is part of a larger one: that of the whole divided by the
            number of processes.
        importance_sampling_level: "token", or "sequence": one ratio a response, the geometric mean (GSPO).
        validate: Whether values are checked, which synchronises with an accelerator; False trusts the caller.
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
    shape, wide = tuple(logps.shape), _wide(logps)
    oracle_ranks, arguments, extra = close_groups(wide, shape, logps, oracle_ranks, arguments, None, backend)
    inputs, options = checks.loss_inputs(wide, shape, shape[0], oracle_ranks, arguments)
    if options.entropy_coef != 0.0 and entropy is None:
        raise ValueError(
            f"entropy must be given when entropy_coef is not 0; got None with {options.entropy_coef}"
        )
    closed = ops.rank_loss(logps, entropy, inputs, options, backend)
    return named(closed, inputs, options, entropy is not None, extra)


def grpo_rank_loss_from_logits(
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (B, T)
    oracle_ranks: Tensor | None = None,  # (N, G) or (B,)
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
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
        temperature: Above 0; divides the logits. A tensor like `token_ids` has one for each token. docs/kernels.md
            says how much precision a low one costs the gradient in float32.
        logit_softcap: Above 0; bounds the logits: cap * tanh(logits / cap), before the temperature.
        logit_scale: Above 0; multiplies the logits, before the cap.
        inplace_backward: Let the backward pass overwrite the logits' memory with their gradient. Backward then runs
            once, and raises if the logits changed meanwhile; other backward passes that read them raise too.
            Ignored by the reference and under torch.compile.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        `LossOutput`: loss, advantages (B,) (or as given) and stats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.
    """
    checks.floating("logits", logits, ("B", "T", "V"))
    B, T, _ = logits.shape
    wide, validate = _wide(logits), arguments.get("validate", True)
    checks.loss_options(arguments)
    mask = checks.mask(arguments.get("mask"), (B, T), logits, validate)
    checks.logits(logits, token_ids, mask, validate)
    scaling = checks.scaling(temperature, logit_softcap, logit_scale, (B, T), logits, validate)
    if mask is not None:
        token_ids = token_ids.where(mask, 0)
    indexed = arguments.get("group_index") is not None  # the policy's order may then be that of `logps`
    if not indexed:
        inputs, options = checks.loss_inputs(wide, (B, T), B, oracle_ranks, arguments)
        mask = inputs.counting(None)  # rows of invalid groups may be anything too
    logps, entropy = ops.selective_log_softmax(logits, token_ids, scaling, backend, inplace_backward, mask)
    oracle_ranks, arguments, extra = close_groups(wide, (B, T), logps, oracle_ranks, arguments, None, backend)
    if indexed:
        inputs, options = checks.loss_inputs(wide, (B, T), B, oracle_ranks, arguments)
    closed = ops.rank_loss(logps, entropy, inputs, options, backend)
    return named(closed, inputs, options, entropy is not None, extra)


def fused_linear_grpo_rank_loss(
    hidden: Tensor,  # (B, T, H) or (M, H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (B, T) or (M,)
    oracle_ranks: Tensor | None = None,  # (N, G) or (B,)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    lengths: Tensor | None = None,  # (B,)
    chunk_size: int | None = None,
    process_group: ProcessGroup | None = None,
    float32_weight: Tensor | None = None,  # (V, H)
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
        temperature, logit_softcap, logit_scale: As in `grpo_rank_loss_from_logits`.
        lengths: (B,) int64 tokens of each response, their sum M, when packed. Where M is B and a length is 0, flat
            `advantages` and `sampling_ratio` could mean responses or tokens, and are refused.
        chunk_size: Rows of logits in memory at once; chosen by V where None.
        process_group: Ranks that hold the head's vocabulary in consecutive shards, in their order: `weight`
            (and `bias`) is this rank's shard, everything else the same on every rank, and so are the loss and
            the gradient of `hidden`. Not under torch.compile.
        float32_weight: (V, H) float32 leaf of which a bfloat16 `weight` is the rounding, as an optimizer keeps
            it: the weight's gradient is its gradient, summed and scaled in float32, and `weight` gets none.
        backend: "auto", "triton", "cuda", "cpu" or "reference".

    Returns:
        `LossOutput`: loss, advantages (B,) (or as given) and stats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.
    """
    checks.floating("hidden", hidden, ("B", "T", "H") if lengths is None else ("M", "H"))
    checks.head(hidden, weight, bias, chunk_size, float32_weight)
    shape, wide, validate = tuple(hidden.shape[:-1]), _wide(hidden), arguments.get("validate", True)
    responses = shape[0] if lengths is None else checks.lengths(lengths, shape[0], hidden, arguments)
    scaling = checks.scaling(temperature, logit_softcap, logit_scale, shape, hidden, validate)
    padding = None
    if lengths is not None and arguments.get("group_index") is not None:
        padding = Padding(lengths, shape[0])
    oracle_ranks, arguments, extra = close_groups(
        wide, shape, None, oracle_ranks, arguments, padding, backend
    )
    inputs, options = checks.loss_inputs(wide, shape, responses, oracle_ranks, arguments)
    checks.integers("token_ids", token_ids, shape, like=hidden)
    if process_group is not None and backend == "reference":
        raise ValueError("process_group must be None with backend='reference'")
    rows = weight.shape[0]
    shard = None if process_group is None else VocabularyShard(process_group, rows, weight.device)
    vocabulary = rows if shard is None else shard.vocabulary
    values.ids_in_range(token_ids, vocabulary, inputs.mask, validate)
    if inputs.mask is not None:
        token_ids = token_ids.where(inputs.mask, 0)
    rest = (token_ids, lengths, inputs, options, chunk_size, shard, backend)
    closed = ops.linear_loss(hidden, Head(weight, bias, scaling, float32_weight), *rest)
    return named(closed, inputs, options, True, extra)


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    *,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    validate: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each chosen token, and on request the entropy of its distribution.

    Args:
        logits: (..., V) float, differentiable; never copied.
        token_ids: (...) int64 or int32 in [0, V).
        temperature: Above 0; divides the logits. A tensor like `token_ids` has one for each token.
        logit_softcap: Above 0; bounds the logits: cap * tanh(logits / cap), before the temperature.
        logit_scale: Above 0; multiplies the logits, before the cap.
        return_entropy: Also return the entropy.
        validate: Whether values are checked, which synchronises with an accelerator; False trusts the caller.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        logps (...) in nats, float32 or wider; with `return_entropy` also the entropy (...) in nats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.
    """
    checks.check_flag("return_entropy", return_entropy)
    checks.logits(logits, token_ids, None, validate)
    shape = tuple(token_ids.shape)
    scaling = checks.scaling(temperature, logit_softcap, logit_scale, shape, logits, validate)
    logps, entropy = ops.selective_log_softmax(logits, token_ids, scaling, backend)
    return (logps, entropy) if return_entropy else logps


def token_logps(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    validate: bool = True,
    chunk_size: int | None = None,
    float32_weight: Tensor | None = None,  # (V, H)
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens from hidden states, a chunk of rows at a time; logits are never
    kept.

    Args:
        hidden: (..., H) float, differentiable (the backward pass makes the logits again).
        weight: (V, H) float, the head.
        token_ids: (...) int64 or int32 in [0, V).
        bias: (V,) float.
        temperature: Above 0; divides the logits. A tensor like `token_ids` has one for each token.
        logit_softcap: Above 0; bounds the logits: cap * tanh(logits / cap), before the temperature.
        logit_scale: Above 0; multiplies the logits, before the cap.
        return_entropy: Also return the entropy.
        validate: Whether values are checked, which synchronises with an accelerator; False trusts the caller.
        chunk_size: Rows of logits in memory at once; chosen by V where None.
        float32_weight: As in `fused_linear_grpo_rank_loss`.
        backend: "auto", "triton", "cpu" or "reference".

    Returns:
        logps (...) in nats, float32 or wider; with `return_entropy` also the entropy (...) in nats.

    Raises:
        ValueError: A shape, device or value does not fit (the message names the argument).
        TypeError: A dtype or type does not fit.
    """
    checks.check_flag("return_entropy", return_entropy)
    checks.head(hidden, weight, bias, chunk_size, float32_weight)
    shape = tuple(hidden.shape[:-1])
    checks.integers("token_ids", token_ids, shape, like=hidden)
    values.ids_in_range(token_ids, weight.shape[0], None, validate)
    scaling = checks.scaling(temperature, logit_softcap, logit_scale, shape, hidden, validate)
    head, rows = Head(weight, bias, scaling, float32_weight), hidden.reshape(-1, hidden.shape[-1])
    logps, entropy = ops.linear_logps(rows, head, token_ids.reshape(-1), chunk_size, backend)
    logps, entropy = logps.view(token_ids.shape), entropy.view(token_ids.shape)
    return (logps, entropy) if return_entropy else logps


def _wide(x: Tensor) -> Tensor:
    """Return a scalar of the device of `x` and the dtype of its statistics."""
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
