// Ranks, penalties and advantages of groups of responses on a CUDA device: one warp a group, each lane one response
// for G <= 32 and two for G <= 64. Keys travel by shuffles; nothing but the outputs is allocated, so the launch can be
// captured in a graph. No atomics: results are bit-for-bit reproducible.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "../options.h"
#include "../rank_group.h"

namespace rlaif {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxBlocks = 65536;  // beyond it the grid strides

__constant__ Tables<float> kTables = make_tables<float>();

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

// The value of response j, where response i lives in slot i / 32 of lane i % 32.
template <int SLOTS>
__device__ __forceinline__ float from_lane(const float (&x)[SLOTS], int j) {
  if constexpr (SLOTS == 1) {
    return __shfl_sync(kAllLanes, x[0], j);
  } else {
    const float low = __shfl_sync(kAllLanes, x[0], j % kWarp);
    const float high = __shfl_sync(kAllLanes, x[1], j % kWarp);
    return j < kWarp ? low : high;
  }
}

template <int SLOTS>
__global__ void __launch_bounds__(kWarp * kWarpsPerBlock)
    rank_penalty_kernel(const float* __restrict__ scores,        // (N, G)
                        const float* __restrict__ oracle_ranks,  // (N, G)
                        const bool* __restrict__ judged,         // (N, G) or null
                        const float* __restrict__ weights,       // (N,) or null
                        float* __restrict__ advantages,          // (N, G)
                        float* __restrict__ penalties,           // (N, G)
                        float* __restrict__ ndcg,                // (N,)
                        float* __restrict__ kendall_tau,         // (N,)
                        bool* __restrict__ has_signal,       // (N,)
                        float* __restrict__ top1_agreement,      // (N,)
                        int64_t N, int G, Kind kind, float penalty_weight, bool scale_group) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;

  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp; n < N; n += stride) {
    const int64_t base = n * G;
    // Which responses are members of the group: bit i of members[s] is response i + 32 s, the same in all lanes.
    bool member[SLOTS];
    unsigned members[SLOTS];
    int count = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int i = lane + s * kWarp;
      member[s] = i < G && (judged == nullptr || judged[base + i]);
      members[s] = __ballot_sync(kAllLanes, member[s]);
      count += __popc(members[s]);
    }
    if (count < kMinRanked) {  // the same for the whole warp
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const int i = lane + s * kWarp;
        if (i < G) {
          advantages[base + i] = float(0);
          penalties[base + i] = float(0);
        }
      }
      if (lane == 0) {
        ndcg[n] = float(0);
        kendall_tau[n] = float(0);
        top1_agreement[n] = float(0);
        has_signal[n] = false;
      }
      continue;
    }

    float oracle_key[SLOTS];
    float policy_key[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int i = lane + s * kWarp;
      const float rank = member[s] ? oracle_ranks[base + i] : float(0);
      oracle_key[s] = kind == Kind::ZScore ? -rank : rank;
      policy_key[s] = member[s] ? -scores[base + i] : float(0);
    }

    // One round of shuffles serves the places of both orders and the concordant pairs.
    Place oracle[SLOTS] = {};
    Place policy[SLOTS] = {};
    int agreement = 0;
    int oracle_untied = 0;
    int policy_untied = 0;
    for (int j = 0; j < G; ++j) {
      const unsigned word = SLOTS == 1 || j < kWarp ? members[0] : members[SLOTS - 1];  // no indexed registers
      if ((word >> (j % kWarp) & 1) == 0) {
        continue;
      }
      const float other_oracle = from_lane<SLOTS>(oracle_key, j);
      const float other_policy = from_lane<SLOTS>(policy_key, j);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        const int a = sign_of(oracle_key[s], other_oracle);
        const int b = sign_of(policy_key[s], other_policy);
        meet(oracle[s], a);
        meet(policy[s], b);
        if (member[s]) {
          agreement += a * b;
          oracle_untied += a * a;
          policy_untied += b * b;
        }
      }
    }

    float u[SLOTS];
    float penalty[SLOTS];
    float advantage[SLOTS];
    float found = 0;
    float ideal = 0;
    int best = 0;
    int shared = 0;
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      u[s] = penalty[s] = advantage[s] = float(0);
      if (member[s]) {
        u[s] = tie_mean(kTables.gain, oracle[s]);
        penalty[s] = penalty_of(kind, u[s], tie_mean(kTables.gain, policy[s]));
        const float relevance = tie_mean(kTables.relevance, oracle[s]);
        found += relevance * tie_mean(kTables.discount, policy[s]);
        ideal += relevance * tie_mean(kTables.discount, oracle[s]);
        best += oracle[s].first == 0 ? 1 : 0;
        shared += oracle[s].first == 0 && policy[s].first == 0 ? 1 : 0;
      }
    }
    agreement = warp_sum(agreement);
    oracle_untied = warp_sum(oracle_untied);
    policy_untied = warp_sum(policy_untied);
    const bool signal = oracle_untied > 0;

    const auto group_mean = [&](const float(&x)[SLOTS]) {
      float total = 0;
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        total += member[s] ? x[s] : float(0);
      }
      return warp_sum(total) / float(count);
    };
    // What the mean's rounding leaves, but not from what equals the mean.
    const auto take_rest = [&] {
      const float rest = group_mean(advantage);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        advantage[s] -= advantage[s] != 0 ? rest : float(0);
      }
    };
    if (follows_paper(kind)) {
      const float centre = group_mean(penalty);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        advantage[s] = centre - penalty[s];
      }
      take_rest();
    } else if (signal) {
      float value[SLOTS];
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        value[s] = kind == Kind::ZScore ? -oracle_key[s] : u[s];
      }
      const float centre = group_mean(value);
      float spread = float(1);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        advantage[s] = value[s] - centre;
      }
      if (kind == Kind::ZScore) {
        take_rest();
        float square[SLOTS];
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
          square[s] = advantage[s] * advantage[s];
        }
        spread = sqrt(group_mean(square) * float(count) / float(count - 1)) + float(kZScoreEps);
      }
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        advantage[s] /= spread;
        if (kind == Kind::Directed) {
          advantage[s] *= float(1) + penalty_weight * penalty[s];
        }
      }
      if (kind == Kind::Directed) {
        const float rest = group_mean(advantage);
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
          advantage[s] -= rest;
        }
      }
    }
    if (scale_group) {
      float square[SLOTS];
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        square[s] = advantage[s] * advantage[s];
      }
      const float rms = sqrt(group_mean(square)) + float(kScaleEps);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) {
        advantage[s] /= rms;
      }
    }

    const float weight = weights == nullptr ? float(1) : weights[n];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      const int i = lane + s * kWarp;
      if (i < G) {
        advantages[base + i] = member[s] ? advantage[s] * weight : float(0);
        penalties[base + i] = penalty[s];
      }
    }
    found = warp_sum(found);
    ideal = warp_sum(ideal);
    best = warp_sum(best);
    shared = warp_sum(shared);
    if (lane == 0) {
      const float pairs = float(oracle_untied) * float(policy_untied);
      ndcg[n] = found / ideal;
      kendall_tau[n] = pairs > float(0) ? float(agreement) / sqrt(pairs) : float(0);
      top1_agreement[n] = float(shared) / float(best);
      has_signal[n] = signal;
    }
  }
}

using Result = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Result rank_penalty_cuda(const at::Tensor& scores,                  // (N, G)
                         const at::Tensor& oracle_ranks,            // (N, G)
                         const std::optional<at::Tensor>& judged,   // (N, G) bool
                         const std::optional<at::Tensor>& weights,  // (N,)
                         c10::string_view kind, double penalty_weight, c10::string_view scale) {
  check_rank_penalty(scores, oracle_ranks, judged, weights);
  const RankOptions rank = rank_options(kind, penalty_weight, scale);
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat, "scores must be float32 on a CUDA device; got ",
                   scores.scalar_type());
  const auto dense = [](const std::optional<at::Tensor>& x) { return !x.has_value() || x->is_contiguous(); };
  TORCH_CHECK_VALUE(scores.is_contiguous() && oracle_ranks.is_contiguous() && dense(judged) && dense(weights),
                    "scores, oracle_ranks, judged and weights must be contiguous on a CUDA device");
  const c10::cuda::CUDAGuard guard(scores.device());
  const int64_t N = scores.size(0);
  const int G = static_cast<int>(scores.size(1));
  const auto options = scores.options();
  auto advantages = at::empty({N, G}, options);
  auto penalties = at::empty({N, G}, options);
  auto ndcg = at::empty({N}, options);
  auto tau = at::empty({N}, options);
  auto has_signal = at::empty({N}, options.dtype(at::kBool));
  auto top1 = at::empty({N}, options);
  if (N == 0) {
    return {advantages, penalties, ndcg, tau, has_signal, top1};
  }

  const int64_t blocks = std::min<int64_t>((N + kWarpsPerBlock - 1) / kWarpsPerBlock, kMaxBlocks);
  const dim3 grid(static_cast<unsigned>(blocks));
  const dim3 block(kWarp * kWarpsPerBlock);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto launch = [&](auto kernel) {
    kernel<<<grid, block, 0, stream>>>(
        scores.const_data_ptr<float>(), oracle_ranks.const_data_ptr<float>(),
        judged.has_value() ? judged->const_data_ptr<bool>() : nullptr,
        weights.has_value() ? weights->const_data_ptr<float>() : nullptr, advantages.data_ptr<float>(),
        penalties.data_ptr<float>(), ndcg.data_ptr<float>(), tau.data_ptr<float>(), has_signal.data_ptr<bool>(),
        top1.data_ptr<float>(), N, G, rank.kind, static_cast<float>(rank.penalty_weight), rank.scale_group);
  };
  G <= kWarp ? launch(rank_penalty_kernel<1>) : launch(rank_penalty_kernel<2>);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {advantages, penalties, ndcg, tau, has_signal, top1};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlaif_fast, CUDA, m) { m.impl("rank_penalty", &rank_penalty_cuda); }

}  // namespace rlaif
