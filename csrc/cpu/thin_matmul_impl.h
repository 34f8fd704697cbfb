// The matmul of few rows for the instruction set that CPU_CAPABILITY names; only row_kernels_impl.h includes it.

#include <ATen/cpu/vec/vec.h>

#include <array>
#include <cstddef>
#include <utility>

#include "row_kernels.h"
#include "vectors_impl.h"

namespace rlaif {
namespace {

constexpr int kLanes = FloatVec::size();
constexpr int kColumns = 4;  // rows of the weight at a time: streams that the processor prefetches
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = kLanes / kColumns;  // rows of x at a time: a tile has as many sums as a vector has lanes
#else
constexpr int kRows = 3;
#endif
constexpr int kSums = kRows * kColumns;

// Turns rows into columns: lane j of vector i and lane i of vector j change places. Each round deals the lanes of all
// vectors, one after the other, to an even and an odd half.
template <int kRound = 1>
inline Vectors<kLanes> transposed(const Vectors<kLanes>& x) {
  constexpr int kHalf = kLanes / 2;
  const auto dealt = vectors<kLanes>([&](auto i) {
    return std::get<(i >= kHalf)>(at::vec::deinterleave2(x[2 * (i % kHalf)], x[2 * (i % kHalf) + 1]));
  });
  if constexpr (2 * kRound < kLanes) {
    return transposed<2 * kRound>(dealt);
  } else {
    return dealt;
  }
}

// Adds up the lanes of each vector, from the first to the last.
template <std::size_t kCount>
inline void add_lanes(const std::array<FloatVec, kCount>& x, float* totals) {
  if constexpr (kCount == kLanes) {
    const auto lanes = transposed(x);
    FloatVec total(0.0f);
    for_each<kLanes>([&](auto lane) { total = total + lanes[lane]; });
    total.store(totals);
  } else {
    for (std::size_t i = 0; i < kCount; ++i) {
      float lanes[kLanes];
      x[i].store(lanes);
      totals[i] = 0.0f;
      for (float lane : lanes) {
        totals[i] += lane;
      }
    }
  }
}

// out[m, o] for kRowsHere rows of x and kColumnsHere rows of the weight.
// With kFetch it prefetches the next rows of the weight, which the processor cannot predict: each is short.
template <int kRowsHere, int kColumnsHere, bool kFetch>
inline void tile(const ThinMatmulArgs& args, int64_t m, int64_t o) {
  const int64_t H = args.H;
  const float *x = args.x + m * H, *weight = args.weight + o * H;
  auto sums = vectors<kSums>([](auto) { return FloatVec(0.0f); });  // of row r and column c at r kColumns + c
  int64_t i = 0;
  for (; i + kLanes <= H; i += kLanes) {
    const auto columns = vectors<kColumnsHere>([&](auto c) {
      if constexpr (kFetch) {
        __builtin_prefetch(weight + (kColumnsHere + c) * H + i);
      }
      return FloatVec::loadu(weight + c * H + i);
    });
    for_each<kRowsHere>([&](auto r) {
      const FloatVec row = FloatVec::loadu(x + r * H + i);
      for_each<kColumnsHere>([&](auto c) {
        FloatVec& sum = sums[r * kColumns + c];
        sum = at::vec::fmadd(row, columns[c], sum);
      });
    });
  }
  alignas(64) float totals[kSums];
  add_lanes(sums, totals);
  for (; i < H; ++i) {
    for (int64_t r = 0; r < kRowsHere; ++r) {
      for (int64_t c = 0; c < kColumnsHere; ++c) {
        totals[r * kColumns + c] += x[r * H + i] * weight[c * H + i];
      }
    }
  }
  for (int64_t r = 0; r < kRowsHere; ++r) {
    float* out = args.out + (m + r) * args.O + o;
    for (int64_t c = 0; c < kColumnsHere; ++c) {
      out[c] = args.add ? out[c] + totals[r * kColumns + c] : totals[r * kColumns + c];
    }
  }
}

template <int kColumnsHere, bool kFetch, int kRowsHere = kRows>
inline void rows_of(const ThinMatmulArgs& args, int64_t m, int64_t o) {
  if (args.M - m >= kRowsHere) {
    return tile<kRowsHere, kColumnsHere, kFetch>(args, m, o);
  }
  if constexpr (kRowsHere > 1) {
    rows_of<kColumnsHere, kFetch, kRowsHere - 1>(args, m, o);
  }
}

template <int kColumnsHere>
inline void columns_of(const ThinMatmulArgs& args, int64_t o) {
  rows_of<kColumnsHere, true>(args, 0, o);
  for (int64_t m = kRows; m < args.M; m += kRows) {
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
