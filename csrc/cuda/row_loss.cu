// The loss and its gradient of rows of logits, in place: a cluster of two blocks holds a row (304 KB at V = 152064 in
// 16 bits) in the shared memory of both, so that each logit is read once and its gradient written once: 4 bytes a
// logit.
//
//     z = scale logits / temperature, or c tanh(scale logits / c) / temperature where a cap c bounds them
//     d loss / d logits = (g ([v = y] - p) - h p (log p + H)) dz / dlogits
//
// A thread keeps a running maximum and two sums (`Stats`) of the vectors it loads; they are merged over the warp, the
// block and the other block. Later it reads back only what it stored, so no barrier guards the row. float32 inside;
// equal inputs give equal bits.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <cstdint>

#include "../options.h"
#include "../row_cluster.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RLAIF_CLUSTER __cluster_dims__(kClusterBlocks, 1, 1)
#else
#define RLAIF_CLUSTER
#endif

namespace rlaif {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kClusterThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Rows {
  const int64_t* ids;
  const float* advantages;
  const float* weights;
  const float* old_logps;        // this and the next four: null where there are none
  const float* ref_logps;
  const float* sampling_ratio;
  const float* entropy_weights;
  const float* temperatures;
  float inv_temperature;
  float inner;  // scale / cap
  float cap;    // 0 where there is none
  float* logps;
  float* lse;
  float* entropy;
  float* grad_logps;
  float* grad_entropy;
};

__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

template <typename T>
union Vector {
  uint4 bits;
  T values[kVectorBytes / sizeof(T)];
};

__device__ __forceinline__ float capped(float x, float inner, float cap) {
  return cap == 0 ? x : cap * (1 - 2 / (1 + exp2f(x * (2 * kLog2e * inner))));
}

template <typename T>
__global__ void RLAIF_CLUSTER __launch_bounds__(kClusterThreads, 1)
    row_loss_kernel(T* __restrict__ logits, int64_t stride, int V, Rows rows, TokenOptions<float> options) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  constexpr int kValues = kVectorBytes / sizeof(T);
  extern __shared__ uint4 row[];
  __shared__ Stats of_warp[kWarps];
  __shared__ Stats of_block;
  __shared__ float at_token;  // the capped logit of the token, in the block that holds it
  const cg::cluster_group cluster = cg::this_cluster();
  const int block = static_cast<int>(cluster.block_rank());
  const int64_t m = blockIdx.x / kClusterBlocks;
  const int lane = threadIdx.x % kWarp;
  const int vectors = V / kValues;
  const Share share = share_of(block, vectors);
  uint4* const mine = reinterpret_cast<uint4*>(logits + m * stride) + share.first;
  const float weight = rows.weights[m];
  const float inv = rows.inv_temperature / (rows.temperatures == nullptr ? 1.f : rows.temperatures[m]);
  const float scale = inv * kLog2e;
  const float h = -options.entropy_coef * (rows.entropy_weights == nullptr ? weight : rows.entropy_weights[m]);

  if (weight == 0) {  // the same for the whole cluster; the row is not read
    for (int v = threadIdx.x; v < share.count; v += kClusterThreads) {
      mine[v] = uint4{0, 0, 0, 0};
    }
    if (block == 0 && threadIdx.x == 0) {
      rows.logps[m] = rows.lse[m] = rows.entropy[m] = rows.grad_logps[m] = 0;
      rows.grad_entropy[m] = h;
    }
    return;
  }

  Stats own{kFloor, 0, 0};
  for (int v = threadIdx.x; v < share.count; v += kClusterThreads) {
    Vector<T> vector;
    vector.bits = mine[v];
    row[v] = vector.bits;
    float top = own.m;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      top = fmaxf(top, capped(widen(vector.values[i]), rows.inner, rows.cap));
    }
    own = raised(own, top, scale);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      take(own, capped(widen(vector.values[i]), rows.inner, rows.cap), scale);
    }
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Stats other{__shfl_down_sync(kAllLanes, own.m, offset), __shfl_down_sync(kAllLanes, own.s, offset),
                      __shfl_down_sync(kAllLanes, own.w, offset)};
    own = merge(own, other, scale);
  }
  if (lane == 0) {
    of_warp[threadIdx.x / kWarp] = own;
  }
  __syncthreads();  // also: the row is in shared memory
  const int64_t y = rows.ids[m];
  const bool inside = y >= 0 && y < V;
  const int token_vector = inside ? static_cast<int>(y / kValues) : 0;
  const int token_block = block_of(token_vector, vectors);
  if (threadIdx.x == 0) {
    Stats all = of_warp[0];
    for (int i = 1; i < kWarps; ++i) {
      all = merge(all, of_warp[i], scale);
    }
    of_block = all;
    if (block == token_block) {
      Vector<T> vector;
      vector.bits = row[slot_of(token_vector, vectors)];
      T value = vector.values[0];
#pragma unroll
      for (int i = 1; i < kValues; ++i) {  // no indexed registers
        value = i == (inside ? y % kValues : 0) ? vector.values[i] : value;
      }
      at_token = capped(widen(value), rows.inner, rows.cap);
    }
  }
  cluster.sync();
  const Stats first = *cluster.map_shared_rank(&of_block, 0);
  const Stats second = *cluster.map_shared_rank(&of_block, 1);
  const float x_y = *cluster.map_shared_rank(&at_token, token_block);
  cluster.sync();  // neither block leaves while the other reads from it

  const Stats all = merge(first, second, scale);  // in one order in both blocks
  const float log_total = log2f(all.s);
  const float entropy = (log_total - all.w / all.s) * kLn2;
  const float logp = inside ? ((x_y - all.m) * scale - log_total) * kLn2 : nanf("");
  const float log_ratio = rows.old_logps == nullptr ? 0.f : logp - rows.old_logps[m];
  const PolicyTerm<float> policy = policy_term(log_ratio, logp, rows.advantages[m], options);
  float slope = policy.slope * (rows.sampling_ratio == nullptr ? 1.f : rows.sampling_ratio[m]);
  if (rows.ref_logps != nullptr) {
    slope -= options.beta * kl_term(rows.ref_logps[m] - logp, policy, options).slope;
  }
  const float g = -weight * slope;
  if (block == 0 && threadIdx.x == 0) {
    rows.logps[m] = logp;
    rows.lse[m] = (all.m * scale + log_total) * kLn2;
    rows.entropy[m] = entropy;
    rows.grad_logps[m] = g;
    rows.grad_entropy[m] = h;
  }

  for (int v = threadIdx.x; v < share.count; v += kClusterThreads) {
    Vector<T> vector;
    vector.bits = row[v];
    const int64_t column = static_cast<int64_t>(share.first + v) * kValues;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float x = capped(widen(vector.values[i]), rows.inner, rows.cap);
      const float d = (x - all.m) * scale - log_total;
      const float p = exp2f(d);
      float grad = (column + i == y ? g : 0.f) - p * (g + h * (fmaxf(d, kLeast) * kLn2 + entropy));
      if (rows.cap != 0) {
        const float part = x / rows.cap;
        grad *= rows.inner * rows.cap * (1 - part * part);  // d (c tanh u) / du = c (1 - tanh^2)
      }
      narrow(grad * inv, vector.values[i]);
    }
    mine[v] = vector.bits;
  }
#endif
}

const float* floats(const char* name, const at::Tensor& x, int64_t M) {
  TORCH_CHECK_VALUE(x.is_cuda() && x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() == M, name,
                    " must be a contiguous float32 tensor of ", M, " numbers on the device of logits");
  return x.const_data_ptr<float>();
}

const float* floats(const char* name, const std::optional<at::Tensor>& x, int64_t M) {
  return x.has_value() ? floats(name, *x, M) : nullptr;
}

bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0; }

int attribute(cudaDeviceAttr which, const at::Tensor& x) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, x.get_device()));
  return value;
}

using LossRows = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LossRows row_loss_cuda_(at::Tensor& logits, const at::Tensor& token_ids, double temperature,
                        const std::optional<at::Tensor>& temperatures, std::optional<double> softcap,
                        double logit_scale, const at::Tensor& advantages, const at::Tensor& weights,
                        const std::optional<at::Tensor>& old_logps, const std::optional<at::Tensor>& ref_logps,
                        const std::optional<at::Tensor>& sampling_ratio,
                        const std::optional<at::Tensor>& entropy_weights, RLAIF_LOSS_PARAMETERS) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.stride(1) == 1, "logits must be rows (M, V); got ", logits.sizes());
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kBFloat16 || logits.scalar_type() == at::kHalf,
                   "logits must be bfloat16 or float16 for the cluster kernel; got ", logits.scalar_type());
  const int64_t M = logits.size(0);
  const int64_t V = logits.size(1);
  const int per_vector = kVectorBytes / 2;
  const c10::cuda::CUDAGuard guard(logits.device());
  TORCH_CHECK_VALUE(attribute(cudaDevAttrComputeCapabilityMajor, logits) >= 9,
                    "the cluster kernel needs compute capability 9.0 or later");
  const int shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, logits);
  TORCH_CHECK_VALUE(row_fits(V, shared_bytes, 2), "the cluster kernel takes rows of a multiple of ", per_vector,
                    " logits, on this device at most ", longest_row(shared_bytes, 2), "; got ", V);
  TORCH_CHECK_VALUE(logits.stride(0) % per_vector == 0 && is_aligned(logits.const_data_ptr()),
                    "the rows of logits must start at multiples of ", kVectorBytes, " bytes for the cluster kernel; got a "
                    "stride of ", logits.stride(0), " logits and an offset of ", logits.storage_offset());
  TORCH_CHECK_VALUE(token_ids.scalar_type() == at::kLong && token_ids.is_contiguous() && token_ids.numel() == M,
                    "token_ids must be ", M, " contiguous int64 numbers; got ", token_ids.sizes());
  const auto make = [&] { return at::empty({M}, logits.options().dtype(at::kFloat)); };
  at::Tensor logps = make(), lse = make(), entropy = make(), grad_logps = make(), grad_entropy = make();
  if (M == 0) {
    return {logps, lse, entropy, grad_logps, grad_entropy};
  }
  const Rows rows{token_ids.const_data_ptr<int64_t>(),
                  floats("advantages", advantages, M),
                  floats("weights", weights, M),
                  floats("old_logps", old_logps, M),
                  floats("ref_logps", ref_logps, M),
                  floats("sampling_ratio", sampling_ratio, M),
                  floats("entropy_weights", entropy_weights, M),
                  floats("temperatures", temperatures, M),
                  static_cast<float>((softcap.has_value() ? 1.0 : logit_scale) / (temperatures ? 1.0 : temperature)),
                  static_cast<float>(softcap.has_value() ? logit_scale / *softcap : 0.0),
                  static_cast<float>(softcap.value_or(0.0)),
                  logps.data_ptr<float>(),
                  lse.data_ptr<float>(),
                  entropy.data_ptr<float>(),
                  grad_logps.data_ptr<float>(),
                  grad_entropy.data_ptr<float>()};
  const TokenOptions<float> options = loss_options(RLAIF_LOSS_ARGUMENTS).token.to<float>();
  const int bytes = share_of(0, static_cast<int>(V / per_vector)).count * kVectorBytes;
  const dim3 grid(static_cast<unsigned>(M * kClusterBlocks));
  const auto launch = [&](auto kernel, auto* data) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        shared_bytes - kOtherSharedBytes));
    kernel<<<grid, kClusterThreads, bytes, c10::cuda::getCurrentCUDAStream()>>>(data, logits.stride(0),
                                                                               static_cast<int>(V), rows, options);
  };
  if (logits.scalar_type() == at::kHalf) {
    launch(row_loss_kernel<__half>, reinterpret_cast<__half*>(logits.data_ptr()));
  } else {
    launch(row_loss_kernel<__nv_bfloat16>, reinterpret_cast<__nv_bfloat16*>(logits.data_ptr()));
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {logps, lse, entropy, grad_logps, grad_entropy};
}

}  // namespace

TORCH_LIBRARY_IMPL(rlaif_fast, CUDA, m) { m.impl("row_loss_", &row_loss_cuda_); }

}  // namespace rlaif
