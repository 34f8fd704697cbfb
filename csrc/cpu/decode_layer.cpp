// One layer of a text decoder at a decode step on the CPU: RMSNorm, grouped-query attention with rotary positions over
// the groups' buffers of keys and values, SwiGLU. What lies between the matmuls is a few loops, where a model's own
// modules make some sixty small operators. With few tokens a matmul takes the time of reading its weight, so it is
// `thin_matmul`'s; with more it is ATen's.
//
// Letters: A nodes (one token each), E hidden size, N groups, W nodes a group at most, H query heads, K key heads,
// R = H / K, D head size, L columns of a group's buffer, C columns in use.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "row_kernels.h"

namespace rlaif {
namespace {

using at::Tensor;
using OptionalTensors = c10::List<std::optional<Tensor>>;

constexpr int64_t kGrainElements = 8192;  // numbers a thread takes at least
constexpr int64_t kGrainWeights = 65536;  // numbers of a weight that a thread takes at least
constexpr int64_t kThinRows = 16;         // from here on packing the weight pays

enum Projection { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kProjections };
enum Norm { kInput, kPostAttention, kQueryNorm, kKeyNorm, kNorms };  // the last two may be absent

// out = x weight^T + bias, or that added to out.
void project(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool add, Tensor& out) {
  if (x.size(0) > kThinRows) {
    out.addmm_(x, weight.t(), add ? 1 : 0);  // a factor of 0 does not read out
  } else {
    const ThinMatmulArgs args{x.const_data_ptr<float>(), weight.const_data_ptr<float>(), out.data_ptr<float>(),
                              x.size(0), x.size(1), weight.size(0), add};
    at::parallel_for(0, weight.size(0), std::max<int64_t>(1, kGrainWeights / weight.size(1)),
                     [&](int64_t begin, int64_t end) { row_kernels().thin_matmul(args, begin, end); });
  }
  if (bias.has_value()) {
    out.add_(*bias);
  }
}

// out[i] = weight[i] * x[i] / sqrt(mean(x^2) + eps); out may be x.
void rms_norm(const float* x, const float* weight, double eps, int64_t size, float* out) {
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) {
    squares += static_cast<double>(x[i]) * x[i];
  }
  const float scale = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(size) + eps));
  for (int64_t i = 0; i < size; ++i) {
    out[i] = weight[i] * (x[i] * scale);
  }
}

// Rotates a head by its position, the first half of its numbers against the second, and scales it; out is not x.
void rotate(const float* x, const float* cos, const float* sin, float scale, int64_t size, float* out) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = scale * (x[i] * cos[i] - x[half + i] * sin[i]);
    out[half + i] = scale * (x[half + i] * cos[half + i] + x[i] * sin[half + i]);
  }
}

template <typename Body>
void for_nodes(int64_t nodes, int64_t numbers, Body body) {
  at::parallel_for(0, nodes, std::max<int64_t>(1, kGrainElements / numbers), [&](int64_t begin, int64_t end) {
    for (int64_t node = begin; node < end; ++node) {
      body(node);
    }
  });
}

Tensor normed(const Tensor& hidden, const float* weight, double eps) {
  Tensor out = at::empty_like(hidden);
  const int64_t size = hidden.size(1);
  const float* x = hidden.const_data_ptr<float>();
  float* y = out.data_ptr<float>();
  for_nodes(hidden.size(0), size, [&](int64_t a) { rms_norm(x + a * size, weight, eps, size, y + a * size); });
  return out;
}

void check_matrix(const char* name, const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, name, " must be float32; got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == shape && x.is_contiguous(), name, " must be a contiguous ", shape, "; got ",
                    x.sizes());
}

void check_indices(const char* name, const Tensor& x, int64_t nodes, int64_t bound) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, name, " must be int64; got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == nodes && x.is_contiguous(), name, " must be a contiguous (", nodes,
                    ",); got ", x.sizes());
  const int64_t* index = x.const_data_ptr<int64_t>();
  for (int64_t a = 0; a < nodes; ++a) {
    TORCH_CHECK_INDEX(index[a] >= 0 && index[a] < bound, name, " must lie in [0, ", bound, "); got ", index[a]);
  }
}

// Which columns the nodes of each group see, as `DecodeAttentionArgs` has them.
struct Visible {
  Visible(const Tensor& bias, const Tensor& slots, int64_t R, int64_t lanes)
      : columns(bias.size(0) * bias.size(3)), counts(bias.size(0)),
        masks(at::empty({bias.size(0), bias.size(3), lanes}, bias.options())) {
    const int64_t N = bias.size(0), W = bias.size(2), C = bias.size(3);
    std::vector<std::vector<int64_t>> nodes(N);  // the rows of a group's mask that belong to one
    for (int64_t a = 0; a < slots.size(0); ++a) {
      const int64_t slot = slots.const_data_ptr<int64_t>()[a];
      nodes[slot / W].push_back(slot % W);
    }
    constexpr float kUnseen = -std::numeric_limits<float>::infinity();
    std::vector<float> most(C), least(C);  // of a column's mask
    for (int64_t n = 0; n < N; ++n) {
      const float* of_group = bias.const_data_ptr<float>() + n * W * C;
      std::fill(most.begin(), most.end(), kUnseen);
      std::fill(least.begin(), least.end(), -kUnseen);
      for (const int64_t w : nodes[n]) {
        for (int64_t c = 0; c < C; ++c) {
          most[c] = std::max(most[c], of_group[w * C + c]);
          least[c] = std::min(least[c], of_group[w * C + c]);
        }
      }
      for (int64_t c = 0; c < C; ++c) {
        if (most[c] == kUnseen) {
          continue;
        }
        const bool masked = most[c] != 0.0f || least[c] != 0.0f;
        columns[n * C + counts[n]++] = static_cast<int32_t>(2 * c + masked);
        if (!masked) {
          continue;
        }
        float* lane = masks.data_ptr<float>() + (n * C + c) * lanes;
        std::fill_n(lane, lanes, 0.0f);
        for (int64_t r = 0; r < R; ++r) {
          for (const int64_t w : nodes[n]) {
            lane[r * W + w] = of_group[w * C + c];
          }
        }
      }
    }
  }

  std::vector<int32_t> columns;
  std::vector<int64_t> counts;
  Tensor masks;
};

// Attention of the queries (N K, R W, D) to the buffers (N, K, L, D) under the mask (N, 1, W, C).
Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& bias, const Tensor& slots) {
  const int64_t K = keys.size(1), L = keys.size(2), D = keys.size(3), W = bias.size(2), C = bias.size(3);
  const int64_t Q = query.size(1), vector = row_kernels().vector, lanes = (Q + vector - 1) / vector * vector;
  const Visible visible(bias, slots, Q / W, lanes);
  Tensor out = at::empty_like(query);
  const DecodeAttentionArgs args{query.const_data_ptr<float>(),
                                 keys.const_data_ptr<float>(),
                                 values.const_data_ptr<float>(),
                                 visible.columns.data(),
                                 visible.counts.data(),
                                 visible.masks.const_data_ptr<float>(),
                                 out.data_ptr<float>(),
                                 K, L, C, Q, D, lanes};
  at::parallel_for(0, query.size(0), std::max<int64_t>(1, kGrainWeights / (C * D)),
                   [&](int64_t begin, int64_t end) { row_kernels().decode_attention(args, begin, end); });
  return out;
}

// Moves the hidden states of A tokens through the layer, in place, and writes their keys and values to the buffers.
void decode_layer_(Tensor& hidden, const Tensor& cos, const Tensor& sin, Tensor& keys, Tensor& values,
                   const Tensor& bias, const Tensor& slots, const Tensor& columns, at::TensorList projections,
                   const OptionalTensors& biases, const OptionalTensors& norms, double eps, double scale) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && keys.dim() == 4 && bias.dim() == 4, "hidden must be (A, E), keys (N, K, L, D) "
                    "and bias (N, 1, W, C); got ", hidden.sizes(), ", ", keys.sizes(), ", ", bias.sizes());
  TORCH_CHECK_VALUE(projections.size() == kProjections && biases.size() == kProjections && norms.size() == kNorms,
                    "expected 7 projections, 7 biases and 4 norms; got ", projections.size(), ", ", biases.size(), ", ",
                    norms.size());
  const int64_t A = hidden.size(0), E = hidden.size(1), I = projections[kGate].size(0);
  const int64_t N = keys.size(0), K = keys.size(1), L = keys.size(2), D = keys.size(3);
  TORCH_CHECK_VALUE(E > 0 && I > 0 && K > 0 && D > 0, "expected a hidden size, inner size, key heads and head size "
                    "above 0; got ", E, ", ", I, ", ", K, ", ", D);
  const int64_t W = bias.size(2), C = bias.size(3), H = projections[kQuery].size(0) / D, R = H / K;
  TORCH_CHECK_VALUE(H == R * K && D % 2 == 0 && C <= L, "expected heads in multiples of ", K,
                    ", an even head size and at most ", L, " columns; got ", H, ", ", D, ", ", C);
  check_matrix("hidden", hidden, {A, E});
  check_matrix("cos", cos, {A, D});
  check_matrix("sin", sin, {A, D});
  check_matrix("keys", keys, {N, K, L, D});
  check_matrix("values", values, {N, K, L, D});
  check_matrix("bias", bias, {N, 1, W, C});
  check_indices("slots", slots, A, N * W);
  check_indices("columns", columns, A, C);
  const int64_t rows[] = {H * D, K * D, K * D, E, I, I, E}, inner[] = {E, E, E, H * D, E, E, I};
  for (int64_t i = 0; i < kProjections; ++i) {
    check_matrix("projections", projections[i], {rows[i], inner[i]});
    const std::optional<Tensor> own = biases.get(i);
    if (own.has_value()) {
      check_matrix("biases", *own, {rows[i]});
    }
  }
  const float* norm[kNorms] = {};  // null where absent
  for (int64_t i = 0; i < kNorms; ++i) {
    const std::optional<Tensor> weight = norms.get(i);
    TORCH_CHECK_VALUE(weight.has_value() || i >= kQueryNorm, "norms of the layer must be given");
    if (weight.has_value()) {
      check_matrix("norms", *weight, {i < kQueryNorm ? E : D});
      norm[i] = weight->const_data_ptr<float>();
    }
  }
  const auto projected = [&](const Tensor& x, Projection which) {
    Tensor out = at::empty({A, rows[which]}, hidden.options());
    project(x, projections[which], biases.get(which), false, out);
    return out;
  };
  const auto add_projected = [&](const Tensor& x, Projection which) {
    project(x, projections[which], biases.get(which), true, hidden);
  };

  const Tensor input = normed(hidden, norm[kInput], eps);
  const Tensor q = projected(input, kQuery), k = projected(input, kKey), v = projected(input, kValue);
  Tensor query = at::zeros({N * K, R * W, D}, hidden.options());  // the heads of a key head are further queries of it
  const float *q_data = q.const_data_ptr<float>(), *k_data = k.const_data_ptr<float>();
  const float *v_data = v.const_data_ptr<float>();
  const float *cos_data = cos.const_data_ptr<float>(), *sin_data = sin.const_data_ptr<float>();
  const int64_t *slot = slots.const_data_ptr<int64_t>(), *column = columns.const_data_ptr<int64_t>();
  float *query_data = query.data_ptr<float>(), *key_data = keys.data_ptr<float>();
  float* value_data = values.data_ptr<float>();
  const auto place = [&](int64_t a, int64_t h) {  // of a node's head among the queries
    const int64_t group = slot[a] / W, w = slot[a] % W;
    return (((group * K + h / R) * R + h % R) * W + w) * D;
  };
  for_nodes(A, (H + 2 * K) * D, [&](int64_t a) {
    std::vector<float> head(D);
    const auto placed = [&](const float* x, const float* weight, double by, float* out) {
      if (weight != nullptr) {
        rms_norm(x, weight, eps, D, head.data());
        x = head.data();
      }
      rotate(x, cos_data + a * D, sin_data + a * D, static_cast<float>(by), D, out);
    };
    for (int64_t h = 0; h < H; ++h) {
      placed(q_data + (a * H + h) * D, norm[kQueryNorm], scale, query_data + place(a, h));
    }
    for (int64_t h = 0; h < K; ++h) {
      const int64_t at = (((slot[a] / W) * K + h) * L + column[a]) * D;
      placed(k_data + (a * K + h) * D, norm[kKeyNorm], 1.0, key_data + at);
      std::copy_n(v_data + (a * K + h) * D, D, value_data + at);
    }
  });

  const Tensor heads = attend(query, keys, values, bias, slots);  // (N K, R W, D)
  Tensor attended = at::empty({A, H * D}, hidden.options());
  const float* heads_data = heads.const_data_ptr<float>();
  float* attended_data = attended.data_ptr<float>();
  for_nodes(A, H * D, [&](int64_t a) {
    for (int64_t h = 0; h < H; ++h) {
      std::copy_n(heads_data + place(a, h), D, attended_data + (a * H + h) * D);
    }
  });
  add_projected(attended, kOutput);

  const Tensor middle = normed(hidden, norm[kPostAttention], eps);
  Tensor gate = projected(middle, kGate);
  add_projected(at::silu_(gate).mul_(projected(middle, kUp)), kDown);
}

}  // namespace

TORCH_LIBRARY_IMPL(rlaif_fast, CPU, m) { m.impl("decode_layer_", &decode_layer_); }

}  // namespace rlaif
