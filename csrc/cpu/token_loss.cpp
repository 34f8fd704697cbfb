// The loss over token log-probabilities on the CPU, with its gradient and its statistics: one pass over the tokens of
// each response for the scores where they are needed, the ranking of each group, one pass for the loss.
//
// Letters: N groups, G responses a group, B = N * G rows, T tokens.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "../checks.h"
#include "../options.h"
#include "rank_penalty.h"

namespace rlaif {
namespace {

constexpr int64_t kGrainTokens = 8192;  // tokens a thread takes at least

// Sums over the tokens of one response. They are added up in the order of the rows, so the result does not depend on
// the number of threads.
struct RowSums {
  double policy = 0;  // weighted
  double kl_weighted = 0;
  double entropy_weighted = 0;
  double kl = 0;
  double entropy = 0;
  double clip_low = 0;
  double clip_high = 0;
  double ratio = 0;
  double ratio_max = 0;

  void add(const RowSums& other) {
    policy += other.policy;
    kl_weighted += other.kl_weighted;
    entropy_weighted += other.entropy_weighted;
    kl += other.kl;
    entropy += other.entropy;
    clip_low += other.clip_low;
    clip_high += other.clip_high;
    ratio += other.ratio;
    ratio_max = other.ratio_max <= ratio_max ? ratio_max : other.ratio_max;  // keeps a NaN
  }
};

// An optional input (B, T), (B, 1) or (B,), read as (B, T).
template <typename T>
struct Grid {
  const T* data = nullptr;
  int64_t row = 0;
  int64_t column = 0;

  bool given() const { return data != nullptr; }
  T operator()(int64_t b, int64_t t) const { return data[b * row + t * column]; }
};

template <typename T>
Grid<T> grid_of(const char* name, const std::optional<at::Tensor>& x, const at::Tensor& like, at::ScalarType dtype) {
  if (!x.has_value()) {
    return {};
  }
  TORCH_CHECK_TYPE(x->scalar_type() == dtype, name, " must be ", dtype, "; got ", x->scalar_type());
  const bool per_row = x->dim() == 1 || x->size(1) == 1;
  TORCH_CHECK_VALUE((x->dim() == 1 || x->dim() == 2) && x->size(0) == like.size(0) &&
                        (per_row || x->size(1) == like.size(1)),
                    name, " must be (B, T), (B, 1) or (B,) with (B, T) = ", like.sizes(), "; got ", x->sizes());
  return {x->const_data_ptr<T>(), x->stride(0), per_row ? 0 : x->stride(1)};
}

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Result token_loss(const at::Tensor& logps,                          // (B, T)
                  const std::optional<at::Tensor>& entropy,         // (B, T)
                  const std::optional<at::Tensor>& advantages,      // (B,) or (B, T)
                  const std::optional<at::Tensor>& oracle_ranks,    // (N, G)
                  const std::optional<at::Tensor>& scores,          // (N, G)
                  const std::optional<at::Tensor>& judged,          // (N, G) bool
                  const std::optional<at::Tensor>& weights,         // (N,)
                  const std::optional<at::Tensor>& valid,           // (N,) bool
                  const std::optional<at::Tensor>& old_logps,       // (B, T)
                  const std::optional<at::Tensor>& ref_logps,       // (B, T)
                  const std::optional<at::Tensor>& mask,            // (B, T) bool
                  const std::optional<at::Tensor>& sampling_ratio,  // (B, T) or (B, 1)
                  const std::optional<at::Tensor>& num_items,       // scalar
                  const std::optional<at::Tensor>& num_tokens,      // scalar
                  RLAIF_LOSS_PARAMETERS) {
  TORCH_CHECK_VALUE(logps.dim() == 2, "logps must be (B, T); got ", logps.sizes());
  TORCH_CHECK_VALUE(advantages.has_value() != oracle_ranks.has_value(),
                    "exactly one of advantages and oracle_ranks must be given");
  const LossOptions loss_of = loss_options(RLAIF_LOSS_ARGUMENTS);
  const bool sequence_level = loss_of.sequence_level;
  const int64_t B = logps.size(0);
  const int64_t T = logps.size(1);
  int64_t N = 0;
  int G = 1;
  at::Tensor ranks, given_scores, group_judged, group_weights, group_valid;
  if (oracle_ranks.has_value()) {
    TORCH_CHECK_VALUE(oracle_ranks->dim() == 2, "oracle_ranks must be (N, G); got ", oracle_ranks->sizes());
    N = oracle_ranks->size(0);
    G = static_cast<int>(oracle_ranks->size(1));
    TORCH_CHECK_VALUE(N * G == B, "oracle_ranks must be (N, G) with N * G = ", B, "; got ", oracle_ranks->sizes());
    check_rank_penalty(at::empty({N, G}, logps.options()), *oracle_ranks, judged, weights);
    check_optional("valid", valid, {N}, at::kBool, logps);
    check_optional("scores", scores, {N, G}, logps.scalar_type(), logps);
    const auto dense = [](const std::optional<at::Tensor>& x) {
      return x.has_value() ? x->contiguous() : at::Tensor();
    };
    ranks = oracle_ranks->contiguous();
    given_scores = dense(scores);
    group_judged = dense(judged);
    group_weights = dense(weights);
    group_valid = dense(valid);
  }
  auto used = at::empty({B}, logps.options());
  auto loss = at::empty({}, logps.options());
  auto stats = at::empty({kStats}, logps.options());
  auto grad_logps = at::empty({B, T}, logps.options());
  auto grad_entropy = at::empty(entropy.has_value() ? at::IntArrayRef({B, T}) : at::IntArrayRef({0}), logps.options());

  AT_DISPATCH_FLOATING_TYPES(logps.scalar_type(), "token_loss_cpu", [&] {
    const auto dtype = logps.scalar_type();
    const Grid<scalar_t> logp = grid_of<scalar_t>("logps", logps, logps, dtype);
    const Grid<scalar_t> given = grid_of<scalar_t>("advantages", advantages, logps, dtype);
    const Grid<scalar_t> old = grid_of<scalar_t>("old_logps", old_logps, logps, dtype);
    const Grid<scalar_t> ref = grid_of<scalar_t>("ref_logps", ref_logps, logps, dtype);
    const Grid<scalar_t> weight_of = grid_of<scalar_t>("sampling_ratio", sampling_ratio, logps, dtype);
    const Grid<scalar_t> ent = grid_of<scalar_t>("entropy", entropy, logps, dtype);
    const Grid<bool> kept = grid_of<bool>("mask", mask, logps, at::kBool);
    const TokenOptions<scalar_t> options = loss_of.token.to<scalar_t>();
    const bool* valid_data = group_valid.defined() ? group_valid.const_data_ptr<bool>() : nullptr;
    scalar_t* a_data = used.data_ptr<scalar_t>();
    scalar_t* g_data = grad_logps.data_ptr<scalar_t>();
    scalar_t* h_data = ent.given() ? grad_entropy.data_ptr<scalar_t>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, kGrainTokens / std::max<int64_t>(1, T));

    const auto row_valid = [&](int64_t b) { return valid_data == nullptr || valid_data[b / G]; };
    const auto active = [&](int64_t b, int64_t t) { return !kept.given() || kept(b, t); };

    // The length of each response, and how likely the policy finds it.
    std::vector<int64_t> length(B, 0);
    std::vector<scalar_t> score(B, 0);
    at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (!row_valid(b)) {
          continue;
        }
        double total = 0;
        for (int64_t t = 0; t < T; ++t) {
          if (active(b, t)) {
            total += old.given() ? old(b, t) : logp(b, t);
            ++length[b];
          }
        }
        if (length[b] == 0) {
          score[b] = std::numeric_limits<scalar_t>::lowest();  // stands last: no sum of logarithms is above 0
        } else {
          score[b] = static_cast<scalar_t>(loss_of.mean_score ? total / length[b] : total);
        }
      }
    });

    // The ranking of each group.
    std::vector<scalar_t> penalty(oracle_ranks.has_value() ? B : 0, 0);
    const scalar_t* score_data = given_scores.defined() ? given_scores.const_data_ptr<scalar_t>() : score.data();
    const bool* judged_data = group_judged.defined() ? group_judged.const_data_ptr<bool>() : nullptr;
    const scalar_t* weight_data = group_weights.defined() ? group_weights.const_data_ptr<scalar_t>() : nullptr;
    double penalty_sum = 0;
    double ndcg = 0;
    double tau = 0;
    double top1 = 0;
    int64_t ranked_groups = 0;
    int64_t ranked = 0;
    int64_t silent = 0;
    for (int64_t n = 0; n < N; ++n) {
      scalar_t* a = a_data + n * G;
      if (valid_data != nullptr && !valid_data[n]) {
        std::fill_n(a, G, scalar_t(0));
        ++silent;
        continue;
      }
      const auto group = rank_group<scalar_t>(
          score_data + n * G, ranks.const_data_ptr<scalar_t>() + n * G,
          judged_data == nullptr ? nullptr : judged_data + n * G,
          weight_data == nullptr ? scalar_t(1) : weight_data[n], G, loss_of.rank, a, penalty.data() + n * G);
      for (int i = 0; i < G; ++i) {
        penalty_sum += penalty[n * G + i];
      }
      ndcg += group.ndcg;
      tau += group.kendall_tau;
      top1 += group.top1_agreement;
      silent += group.has_signal ? 0 : 1;
      ranked += group.ranked;
      ranked_groups += group.ranked > 0 ? 1 : 0;
    }

    int64_t tokens = 0;
    int64_t responses = 0;
    for (int64_t b = 0; b < B; ++b) {
      tokens += length[b];
      responses += row_valid(b) && (length[b] > 0 || !loss_of.skip_empty) ? 1 : 0;
    }
    double items = static_cast<double>(std::max<int64_t>(
        1, loss_of.aggregate == Aggregate::Tokens ? tokens : responses));
    if (num_items.has_value()) {
      items = num_items->item<double>();
    }
    double entropy_items = static_cast<double>(std::max<int64_t>(1, tokens));
    if (num_tokens.has_value()) {
      entropy_items = num_tokens->item<double>();
    }

    std::vector<RowSums> sums(B);
    at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        scalar_t* g = g_data + b * T;
        std::fill_n(g, T, scalar_t(0));
        if (h_data != nullptr) {
          std::fill_n(h_data + b * T, T, scalar_t(0));
        }
        if (length[b] == 0) {
          continue;
        }
        double divisor = items;
        if (loss_of.aggregate == Aggregate::Responses) {
          divisor *= static_cast<double>(length[b]);
        } else if (loss_of.aggregate == Aggregate::Constant) {
          divisor *= loss_of.max_completion_length;
        }
        const scalar_t weight = static_cast<scalar_t>(1 / divisor);
        const scalar_t entropy_weight = loss_of.entropy_over_tokens ? static_cast<scalar_t>(1 / entropy_items) : weight;

        scalar_t shared_log_ratio = 0;
        if (sequence_level) {
          double total = 0;
          for (int64_t t = 0; t < T; ++t) {
            if (active(b, t)) {
              total += old.given() ? logp(b, t) - old(b, t) : logp(b, t) - logp(b, t);
            }
          }
          shared_log_ratio = static_cast<scalar_t>(total / static_cast<double>(length[b]));
        }
        double shared_slope = 0;  // of the response's own log-ratio
        RowSums& row = sums[b];
        for (int64_t t = 0; t < T; ++t) {
          if (!active(b, t)) {
            continue;
          }
          const scalar_t x = logp(b, t);
          const scalar_t log_ratio = sequence_level ? shared_log_ratio : x - (old.given() ? old(b, t) : x);
          const scalar_t advantage = given.given() ? given(b, t) : a_data[b];
          const PolicyTerm<scalar_t> policy = policy_term(log_ratio, x, advantage, options);
          const scalar_t factor = weight_of.given() ? weight_of(b, t) * weight : weight;
          row.policy += static_cast<double>(policy.value) * factor;
          if (sequence_level) {
            shared_slope += static_cast<double>(policy.slope) * factor;
          } else {
            g[t] = -policy.slope * factor;
          }
          row.ratio += policy.ratio;
          row.ratio_max = policy.ratio <= row.ratio_max ? row.ratio_max : static_cast<double>(policy.ratio);
          row.clip_low += policy.ratio < options.clip_low && advantage < 0 ? 1 : 0;
          row.clip_high += policy.ratio > options.clip_high && advantage > 0 ? 1 : 0;
          if (ref.given()) {
            const KlTerm<scalar_t> term = kl_term(ref(b, t) - x, policy, options);
            row.kl += term.value;
            row.kl_weighted += static_cast<double>(term.value) * weight;
            if (options.beta != 0) {
              g[t] += options.beta * term.slope * weight;
            }
          }
          if (ent.given()) {
            row.entropy += ent(b, t);
            row.entropy_weighted += static_cast<double>(ent(b, t)) * entropy_weight;
            h_data[b * T + t] = -options.entropy_coef * entropy_weight;
          }
        }
        if (sequence_level) {
          const scalar_t each = static_cast<scalar_t>(shared_slope / static_cast<double>(length[b]));
          for (int64_t t = 0; t < T; ++t) {
            if (active(b, t)) {
              g[t] -= each;
            }
          }
        }
      }
    });

    RowSums all;
    double low_min = 1;  // shares of the tokens of a response
    double high_max = 0;
    for (int64_t b = 0; b < B; ++b) {
      all.add(sums[b]);
      if (length[b] > 0) {
        low_min = std::min(low_min, sums[b].clip_low / static_cast<double>(length[b]));
        high_max = std::max(high_max, sums[b].clip_high / static_cast<double>(length[b]));
      }
    }
    const double policy_loss = -all.policy;
    const double kl_loss = beta == 0 ? 0 : beta * all.kl_weighted;  // what has no weight may be infinite
    const double entropy_loss = entropy_coef == 0 ? 0 : -entropy_coef * all.entropy_weighted;
    const double per = 1.0 / static_cast<double>(std::max<int64_t>(1, tokens));
    const double per_group = 1.0 / static_cast<double>(std::max<int64_t>(1, ranked_groups));
    *loss.data_ptr<scalar_t>() = static_cast<scalar_t>(policy_loss + kl_loss + entropy_loss);
    const double values[kStats] = {policy_loss,
                                   kl_loss,
                                   entropy_loss,
                                   all.kl * per,
                                   all.entropy * per,
                                   all.clip_low * per,
                                   all.clip_high * per,
                                   all.ratio * per,
                                   all.ratio_max,
                                   penalty_sum / static_cast<double>(std::max<int64_t>(1, ranked)),
                                   ndcg * per_group,
                                   tau * per_group,
                                   top1 * per_group,
                                   static_cast<double>(silent) / static_cast<double>(std::max<int64_t>(1, N)),
                                   static_cast<double>(tokens),
                                   tokens == 0 ? 0 : low_min,
                                   high_max};
    for (int64_t i = 0; i < kStats; ++i) {
      stats.data_ptr<scalar_t>()[i] = static_cast<scalar_t>(values[i]);
    }
    if (advantages.has_value()) {
      used.zero_();
    }
  });
  return {loss, used, stats, grad_logps, grad_entropy};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlaif_fast, CPU, m) { m.impl("token_loss", &token_loss); }

}  // namespace rlaif
