"""The GRPO_rank loss of token log-probabilities: ranks, advantages, clipped loss, KL and statistics in one
launch.

    J_t  = surrogate(rho_t, A) sampling_ratio_t - beta KL_t + entropy_coef H_t         (see `token_terms`)
    loss = -sum_i w_i sum_t J_t
    w_i  = 1 / (responses tokens_i) "length",  1 / tokens "tokens",  1 / (responses max_length) "constant",
           1 / responses "sum"
    d loss / d logp_t = -w_i (sampling_ratio_t rho_t dJ_t/drho_t - beta dKL_t/dlogp_t)
    d loss / d H_t    = -w_i entropy_coef, or -entropy_coef / tokens

One program reads one response once. Its clipped ratios are summed for either sign of A (see `token_terms`),
so no second pass is needed when A becomes known: the last program of a group to finish ranks its G
responses and closes their sums, and the last group to finish adds up the batch. Only the counters of
finished programs are atomic; all sums run in a fixed order, so equal inputs give equal bits. The gradient
is a second launch, elementwise (`rank_loss_grad`). Never materialised: ratios, clipped ratios, KL, ranks,
(G, G) comparisons. Any float dtype in, float32 inside and out.

Letters: N groups, G responses a group (the last may be short where there are no ranks), B rows, T tokens.
Suffixes: _i response of a group, _t token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlaif_fast.loss.inputs import TokenGradients, TokenInputs
from rlaif_fast.loss.options import MAX_GROUP_SIZE, STATS, LossOptions
from rlaif_fast_kernels.launch import AotConfig, refuse, unavailable
from rlaif_fast_kernels.rank_close import (
    GROUP_SUMS,
    ROW_ENTROPY,
    ROW_KL,
    ROW_LOG_RATIO,
    ROW_LOWER,
    ROW_OVER,
    ROW_RATIO,
    ROW_RATIO_MAX,
    ROW_SCORE,
    ROW_SUMS,
    ROW_TOKENS,
    ROW_UNDER,
    ROW_UPPER,
    close_batch,
    close_group,
)
from rlaif_fast_kernels.rank_loss_grad import rank_loss_grad_kernel, write_gradient
from rlaif_fast_kernels.token_terms import (
    importance_ratio,
    kl_and_surrogate,
    kl_term,
    load_float,
    one_sided,
    policy_arguments,
)

__all__ = ["aot_configs", "rank_loss", "supports", "unavailable"]


def launch_config(T: int, G: int) -> dict[str, int]:
    BLOCK_T = min(1024, max(64, triton.next_power_of_2(T)))
    return {
        "GP": triton.next_power_of_2(G),
        "BLOCK_T": BLOCK_T,
        "num_warps": 4 if G <= 32 else 8,
        "num_stages": 1,
    }


@triton.jit
def rank_loss_kernel(
    logps,  # (B, T)
    old_logps,  # (B, T) or None
    ref_logps,  # (B, T) or None
    mask,  # (B, T) uint8 or None
    sampling_ratio,  # (B, T) or None
    entropy,  # (B, T) or None
    given,  # (B,) or, PER_TOKEN, (B, T) advantages; None where there are ranks
    oracle_ranks,  # (B,) or None
    scores,  # (B,) or None
    judged,  # (B,) uint8 or None
    weights,  # (N,) or None
    valid,  # (N,) uint8 or None
    num_items,  # scalar or None
    num_tokens,  # scalar or None
    advantages,  # (B,) out, where there are ranks
    row_slopes,  # (B,) out, dJ/dlogp of every token of a response, SEQUENCE only
    row_weights,  # (B,) out, w
    entropy_weight,  # scalar out, ENTROPY_TOKENS only
    row_sums,  # (ROW_SUMS, B) scratch
    group_sums,  # (GROUP_SUMS, N) scratch
    finished,  # (N + 1,) int32 zeros: programs of a group, groups
    loss_out,  # scalar
    stats_out,  # (len(STATS),)
    B,
    N,
    G,
    T,
    penalty_weight,
    low,
    high,
    delta,  # or None
    dual_clip,  # or None
    tau_pos,
    tau_neg,
    beta,
    kl_clamp,  # or None
    entropy_coef,
    max_length,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    KL: tl.constexpr,
    UNBIASED: tl.constexpr,
    SURROGATE: tl.constexpr,
    AGGREGATE: tl.constexpr,
    ENTROPY_TOKENS: tl.constexpr,
    SKIP_EMPTY: tl.constexpr,
    SEQUENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = row // G
    length = T if valid is None else tl.where(tl.load(valid + group) != 0, T, 0)

    zero = tl.zeros((BLOCK_T,), tl.float32)
    tokens, score, upper_sum, lower_sum, kl_sum, entropy_sum = zero, zero, zero, zero, zero, zero
    low_count, high_count, rho_sum, rho_max, log_ratio_sum = zero, zero, zero, zero, zero
    for t in tl.range(0, length, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        at = row * T + offs_t
        live = offs_t < length
        if mask is not None:
            live = live & (tl.load(mask + at, mask=live, other=0) != 0)
        one = tl.where(live, 1.0, 0.0)
        logp = load_float(logps, at, live)
        old = logp if old_logps is None else load_float(old_logps, at, live)
        weight = one if sampling_ratio is None else load_float(sampling_ratio, at, live)
        upper_weight_t, lower_weight_t, is_upper, is_lower = weight, weight, one, one
        if PER_TOKEN:  # A is known: fold it into the one-sided sums
            A = load_float(given, at, live)
            upper_weight_t = weight * tl.maximum(A, 0.0, propagate_nan=tl.PropagateNan.ALL)
            lower_weight_t = weight * tl.minimum(A, 0.0, propagate_nan=tl.PropagateNan.ALL)
            is_upper, is_lower = tl.where(A > 0, 1.0, 0.0), tl.where(A < 0, 1.0, 0.0)

        tokens += one
        score += old
        rho = importance_ratio(logp - old)
        if SEQUENCE:  # the ratio is one a response: only the weights can be summed here
            log_ratio_sum += logp - old
            upper_sum += upper_weight_t
            lower_sum += lower_weight_t
            low_count += is_lower
            high_count += is_upper
        else:
            upper, lower = one_sided(rho, logp, low, high, delta, dual_clip, tau_pos, tau_neg, SURROGATE)
            upper_sum += upper_weight_t * upper
            lower_sum += lower_weight_t * lower
            low_count += tl.where(rho < low, is_lower, 0.0)
            high_count += tl.where(rho > high, is_upper, 0.0)
            rho_sum += rho * one
            rho_max = tl.maximum(rho_max, rho * one)
        if ref_logps is not None:
            x = load_float(ref_logps, at, live) - logp
            kl_t, _ = kl_term(x, logp - old, rho, kl_clamp, KL, UNBIASED)
            kl_sum += kl_t * one
        if entropy is not None:
            entropy_sum += load_float(entropy, at, live)

    mine = row_sums + row
    tl.store(mine + ROW_TOKENS * B, tl.sum(tokens))
    tl.store(mine + ROW_SCORE * B, tl.sum(score))
    tl.store(mine + ROW_UPPER * B, tl.sum(upper_sum))
    tl.store(mine + ROW_LOWER * B, tl.sum(lower_sum))
    tl.store(mine + ROW_KL * B, tl.sum(kl_sum))
    tl.store(mine + ROW_ENTROPY * B, tl.sum(entropy_sum))
    tl.store(mine + ROW_UNDER * B, tl.sum(low_count))
    tl.store(mine + ROW_OVER * B, tl.sum(high_count))
    tl.store(mine + ROW_RATIO * B, tl.sum(rho_sum))
    tl.store(mine + ROW_RATIO_MAX * B, tl.max(rho_max))
    tl.store(mine + ROW_LOG_RATIO * B, tl.sum(log_ratio_sum))

    # The last program of the group to get here sees what the others stored before their own increment.
    tl.debug_barrier()
    responses = tl.minimum(G, B - group * G).to(tl.int32)
    if tl.atomic_add(finished + group, 1, sem="acq_rel") == responses - 1:
        close_group(
            row_sums, given, oracle_ranks, scores, judged, weights, valid, advantages, row_slopes, group_sums,
            group, responses, B, N, G, penalty_weight, low, high, delta, dual_clip, max_length,
            KIND, SCALE, SCORE, AGGREGATE, SKIP_EMPTY, SEQUENCE, PER_TOKEN, GP,
        )  # fmt: skip
        tl.debug_barrier()
        if tl.atomic_add(finished + N, 1, sem="acq_rel") == N - 1:
            has_ranks: tl.constexpr = oracle_ranks is not None
            close_batch(
                row_sums, group_sums, valid, num_items, num_tokens, row_weights, entropy_weight, loss_out,
                stats_out, B, N, G, beta, entropy_coef, max_length, AGGREGATE, ENTROPY_TOKENS, has_ranks, 128,
            )  # fmt: skip


def rank_loss(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # like logps
    inputs: TokenInputs,
    options: LossOptions,
) -> TokenGradients:
    """Return the loss of `reference.rank_loss` and its gradient, in two launches."""
    advantages, oracle_ranks, sampling_ratio = inputs.advantages, inputs.oracle_ranks, inputs.sampling_ratio
    B, T = logps.shape
    device = logps.device
    per_token = advantages is not None and advantages.shape == logps.shape
    if oracle_ranks is not None:
        N, G = oracle_ranks.shape
    else:
        G = max(1, min(MAX_GROUP_SIZE, B))
        N = triton.cdiv(B, G)

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().expand(logps.shape).contiguous()

    def bits(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous().view(torch.uint8)

    tokens = [
        flat(logps),
        flat(inputs.old_logps),
        flat(inputs.ref_logps),
        bits(inputs.mask),
        flat(sampling_ratio),
    ]
    given, ranks, scores, weights = (
        None if x is None else x.detach().contiguous()
        for x in (advantages, oracle_ranks, inputs.scores, inputs.weights)
    )
    valid = bits(inputs.valid)
    computed = torch.empty(B, dtype=torch.float32, device=device)
    row_slopes, row_weights = torch.empty_like(computed), torch.empty_like(computed)
    entropy_weight = torch.empty((), dtype=torch.float32, device=device)
    loss = torch.zeros((), dtype=torch.float32, device=device)
    stats = torch.zeros(len(STATS), dtype=torch.float32, device=device)
    grad_logps = torch.empty(logps.shape, dtype=torch.float32, device=device)
    grad_entropy = None if entropy is None else torch.empty_like(grad_logps)
    entropy_coef = options.entropy_coef if entropy is not None else 0.0
    beta = options.beta if inputs.ref_logps is not None else 0.0
    if B:
        config = launch_config(T, G)
        with torch.cuda.device_of(logps):
            rank_loss_kernel[(B,)](
                *tokens,
                flat(entropy),
                given,
                *(ranks, scores, bits(inputs.judged), weights, valid),
                *(inputs.num_items, inputs.num_tokens),
                *(computed, row_slopes, row_weights, entropy_weight),
                torch.empty((ROW_SUMS, B), dtype=torch.float32, device=device),
                torch.empty((GROUP_SUMS.value, N), dtype=torch.float32, device=device),
                torch.zeros(N + 1, dtype=torch.int32, device=device),
                loss,
                stats,
                *(B, N, G, T),
                options.penalty_weight,
                *policy_arguments(options),
                *(beta, options.kl_clamp, entropy_coef, float(options.max_completion_length or 1)),
                KIND=options.kind,
                SCALE=options.scale,
                SCORE=options.score,
                **kl_and_surrogate(options),
                AGGREGATE=options.aggregate,
                ENTROPY_TOKENS=options.entropy_aggregate == "tokens",
                SKIP_EMPTY=options.empty_rows == "skip",
                SEQUENCE=options.per_sequence,
                PER_TOKEN=per_token,
                **config,
            )
        if beta == 0.0:
            tokens[2] = None  # a KL that is only reported has no gradient
        write_gradient(
            tokens,
            valid,
            computed if given is None else given,
            row_slopes,
            row_weights,
            entropy_weight,
            grad_logps,
            grad_entropy,
            G,
            beta,
            entropy_coef,
            per_token,
            options,
            config,
        )
    return TokenGradients(
        loss, computed if advantages is None else advantages.detach(), stats, grad_logps, grad_entropy
    )


def supports(op: str, device_type: str, dtype: torch.dtype, group_size: int | None) -> str | None:
    """Return why the kernel cannot take such logps, or None."""
    return refuse("logps", device_type, dtype, group_size)


def aot_configs() -> list[AotConfig]:
    """The configurations that the ahead-of-time gate compiles."""
    token_arrays = ("logps", "old_logps", "ref_logps", "sampling_ratio", "entropy")
    groups = ("oracle_ranks", "scores", "weights", "num_items", "num_tokens", "entropy_weight")
    types = dict.fromkeys((*token_arrays, *groups), "*fp32:16")
    types |= dict.fromkeys(("mask", "valid", "judged"), "*u8:16") | dict.fromkeys(("B", "N", "G", "T"), "i32")
    types |= dict.fromkeys(("row_slopes", "row_weights"), "*fp32:16")
    numbers = ("penalty_weight", "low", "high", "tau_pos", "tau_neg", "beta", "entropy_coef", "max_length")
    types |= dict.fromkeys(numbers, "fp32")
    scratch = dict.fromkeys(("advantages", "row_sums", "group_sums", "loss_out", "stats_out"), "*fp32:16")
    outputs = dict.fromkeys(("A", "grad_logps", "grad_entropy"), "*fp32:16")
    absent = dict.fromkeys(("given", "delta", "dual_clip", "kl_clamp"))
    kinds = {"KIND": "directed", "SCALE": "none", "SCORE": "mean", "AGGREGATE": "length", "SKIP_EMPTY": False}
    kinds |= {"KL": "k3", "UNBIASED": False, "SURROGATE": "clip", "ENTROPY_TOKENS": False}
    configs = []
    for T, G, sequence in ((512, 8, False), (4096, 64, True)):
        launch = launch_config(T, G)
        flags = {"SEQUENCE": sequence, "PER_TOKEN": False, "GP": launch["GP"], "BLOCK_T": launch["BLOCK_T"]}
        label = f"T={T} G={G}" + " sequence" * sequence
        for kernel, extra in (
            (rank_loss_kernel, scratch | {"finished": "*i32:16"}),
            (rank_loss_grad_kernel, outputs),
        ):
            known = kernel.arg_names
            signature = {name: kind for name, kind in (types | extra).items() if name in known}
            constexprs = {name: value for name, value in (absent | kinds | flags).items() if name in known}
            configs.append(
                AotConfig(kernel, signature, constexprs, launch["num_warps"], launch["num_stages"], label)
            )
    return configs
