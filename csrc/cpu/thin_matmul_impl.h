// The matmul of few rows for the instruction set that CPU_CAPABILITY names; included by row_kernels_impl.h alone.

#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#include "row_kernels.h"

namespace rlaif {
namespace {

constexpr int64_t kColumns = 4;  // rows of the weight at a time: streams that the processor prefetches
constexpr int64_t kRows = 3;     // rows of x at a time: 12 sums and 4 vectors of the weight fill 16 registers

// out[m, o] for kRowsHere rows of x and kColumnsHere rows of the weight.
template <int64_t kRowsHere, int64_t kColumnsHere>
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

template <int64_t kColumnsHere>
inline void columns_of(const ThinMatmulArgs& args, int64_t o) {
  int64_t m = 0;
  for (; m + kRows <= args.M; m += kRows) {
    tile<kRows, kColumnsHere>(args, m, o);
  }
  for (; m < args.M; ++m) {
    tile<1, kColumnsHere>(args, m, o);
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
