// Ranks, penalties and advantages of groups of responses on the CPU: one group after another, groups in parallel.

#include "rank_penalty.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "../checks.h"

// The comparisons of a group are compiled for several instruction sets; the loader picks one.
#if defined(RLAIF_X86_KERNELS) && defined(__GLIBC__) && defined(__GNUC__)
#define RLAIF_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define RLAIF_CLONES
#endif

namespace rlaif {
namespace {

constexpr int64_t kGrain = 512;  // groups a thread takes at least

// How each response compares with all of the group: counts of better and worse ones in both orders, and concordant
// less discordant pairs. Entries at and beyond G are padding.
struct Comparison {
  int32_t oracle_better[kMaxGroup];
  int32_t oracle_worse[kMaxGroup];
  int32_t policy_better[kMaxGroup];
  int32_t policy_worse[kMaxGroup];
  int32_t agreement[kMaxGroup];
};

constexpr int kLanes = 8;  // keys and counts are padded to whole vectors

template <typename T>
inline __attribute__((always_inline)) void compare(const T* oracle, const T* policy, int G, Comparison& counts) {
  const int padded = (G + kLanes - 1) / kLanes * kLanes;
  const size_t bytes = padded * sizeof(int32_t);
  std::memset(counts.oracle_better, 0, bytes);
  std::memset(counts.oracle_worse, 0, bytes);
  std::memset(counts.policy_better, 0, bytes);
  std::memset(counts.policy_worse, 0, bytes);
  std::memset(counts.agreement, 0, bytes);
  for (int j = 0; j < G; ++j) {
    const T a = oracle[j];
    const T b = policy[j];
    for (int i = 0; i < padded; ++i) {
      const int32_t oracle_better = a < oracle[i];
      const int32_t oracle_worse = a > oracle[i];
      const int32_t policy_better = b < policy[i];
      const int32_t policy_worse = b > policy[i];
      counts.oracle_better[i] += oracle_better;
      counts.oracle_worse[i] += oracle_worse;
      counts.policy_better[i] += policy_better;
      counts.policy_worse[i] += policy_worse;
      counts.agreement[i] += (oracle_better & policy_better) + (oracle_worse & policy_worse) -
                             (oracle_better & policy_worse) - (oracle_worse & policy_better);
    }
  }
}

RLAIF_CLONES void compare_all(const float* oracle, const float* policy, int G, Comparison& counts) {
  compare(oracle, policy, G, counts);
}

RLAIF_CLONES void compare_all(const double* oracle, const double* policy, int G, Comparison& counts) {
  compare(oracle, policy, G, counts);
}

template <typename T>
T mean(const T* x, int G) {
  T total = 0;
  for (int i = 0; i < G; ++i) {
    total += x[i];
  }
  return total / T(G);
}

// x - mean x. The mean is rounded once for all of a group: what that leaves is taken off too, but not from what equals
// the mean.
template <typename T>
void centre(const T* x, int G, T* out) {
  const T middle = mean(x, G);
  for (int i = 0; i < G; ++i) {
    out[i] = x[i] - middle;
  }
  const T rest = mean(out, G);
  for (int i = 0; i < G; ++i) {
    out[i] -= out[i] != 0 ? rest : T(0);
  }
}

// (R - mean R) / (std R + eps).
template <typename T>
void zscores(const T* rewards, int G, T* out) {
  centre(rewards, G, out);
  T square = 0;
  for (int i = 0; i < G; ++i) {
    square += out[i] * out[i];
  }
  const T spread = (G > 1 ? std::sqrt(square / T(G - 1)) : T(0)) + T(kZScoreEps);
  for (int i = 0; i < G; ++i) {
    out[i] /= spread;
  }
}

template <typename T>
GroupResult<T> rank_all(const T* scores, const T* ranks, int G, const RankOptions& options, T* advantages,
                        T* penalties) {
  const Kind kind = options.kind;
  const T penalty_weight = static_cast<T>(options.penalty_weight);
  static constexpr Tables<T> tables = make_tables<T>();
  T oracle_key[kMaxGroup];
  T policy_key[kMaxGroup];
  T u[kMaxGroup];
  for (int i = 0; i < G; ++i) {
    oracle_key[i] = kind == Kind::ZScore ? -ranks[i] : ranks[i];
    policy_key[i] = -scores[i];
  }

  for (int i = G; i < (G + kLanes - 1) / kLanes * kLanes; ++i) {
    oracle_key[i] = policy_key[i] = 0;
  }
  Comparison counts;
  compare_all(oracle_key, policy_key, G, counts);

  GroupResult<T> result{};
  result.ranked = G;
  T found = 0;
  T ideal = 0;
  int best = 0;
  int shared = 0;
  int agreement = 0;
  int oracle_untied = 0;
  int policy_untied = 0;
  for (int i = 0; i < G; ++i) {
    const Place oracle{counts.oracle_better[i], G - counts.oracle_better[i] - counts.oracle_worse[i]};
    const Place policy{counts.policy_better[i], G - counts.policy_better[i] - counts.policy_worse[i]};
    agreement += counts.agreement[i];
    oracle_untied += G - oracle.count;
    policy_untied += G - policy.count;
    u[i] = tie_mean(tables.gain, oracle);
    penalties[i] = penalty_of(kind, u[i], tie_mean(tables.gain, policy));
    const T worth = tie_mean(tables.relevance, oracle);
    found += worth * tie_mean(tables.discount, policy);
    ideal += worth * tie_mean(tables.discount, oracle);
    best += oracle.first == 0 ? 1 : 0;
    shared += oracle.first == 0 && policy.first == 0 ? 1 : 0;
    result.has_signal = result.has_signal || oracle.count != G;
  }
  result.ndcg = found / ideal;
  result.top1_agreement = T(shared) / T(best);

  const T pairs = T(oracle_untied) * T(policy_untied);
  result.kendall_tau = pairs > 0 ? T(agreement) / std::sqrt(pairs) : T(0);

  if (follows_paper(kind)) {
    centre(penalties, G, advantages);
    for (int i = 0; i < G; ++i) {
      advantages[i] = -advantages[i];
    }
  } else if (!result.has_signal) {  // exact zeros, whatever a mean would round to
    for (int i = 0; i < G; ++i) {
      advantages[i] = 0;
    }
  } else if (kind == Kind::ZScore) {
    zscores(ranks, G, advantages);
  } else {
    const T middle = mean(u, G);
    for (int i = 0; i < G; ++i) {
      advantages[i] = u[i] - middle;
      if (kind == Kind::Directed) {
        advantages[i] *= T(1) + penalty_weight * penalties[i];
      }
    }
    if (kind == Kind::Directed) {
      const T rest = mean(advantages, G);
      for (int i = 0; i < G; ++i) {
        advantages[i] -= rest;
      }
    }
  }
  if (options.scale_group) {
    T square = 0;
    for (int i = 0; i < G; ++i) {
      square += advantages[i] * advantages[i];
    }
    const T rms = std::sqrt(square / T(G)) + T(kScaleEps);
    for (int i = 0; i < G; ++i) {
      advantages[i] /= rms;
    }
  }
  return result;
}

}  // namespace

template <typename T>
GroupResult<T> rank_group(const T* scores, const T* ranks, const bool* judged, T weight, int G,
                          const RankOptions& options, T* advantages, T* penalties) {
  int members[kMaxGroup];
  int count = 0;
  for (int i = 0; i < G; ++i) {
    advantages[i] = penalties[i] = 0;
    if (judged == nullptr || judged[i]) {
      members[count++] = i;
    }
  }
  if (count < kMinRanked) {
    return GroupResult<T>{};
  }
  T score[kMaxGroup], rank[kMaxGroup], advantage[kMaxGroup], penalty[kMaxGroup];
  for (int k = 0; k < count; ++k) {
    score[k] = scores[members[k]];
    rank[k] = ranks[members[k]];
  }
  const GroupResult<T> result = rank_all(score, rank, count, options, advantage, penalty);
  for (int k = 0; k < count; ++k) {
    advantages[members[k]] = advantage[k] * weight;
    penalties[members[k]] = penalty[k];
  }
  return result;
}

template GroupResult<float> rank_group(const float*, const float*, const bool*, float, int, const RankOptions&, float*,
                                       float*);
template GroupResult<double> rank_group(const double*, const double*, const bool*, double, int, const RankOptions&,
                                        double*, double*);

namespace {

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Result rank_penalty_cpu(const at::Tensor& scores,                 // (N, G)
                        const at::Tensor& oracle_ranks,           // (N, G)
                        const std::optional<at::Tensor>& judged,  // (N, G) bool
                        const std::optional<at::Tensor>& weights,  // (N,)
                        c10::string_view kind, double penalty_weight, c10::string_view scale) {
  check_rank_penalty(scores, oracle_ranks, judged, weights);
  const RankOptions rank = rank_options(kind, penalty_weight, scale);
  const int64_t N = scores.size(0);
  const int G = static_cast<int>(scores.size(1));
  const auto s = scores.contiguous();
  const auto r = oracle_ranks.contiguous();
  const auto keep = judged.has_value() ? judged->contiguous() : at::Tensor();
  const auto weight = weights.has_value() ? weights->contiguous() : at::Tensor();
  const auto options = scores.options();
  auto advantages = at::empty({N, G}, options);
  auto penalties = at::empty({N, G}, options);
  auto ndcg = at::empty({N}, options);
  auto tau = at::empty({N}, options);
  auto has_signal = at::empty({N}, options.dtype(at::kBool));
  auto top1 = at::empty({N}, options);

  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "rank_penalty_cpu", [&] {
    const scalar_t* s_data = s.const_data_ptr<scalar_t>();
    const scalar_t* r_data = r.const_data_ptr<scalar_t>();
    const bool* keep_data = keep.defined() ? keep.const_data_ptr<bool>() : nullptr;
    const scalar_t* weight_data = weight.defined() ? weight.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* a_data = advantages.data_ptr<scalar_t>();
    scalar_t* p_data = penalties.data_ptr<scalar_t>();
    scalar_t* ndcg_data = ndcg.data_ptr<scalar_t>();
    scalar_t* tau_data = tau.data_ptr<scalar_t>();
    scalar_t* top1_data = top1.data_ptr<scalar_t>();
    bool* signal_data = has_signal.data_ptr<bool>();
    at::parallel_for(0, N, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const bool* members = keep_data == nullptr ? nullptr : keep_data + n * G;
        const scalar_t group_weight = weight_data == nullptr ? scalar_t(1) : weight_data[n];
        const auto group = rank_group<scalar_t>(s_data + n * G, r_data + n * G, members, group_weight, G, rank,
                                                a_data + n * G, p_data + n * G);
        ndcg_data[n] = group.ndcg;
        tau_data[n] = group.kendall_tau;
        top1_data[n] = group.top1_agreement;
        signal_data[n] = group.has_signal;
      }
    });
  });
  return {advantages, penalties, ndcg, tau, has_signal, top1};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlaif_fast, CPU, m) { m.impl("rank_penalty", &rank_penalty_cpu); }

}  // namespace rlaif
