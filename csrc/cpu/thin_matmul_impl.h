// The matmul of few rows for the instruction set that CPU_CAPABILITY names; included by row_kernels_impl.h alone.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "row_kernels.h"

namespace rlaif {
namespace {

constexpr int64_t kColumns = 4;  // rows of the weight at a time: streams that the processor prefetches
constexpr int64_t kRows = 3;     // rows of x at a time: 12 sums and 4 vectors of the weight fill 16 registers

// out[m, o] for kRowsHere rows of x and kColumnsHere rows of the weight.
// With kFetch it asks for the rows of the weight behind these, which the processor does not foresee: each is short.
template <int64_t kRowsHere, int64_t kColumnsHere, bool kFetch>
inline void tile(const ThinMatmulArgs& args, int64_t m, int64_t o) {
  using Vec = at::vec::Vectorized<float>;
  const int64_t H = args.H;
  const float *x = args.x + m * H, *weight = args.weight + o * H;
  Vec sums[kRowsHere][kColumnsHere];
  for (auto& row : sums) {
    std::fill_n(row, kColumnsHere, Vec(0.0f));
  }
  int64_t i = 0;
  for (; i + Vec::size() <= H; i += Vec::size()) {
    Vec columns[kColumnsHere];
    for (int64_t c = 0; c < kColumnsHere; ++c) {
      columns[c] = Vec::loadu(weight + c * H + i);
      if (kFetch) {
        __builtin_prefetch(weight + (kColumnsHere + c) * H + i);
      }
    }
    for (int64_t r = 0; r < kRowsHere; ++r) {
      const Vec row = Vec::loadu(x + r * H + i);
      for (int64_t c = 0; c < kColumnsHere; ++c) {
        sums[r][c] = at::vec::fmadd(row, columns[c], sums[r][c]);
      }
    }
  }
  for (int64_t r = 0; r < kRowsHere; ++r) {
    for (int64_t c = 0; c < kColumnsHere; ++c) {
      alignas(64) float lanes[Vec::size()];
      sums[r][c].store(lanes);
      float total = 0;
      for (float lane : lanes) {
        total += lane;
      }
      for (int64_t rest = i; rest < H; ++rest) {
        total += x[r * H + rest] * weight[c * H + rest];
      }
      float* out = args.out + (m + r) * args.O + o + c;
      *out = args.add ? *out + total : total;
    }
  }
}

// 2 and 2 are faster than 3 and 1, whose 4 sums wait for each other.
inline int64_t rows_at_once(int64_t left) { return left == 4 ? 2 : std::min(left, kRows); }

template <int64_t kColumnsHere, bool kFetch>
inline void rows_of(const ThinMatmulArgs& args, int64_t m, int64_t o) {
  switch (rows_at_once(args.M - m)) {
    case 1:
      return tile<1, kColumnsHere, kFetch>(args, m, o);
    case 2:
      return tile<2, kColumnsHere, kFetch>(args, m, o);
    default:
      return tile<kRows, kColumnsHere, kFetch>(args, m, o);
  }
}

template <int64_t kColumnsHere>
inline void columns_of(const ThinMatmulArgs& args, int64_t o) {
  rows_of<kColumnsHere, true>(args, 0, o);
  for (int64_t m = rows_at_once(args.M); m < args.M; m += rows_at_once(args.M - m)) {
    rows_of<kColumnsHere, false>(args, m, o);
  }
}

void thin_matmul(const ThinMatmulArgs& args, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + kColumns <= end; o += kColumns) {
    columns_of<kColumns>(args, o);
  }
  for (; o < end; ++o) {
    columns_of<1>(args, o);
  }
}

}  // namespace
}  // namespace rlaif
